"""`mygpt.generate` and `mygpt.stream`: `core.generation` with the fastest decoder.

Letters: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from mygpt.core.config import GREEDY_BELOW, SamplingConfig
from mygpt.core.generation import Decoder, GenerationCall, LoopDecoder
from mygpt.core.model import GPT
from mygpt.core.random import Stream, check_seed
from mygpt.core.window import OVERFLOW_POLICIES, Overflow
from mygpt.decode.choice import choose_engine, tokens_to_read
from mygpt.decode.options import Seed
from mygpt.decode.packing import cpu_engine_of, packable_parameters
from mygpt.engine import Request, check_prompt_fits
from mygpt.errors import InputError, require_choice, require_int

if TYPE_CHECKING:
    from mygpt.cpu.decode.decoding import CpuDecoding


def checked_call(
    model: Any,
    prompt_ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    *,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: Seed | None = None,
    overflow: Overflow = "crop",
) -> GenerationCall:
    """The call of `mygpt.generate` for a (B, T) int64 tensor of ids; see there for the arguments.

    Raises:
        InputError: for a value outside its range, naming the range (a ValueError).
    """
    _check(model, prompt_ids, max_new_tokens, seed, overflow)
    sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty)
    seed = None if seed is None else int(seed)
    return GenerationCall(model, prompt_ids, int(max_new_tokens), sampling, seed, overflow)


def stream(call: GenerationCall) -> Iterator[torch.Tensor]:
    """The new tokens, (B,) int64 a step; nothing is computed before the first is asked for."""
    for block in call.new_tokens(fastest_decoder(call), 1):
        yield block[:, 0]


def _check(model: Any, prompt_ids: Any, max_new_tokens: Any, seed: Any, overflow: Any) -> None:
    """Raise `InputError` for an argument outside its range, but for those of sampling."""
    _check_prompt(model, prompt_ids)
    require_int("max_new_tokens", max_new_tokens, least=0)
    if seed is not None:
        check_seed(seed)
    require_choice("overflow", overflow, OVERFLOW_POLICIES)
    check_prompt_fits(prompt_ids.shape[1], model.max_seq_len, overflow)


def _check_prompt(model: Any, prompt_ids: Any) -> None:
    """Raise `InputError` for something that is no model, or no (B, T) tensor of its ids."""
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "max_seq_len"):
        raise InputError(
            f"model is a {type(model).__name__}: give a GPT, or a torch module with max_seq_len"
        )
    if not isinstance(prompt_ids, torch.Tensor):
        raise InputError(
            f"prompt_ids must be a (B, T) int64 tensor, not {type(prompt_ids).__name__}: "
            "torch.tensor([[0, 1]]) is one prompt of two ids, and in mygpt.generate [0, 1] too"
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
        lowest, highest = int(prompt_ids.min()), int(prompt_ids.max())
        if lowest < 0 or highest >= vocab_size:
            raise InputError(
                f"prompt_ids has id {lowest if lowest < 0 else highest}: "
                f"this model's ids are 0 to {vocab_size - 1}"
            )


def fastest_decoder(call: GenerationCall) -> Decoder | LoopDecoder:
    """Machine code where it computes what the model does and compiling it is worth it."""
    if call.steps == 0 or len(call.prompt_ids) == 0:
        return _NothingToDraw(call.prompt_ids)
    parameters = packable_parameters(call.model)
    from_torch = call.seed is None and call.sampling.temperature >= GREEDY_BELOW
    if parameters is None or (from_torch and not is_exponential_race()):
        return call.torch_decoder()
    config, (rows, length) = call.model.config, call.prompt_ids.shape
    reads = tokens_to_read(length, call.steps, config.max_seq_len, call.overflow)
    choice = choose_engine(config, tokens=rows * call.steps, reads=rows * reads, device="cpu")
    if choice.name != "cpu":
        return call.torch_decoder()
    requests = [
        Request(prompt, call.steps, call.sampling, row_stream, call.overflow)
        for prompt, row_stream in zip(
            call.prompt_ids.cpu().numpy(), call.streams or [Stream(0)] * rows, strict=True
        )
    ]
    decoding = cpu_engine_of(call.model, parameters).start(requests)
    return CpuDecoder(decoding, (rows, config.vocab_size) if from_torch else None)


class _NothingToDraw:
    """The decoder of a call without rows or without steps, which no model reads."""

    def __init__(self, prompt_ids: torch.Tensor) -> None:
        self._prompt_ids = prompt_ids

    def advance(self, count: int) -> torch.Tensor:
        """(B, count) int64, of which B or `count` is 0."""
        return self._prompt_ids.new_empty(len(self._prompt_ids), count)


class CpuDecoder:
    """Draws in machine code; see `mygpt.core.generation.LoopDecoder`.

    Args:
        decoding: the rows, which draw from their own streams of random numbers, or by argmax.
        race: None, or (B, V) to draw what `torch.multinomial` would draw from the global generator.
    """

    def __init__(self, decoding: CpuDecoding, race: tuple[int, int] | None) -> None:
        self.decoding = decoding
        self._race = race

    def advance(self, count: int) -> torch.Tensor:
        """(B, count) int64: the next tokens of each row."""
        if self._race is None:
            self.decoding.advance(count)
        else:
            self._advance_as_torch(count, *self._race)
        return torch.from_numpy(self.decoding.last_ids(count))

    def _advance_as_torch(self, count: int, rows: int, vocab_size: int) -> None:
        while count > 0:
            noise = torch.empty(min(count, self.decoding.steps_of_a_run), rows, vocab_size)
            for step in noise:  # a call for all steps would give other numbers
                step.exponential_()
            self.decoding.race(noise.numpy())
            count -= len(noise)


@functools.cache
def is_exponential_race() -> bool:
    """Whether this torch draws one token by the exponential race; checked once a process.

    `torch.multinomial` draws noise q from Exp(1) and takes the argmax of p / q. Where it does,
    asking torch for the noise alone takes a fifth of the time, and gives the same token and
    leaves the generator in the same state. The check leaves the generator as it was.
    """
    before = torch.get_rng_state()
    try:
        for rows, tokens in ((1, 4), (1, 65), (3, 50), (2, 1000)):
            p = torch.rand(rows, tokens).softmax(dim=-1)
            start = torch.get_rng_state()
            expected = torch.multinomial(p, num_samples=1)[:, 0]
            after = torch.get_rng_state()
            torch.set_rng_state(start)
            raced = (p / torch.empty_like(p).exponential_()).argmax(dim=-1)
            if not torch.equal(raced, expected) or not torch.equal(torch.get_rng_state(), after):
                return False
    finally:
        torch.set_rng_state(before)
    return True
