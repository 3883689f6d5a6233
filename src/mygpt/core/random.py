"""Random numbers as functions of (seed, index, step): a counter-based generator.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) maps a key and
a counter to 128 random bits. The key is the seed, the counter says what the number is for. So
the draw of sample i at step t is the same whatever else is drawn, and the order of the data at
any step is known without the steps before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError

# The counter's third word: what the number is for.
DRAW_TOKEN, SHUFFLE_ROUND, EPOCH_OFFSET = 1, 2, 3

_MULTIPLIERS, _WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)  # the paper's
_LOW = 0xFFFFFFFF

Words = NDArray[np.uint64]


def philox(seed: int, counter: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Ten rounds of Philox4x32: 128 random bits from a seed and a counter.

    Args:
        seed: the key, 64 bits.
        counter: four words of 32 bits: whole numbers, or uint64 arrays of any one shape.

    Returns:
        Four words of 32 random bits, of the counter's type.
    """
    x0, x1, x2, x3 = counter
    key_0, key_1 = seed & _LOW, seed >> 32
    for _ in range(10):
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1 = (p1 >> 32) ^ x1 ^ key_0, p1 & _LOW
        x2, x3 = (p0 >> 32) ^ x3 ^ key_1, p0 & _LOW
        key_0, key_1 = (key_0 + _WEYL[0]) & _LOW, (key_1 + _WEYL[1]) & _LOW
    return x0, x1, x2, x3


def check_seed(seed: Any) -> int:
    """`seed` as an int; `InputError` unless it is a whole number that fits in 64 bits."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**64:
        raise InputError(f"seed={seed!r} must be a whole number from 0 to 2**64 - 1")
    return int(seed)


def _uniform(seed: int, first: int, second: int, purpose: int) -> float:
    """One number in [0, 1) with 53 random bits."""
    x0, x1, _, _ = philox(seed, (first, second & _LOW, purpose, second >> 32))
    return float(((x0 >> 5) * 2**26 + (x1 >> 6)) / 2**53)


@dataclass(frozen=True)
class Stream:
    """The random numbers of one sequence: number `index` of those that share `seed`."""

    seed: int
    index: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", check_seed(self.seed))
        if self.index < 0:
            raise InputError(f"index={self.index} of a stream must be at least 0")

    def uniform(self, step: int) -> float:
        """The number in [0, 1) that draws this sequence's new token number `step` (from 0)."""
        return _uniform(self.seed, step, self.index, DRAW_TOKEN)


def epoch_offset(seed: int, epoch: int, limit: int) -> int:
    """Where an epoch's first window starts: a whole number in [0, limit)."""
    return int(_uniform(seed, 0, epoch, EPOCH_OFFSET) * limit)


def permute(positions: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where each of `positions` (int64, in [0, size)) goes in an epoch's shuffle.

    A permutation of range(size) without a table: a Feistel network of six rounds, with Philox as
    its round function, on the smallest even number of bits that holds `size`; a result outside
    the range is permuted again (Black & Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    values = positions.astype(np.uint64)
    values = _feistel(values, half, seed, epoch)
    while True:
        outside = values >= size
        if not outside.any():
            return values.astype(np.int64)
        values[outside] = _feistel(values[outside], half, seed, epoch)


def _feistel(values: Words, half: np.uint64, seed: int, epoch: int) -> Words:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for round_number in range(6):
        mixed, *_ = philox(seed, (right, epoch, SHUFFLE_ROUND, round_number))
        left, right = right, left ^ (mixed & mask)
    return (left << half) | right
