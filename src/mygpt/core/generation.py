"""Generation: from token ids to more token ids (chapter 15).

First the loop of section 15.1; then this loop with any decoder and any way of drawing; then the
protocols that fast decoders implement, two decoders in torch, and `generate` of section 15.7.
Letters: B batch (rows), T tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mygpt.core.config import SamplingConfig
from mygpt.core.kv_cache import KVCache
from mygpt.core.model import GPT, evaluating
from mygpt.core.random import Stream
from mygpt.core.sampling import next_ids
from mygpt.core.window import Overflow, Window


def autoregressive_loop(
    model: Any,
    prompt_ids: Tensor,
    max_new_tokens: int,
    pick_one: Callable[[Tensor], Tensor],
) -> Tensor:
    """The loop of section 15.1, line by line; `pick_one` maps logits (B, V) to ids (B, 1)."""
    ids = prompt_ids
    for _ in range(max_new_tokens):
        logits, _ = model(ids)  # (B, T, V)
        next_logits = logits[:, -1, :]  # (B, V): the prediction after the last position
        new_ids = pick_one(next_logits)  # (B, 1)
        ids = torch.cat([ids, new_ids], dim=1)  # (B, T + 1)
    return ids


def decode(
    decoder: Decoder,
    prompt_ids: Tensor,
    max_new_tokens: int,
    sampling: SamplingConfig,
    streams: list[Stream] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The loop of section 15.1 with any decoder and any way of drawing.

    `streams` are each row's random numbers; None: torch's global generator. Yields at each step
    the new ids (B,) int64 and the logits (B, V) that they were drawn from.
    """
    rows, length = prompt_ids.shape
    text = prompt_ids.new_empty(rows, length + max_new_tokens)
    text[:, :length] = prompt_ids
    for step in range(max_new_tokens):
        ids = text[:, : length + step]  # (B, T), no copy
        next_logits = decoder.next_logits(ids)  # (B, V)
        new_ids = next_ids(next_logits, sampling, ids, streams, step)  # (B,)
        text[:, length + step] = new_ids
        yield new_ids, next_logits


class Decoder(Protocol):
    """Predicts the next token of texts that grow by one token at each call.

    It may keep state between calls, as a KV cache does. Earlier tokens never change; which of them
    it reads past the window is a `Window` of its own.
    """

    def next_logits(self, ids: Tensor) -> Tensor:
        """Logits (B, V) of the token after `ids` (B, T) int64, all text so far."""
        ...


@runtime_checkable
class LoopDecoder(Protocol):
    """Draws as well, so that the whole loop can run as machine code."""

    def advance(self, count: int) -> Tensor:
        """Draw `count` tokens for each row and append them: (B, count) int64."""
        ...


class UncachedDecoder:
    """Reads the whole window for every token, as the chapter does.

    The model is any module whose forward returns (logits, anything). `CachedDecoder` is tested
    against this.
    """

    def __init__(self, model: Any, overflow: Overflow = "crop") -> None:
        self.model = model
        self.window = Window(model.max_seq_len, overflow)

    def next_logits(self, ids: Tensor) -> Tensor:
        """See `Decoder`."""
        visible = ids[:, self.window.start(ids.shape[1]) :]
        with evaluating(self.model):
            logits, _ = self.model(visible.contiguous())  # a model may call `view` on its input
        return logits[:, -1, :]


class CachedDecoder:
    """Reads each token once: keys and values of earlier tokens are in a cache.

    `positions` is the first capacity of the cache in tokens; None: see `positions_for`.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int,
        overflow: Overflow = "crop",
        positions: int | None = None,
    ) -> None:
        self.model = model
        weight = model.token_embedding.weight
        self.cache = KVCache.empty(
            model.config,
            batch_size,
            device=weight.device,
            dtype=weight.dtype,
            positions=positions,
        )
        self.window = Window(model.max_seq_len, overflow)
        self._start = 0  # index in the text of the cache's first token

    def next_logits(self, ids: Tensor) -> Tensor:
        """See `Decoder`."""
        start = self.window.start(ids.shape[1])
        if start != self._start:  # every token has another position now
            self._start = start
            self.cache.length = 0
        unread = ids[:, start + self.cache.length :]  # the prompt; later one token
        with evaluating(self.model):
            return self.read(unread)

    def read(self, ids: Tensor) -> Tensor:
        """Logits (B, V) after `ids` (B, T), which follow the tokens in the cache and join it."""
        logits, _ = self.model(ids, cache=self.cache, last_only=True)
        return logits[:, -1, :]


def torch_decoder(
    model: Any, batch_size: int, overflow: Overflow, positions: int | None = None
) -> Decoder:
    """A `CachedDecoder` where the model is a `GPT` with its own forward, else without a cache."""
    if uses_standard_forward(model):
        return CachedDecoder(model, batch_size, overflow, positions)
    return UncachedDecoder(model, overflow)


def uses_standard_forward(model: Any) -> bool:
    """Whether this is a `GPT` whose forward was not replaced."""
    return (
        isinstance(model, GPT)
        and type(model).forward is GPT.forward
        and "forward" not in vars(model)
    )


@dataclass(frozen=True)
class GenerationCall:
    """The arguments of one call of `generate`, from which its decoder is made."""

    model: Any
    prompt_ids: Tensor  # (B, T) int64
    max_new_tokens: int
    sampling: SamplingConfig
    seed: int | None
    overflow: Overflow

    @property
    def steps(self) -> int:
        """The number of new tokens a row: "stop" ends where the window is full."""
        if self.overflow != "stop":
            return self.max_new_tokens
        left = self.model.max_seq_len - self.prompt_ids.shape[1]
        return max(0, min(self.max_new_tokens, left))

    @property
    def streams(self) -> list[Stream] | None:
        """Each row's random numbers; None: torch's global generator."""
        if self.seed is None:
            return None
        return [Stream(self.seed, row) for row in range(len(self.prompt_ids))]

    def torch_decoder(self) -> Decoder:
        """The decoder of this file for the call."""
        rows, length = self.prompt_ids.shape
        return torch_decoder(self.model, rows, self.overflow, length + self.steps)

    def new_tokens(self, decoder: Decoder | LoopDecoder, most: int) -> Iterator[Tensor]:
        """The new tokens (B, n) in blocks: of one step, or of `most` where the decoder draws."""
        if isinstance(decoder, LoopDecoder):
            for done in range(0, self.steps, most):
                yield decoder.advance(min(most, self.steps - done))
            return
        loop = decode(decoder, self.prompt_ids, self.steps, self.sampling, self.streams)
        for new_ids, _ in loop:
            yield new_ids[:, None]

    def result(self, decoder: Decoder | LoopDecoder) -> Tensor:
        """What `generate` returns, (B, T + new tokens) int64, with this decoder."""
        blocks = self.new_tokens(decoder, max(1, self.max_new_tokens))
        return torch.cat([self.prompt_ids, *blocks], dim=1)


def generate(
    model: Any,
    prompt_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    *,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    overflow: Overflow = "crop",
) -> Tensor:
    """Append `max_new_tokens` tokens to each row of `prompt_ids` (section 15.7).

    Args:
        model: a `GPT`, or a module whose forward returns (logits, anything), with `max_seq_len`.
        prompt_ids: (B, T) int64; longer than the window is fine.
        max_new_tokens: how many tokens to append.
        temperature, top_k, top_p, min_p, repetition_penalty: see `SamplingConfig`.
        seed: None draws from torch's global generator, as the chapter does; with a seed, row i
            draws with `Stream(seed, i)`: the same text for any batch size.
        overflow: what to read past the window (see `Window`).

    Returns:
        (B, T + max_new_tokens) int64, prompt included; shorter only where "stop" ended it.
    """
    sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty)
    call = GenerationCall(model, prompt_ids, max_new_tokens, sampling, seed, overflow)
    return call.result(call.torch_decoder())
