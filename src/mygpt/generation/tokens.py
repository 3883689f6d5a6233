"""`generate` and `stream`: from token ids to more token ids.

Letters: B batch, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mygpt.config import Overflow, SamplingConfig, check_max_new_tokens, check_overflow
from mygpt.engines.torch_engine import CachedEngine, Engine, PlainEngine
from mygpt.errors import InputError
from mygpt.model import GPT
from mygpt.randomness import Stream
from mygpt.sampling import next_ids


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
            `max_seq_len`. It is left in eval mode.
        prompt_ids: (B, T) int64; longer than the window is fine.
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
    new = list(
        stream(
            model,
            prompt_ids,
            max_new_tokens,
            temperature,
            top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            overflow=overflow,
        )
    )
    return torch.cat([prompt_ids, torch.stack(new, dim=1)], dim=1) if new else prompt_ids.clone()


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
    _check_prompt(model, prompt_ids)
    streams = None if seed is None else [Stream(seed, i) for i in range(prompt_ids.shape[0])]
    steps = decode(model, prompt_ids, max_new_tokens, sampling, streams, overflow)
    return (step.ids for step in steps)


def _check_prompt(model: Any, prompt_ids: torch.Tensor) -> None:
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


@dataclass(frozen=True)
class Step:
    """One step of decoding: the tokens drawn, (B,) int64, and the logits (B, V) behind them."""

    ids: torch.Tensor
    logits: torch.Tensor


def decode(
    model: Any,
    prompt_ids: torch.Tensor,
    max_new_tokens: int,
    sampling: SamplingConfig,
    streams: Sequence[Stream] | None,
    overflow: Overflow,
) -> Iterator[Step]:
    """The steps of writing `max_new_tokens` after `prompt_ids`; checks at once, works lazily."""
    check_max_new_tokens(max_new_tokens)
    check_overflow(overflow)
    length = prompt_ids.shape[1]
    if overflow == "stop":
        if length > model.max_seq_len:
            raise InputError(
                f"the prompt has {length} tokens and the window {model.max_seq_len}: shorten it, "
                "or choose overflow crop or refill"
            )
        max_new_tokens = min(max_new_tokens, model.max_seq_len - length)
    model.eval()
    return _steps(model, prompt_ids, max_new_tokens, sampling, streams, overflow)


def _steps(
    model: Any,
    prompt_ids: torch.Tensor,
    max_new_tokens: int,
    sampling: SamplingConfig,
    streams: Sequence[Stream] | None,
    overflow: Overflow,
) -> Iterator[Step]:
    engine = choose_engine(model, prompt_ids.shape[0], overflow)
    batch, length = prompt_ids.shape
    text = prompt_ids.new_empty(batch, length + max_new_tokens)
    text[:, :length] = prompt_ids
    for step in range(max_new_tokens):
        so_far = text[:, : length + step]
        with torch.no_grad():
            logits = engine.next_logits(so_far)
            ids = next_ids(logits, sampling, so_far, streams, step)
        text[:, length + step] = ids
        yield Step(ids, logits)


def choose_engine(model: Any, batch_size: int, overflow: Overflow) -> Engine:
    """The engine that decodes this model: cached for our own forward, else the plain loop."""
    own = isinstance(model, GPT) and type(model).forward is GPT.forward
    if own and "forward" not in vars(model):
        return CachedEngine(model, batch_size, overflow)
    return PlainEngine(model, overflow)
