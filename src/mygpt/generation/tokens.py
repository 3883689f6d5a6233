"""`mygpt.generate` and `mygpt.stream`: `core.generation` with the fastest decoder.

Letters: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from mygpt.core import generation
from mygpt.core.config import GREEDY_BELOW, SamplingConfig
from mygpt.core.generation import Decoder, GenerationCall, new_tokens
from mygpt.core.random import Stream
from mygpt.core.window import Overflow
from mygpt.engines.choice import choose, tokens_to_read
from mygpt.engines.contract import Request
from mygpt.generation.packing import cpu_engine_of, packable_parameters

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

    This is `mygpt.core.generation.generate`, which describes the arguments, with the fastest
    decoder for the model and the length: machine code on the CPU, or torch.

    Returns:
        (B, T + max_new_tokens) int64 on the prompt's device, prompt included; shorter only
        where "stop" ended it.

    Raises:
        InputError: for a value outside its range, naming the range (a ValueError).
    """
    return generation.generate(
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
        make_decoder=fastest_decoder,
    )


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
    call = GenerationCall.checked(model, prompt_ids, max_new_tokens, sampling, seed, overflow)
    return (block[:, 0] for block in new_tokens(call, fastest_decoder, 1))


def fastest_decoder(call: GenerationCall) -> Decoder:
    """Machine code where it computes what the model does and compiling it is worth it."""
    parameters = packable_parameters(call.model)
    if parameters is None:
        return call.torch_decoder()
    config, (rows, length) = call.model.config, call.prompt_ids.shape
    reads = tokens_to_read(length, call.max_new_tokens, config.max_seq_len, call.overflow)
    choice = choose(config, tokens=rows * call.max_new_tokens, reads=rows * reads, device="cpu")
    if choice.name != "cpu":
        return call.torch_decoder()
    requests = [
        Request(prompt, call.max_new_tokens, call.sampling, row_stream, call.overflow)
        for prompt, row_stream in zip(
            call.prompt_ids.cpu().numpy(), call.streams or [Stream(0)] * rows, strict=True
        )
    ]
    decoding = cpu_engine_of(call.model, parameters).start(requests)
    if call.streams is not None or call.sampling.temperature < GREEDY_BELOW:
        return CpuSeeded(decoding)
    if is_exponential_race():
        return CpuMultinomial(decoding, call.max_new_tokens)
    return CpuLogits(decoding)


class CpuLogits:
    """Logits from machine code; torch draws (see `mygpt.core.generation.Decoder`)."""

    def __init__(self, decoding: CpuDecoding) -> None:
        self.decoding = decoding
        self._length: int | None = None

    def next_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, V) float32; `ids` are the prompt, and later one token more at each call."""
        if self._length is not None:
            self.decoding.push(ids[:, -1].numpy())
        self._length = ids.shape[1]
        return torch.from_numpy(self.decoding.next_logits())


class CpuSeeded(CpuLogits):
    """Draws in machine code with each row's own stream of random numbers, or by argmax."""

    def advance(self, count: int) -> torch.Tensor:
        """(B, count) int64; see `mygpt.core.generation.LoopDecoder`."""
        self.decoding.advance(count)
        return torch.from_numpy(self.decoding.last_ids(count))


class CpuMultinomial(CpuLogits):
    """Draws in machine code what `torch.multinomial` would draw from the global generator."""

    def __init__(self, decoding: CpuDecoding, steps: int) -> None:
        super().__init__(decoding)
        self._steps = decoding.race(steps, torch.from_numpy(decoding.noise).exponential_)

    def advance(self, count: int) -> torch.Tensor:
        """(B, count) int64; see `mygpt.core.generation.LoopDecoder`."""
        for _ in range(count):
            next(self._steps)
        return torch.from_numpy(self.decoding.last_ids(count))


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
