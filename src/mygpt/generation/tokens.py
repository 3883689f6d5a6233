"""`generate` and `stream`: from token ids to more token ids.

Letters: B batch, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from mygpt.core.config import (
    COLDEST,
    Overflow,
    SamplingConfig,
    check_max_new_tokens,
    check_overflow,
)
from mygpt.core.model import GPT, evaluating
from mygpt.core.random import Stream
from mygpt.core.sampling import next_ids
from mygpt.engines.choice import choose, tokens_to_read
from mygpt.engines.contract import Request, check_prompt_fits
from mygpt.engines.torch_engine import choose_reader
from mygpt.errors import InputError
from mygpt.generation.multinomial import draws
from mygpt.generation.packing import cpu_engine_of, numbers_to_pack

if TYPE_CHECKING:
    from mygpt.engines.cpu import CpuDecoding


def generate(
    model: Any,
    prompt_ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    *,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    overflow: Overflow = "crop",
) -> torch.Tensor:
    """Append `max_new_tokens` tokens to each row of `prompt_ids` (chapter 15, section 15.7).

    Args:
        model: a `GPT`, or any module whose forward returns `(logits, anything)` and that has
            `max_seq_len`. It runs in eval mode and is afterwards in the mode it was in.
        prompt_ids: (B, T) int64 tensor; longer than the window is fine, B may be 0.
        max_new_tokens: how many tokens to append.
        temperature: below 1 sharpens, above 1 flattens; 0 is argmax.
        top_k: draw from the k likeliest tokens alone; None or 0 is off.
        top_p: draw from the smallest set of likeliest tokens that reaches this probability.
        min_p: drop tokens below this share of the likeliest one's probability.
        repetition_penalty: above 1 makes tokens that occurred before less likely.
        seed: None draws from torch's global generator, as the chapter does. A seed gives row
            i the numbers of `Stream(seed, i)`: the same text for any batch size.
        overflow: past the window, "crop" reads the last `max_seq_len` tokens at each step (the
            chapter's way), "refill" keeps the newer half when the window is full, "stop" ends
            when the window is full.

    Returns:
        (B, T + max_new_tokens) int64 on the prompt's device, prompt included; shorter only
        where "stop" ended it.

    Raises:
        InputError: for a value outside its range, naming the range (a ValueError).
    """
    sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty)
    job = _Job(model, prompt_ids, max_new_tokens, sampling, seed, overflow)
    new = job.all_at_once()
    return torch.cat([prompt_ids, new], dim=1)


def stream(
    model: Any,
    prompt_ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    *,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    overflow: Overflow = "crop",
) -> Iterator[torch.Tensor]:
    """The new tokens of `generate`, one step at a time: each (B,) int64.

    Takes `generate`'s arguments and raises what it raises, at once rather than at the first
    step.
    """
    sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty)
    return _Job(model, prompt_ids, max_new_tokens, sampling, seed, overflow).steps()


def _check_prompt(model: Any, prompt_ids: torch.Tensor) -> None:
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "max_seq_len"):
        raise InputError(
            f"model is a {type(model).__name__}: give a GPT, or a torch module with max_seq_len"
        )
    if not isinstance(prompt_ids, torch.Tensor):
        raise InputError(
            f"prompt_ids must be a (B, T) int64 tensor, not {type(prompt_ids).__name__}: "
            "torch.tensor([[0, 1]]) is one prompt of two ids"
        )
    if prompt_ids.ndim != 2 or prompt_ids.dtype != torch.int64:
        raise InputError(
            f"prompt_ids must be (B, T) int64, not {tuple(prompt_ids.shape)} {prompt_ids.dtype}: "
            "one prompt of T ids becomes (1, T) with .unsqueeze(0)"
        )
    if prompt_ids.shape[1] == 0:
        raise InputError("prompt_ids has no tokens: start from at least one")
    if isinstance(model, GPT) and prompt_ids.numel():
        vocab_size = model.config.vocab_size
        least, most = int(prompt_ids.min()), int(prompt_ids.max())
        if least < 0 or most >= vocab_size:
            raise InputError(
                f"prompt_ids holds id {least if least < 0 else most}: "
                f"this model's ids run from 0 to {vocab_size - 1}"
            )


class _Job:
    """One call of `generate` or `stream`: checked at once, worked on lazily.

    The compiled engine decodes our own models on the CPU; torch decodes all others, and jobs
    too short to compile for.
    """

    def __init__(
        self,
        model: Any,
        prompt_ids: torch.Tensor,
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int | None,
        overflow: Overflow,
    ) -> None:
        _check_prompt(model, prompt_ids)
        check_max_new_tokens(max_new_tokens)
        check_overflow(overflow)
        self.batch, self.length = prompt_ids.shape
        check_prompt_fits(self.length, model.max_seq_len, overflow)
        if overflow == "stop":
            max_new_tokens = min(max_new_tokens, model.max_seq_len - self.length)
        self.streams = None if seed is None else [Stream(seed, i) for i in range(self.batch)]
        self.model, self.prompt_ids, self.overflow = model, prompt_ids, overflow
        self.max_new_tokens, self.sampling = max_new_tokens, sampling

    def all_at_once(self) -> torch.Tensor:
        """All new tokens, (B, new) int64."""
        if not self._compiled_can:
            new = self.prompt_ids.new_empty(self.batch, self.max_new_tokens)
            for number, ids in enumerate(self._torch_steps()):
                new[:, number] = ids
            return new
        decoding = self._start_compiled()
        if self._draws_by_itself:
            decoding.advance(self.max_new_tokens)
        else:
            for _ in draws(decoding, self.max_new_tokens):
                pass
        return torch.from_numpy(decoding.texts()[:, self.length :])

    def steps(self) -> Iterator[torch.Tensor]:
        """The new tokens step by step, each (B,) int64."""
        if not self._compiled_can:
            return self._torch_steps()
        if self._draws_by_itself:
            return self._compiled_steps()
        return self._multinomial_steps()

    @property
    def _draws_by_itself(self) -> bool:
        """Whether no draw is torch's: with a seed, or where nothing is drawn."""
        return self.streams is not None or self.sampling.temperature < COLDEST

    @cached_property
    def _compiled_can(self) -> bool:
        if self.batch == 0 or self.max_new_tokens == 0:
            return False
        self.numbers = numbers_to_pack(self.model)
        if self.numbers is None:
            return False
        config, new = self.model.config, self.max_new_tokens
        reads = tokens_to_read(self.length, new, config.max_seq_len, self.overflow)
        tokens, reads = self.batch * new, self.batch * reads
        return choose(config, tokens=tokens, reads=reads, device="cpu").name == "cpu"

    def _start_compiled(self) -> CpuDecoding:
        prompts = self.prompt_ids.cpu().numpy()
        streams = self.streams or [Stream(0)] * self.batch
        requests = [
            Request(prompt, self.max_new_tokens, self.sampling, stream, self.overflow)
            for prompt, stream in zip(prompts, streams, strict=True)
        ]
        return cpu_engine_of(self.model, self.numbers).start(requests)

    def _compiled_steps(self) -> Iterator[torch.Tensor]:
        decoding = self._start_compiled()
        for _ in range(self.max_new_tokens):
            yield torch.tensor([new[0] for new in decoding.advance(1)])

    def _multinomial_steps(self) -> Iterator[torch.Tensor]:
        """The chapter's draw from torch's global generator between compiled steps."""
        decoding = self._start_compiled()
        for _ in draws(decoding, self.max_new_tokens):
            yield torch.from_numpy(decoding.last_ids())

    def _torch_steps(self) -> Iterator[torch.Tensor]:
        text = self.prompt_ids.new_empty(self.batch, self.length + self.max_new_tokens)
        text[:, : self.length] = self.prompt_ids
        if self.batch == 0:  # no rows: nothing for the model to read
            yield from text[:, self.length :].T
            return
        positions = self.length + self.max_new_tokens
        reader = choose_reader(self.model, self.batch, self.overflow, positions=positions)
        for step in range(self.max_new_tokens):
            so_far = text[:, : self.length + step]
            with evaluating(self.model):  # not around the loop: the caller acts between steps
                logits = reader.next_logits(so_far)
                ids = next_ids(logits, self.sampling, so_far, self.streams, step)
            text[:, self.length + step] = ids
            yield ids
