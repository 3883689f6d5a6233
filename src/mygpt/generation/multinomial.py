"""The tutorial's draw, `torch.multinomial` from the global generator, at a compiled step's pace.

torch draws one token as an exponential race: noise q from Exp(1), then the argmax of p / q.
Calling torch for the noise alone takes a fifth of the time of `torch.multinomial`, and gives
the same token and leaves the generator in the same state. That it does is checked once a
process; a torch that draws otherwise is asked for the whole draw.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mygpt.engines.cpu import CpuDecoding


def draws(decoding: CpuDecoding, steps: int) -> Iterator[None]:
    """Append to each row, step by step, what `torch.multinomial` draws from its probabilities."""
    if not races():
        for _ in range(steps):
            probabilities = torch.from_numpy(decoding.weigh())
            decoding.push(torch.multinomial(probabilities, num_samples=1)[:, 0].numpy())
            yield
        return
    yield from decoding.race(steps, torch.from_numpy(decoding.noise).exponential_)


@functools.cache
def races() -> bool:
    """Whether this torch draws one token by the exponential race; leaves the generator alone."""
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
