"""The one counter-based stream of random numbers: draws are functions of where they stand.

Philox4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3",
2011) maps (key, counter) to 128 random bits. The key is the seed; the counter says what the
number is for. So sample i at step t is the same number whatever else was drawn, and the
order of the data at any step is known without replaying the steps before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError

# What a counter's third word says the number is for.
DRAW_TOKEN, SHUFFLE_ROUND, EPOCH_OFFSET = 1, 2, 3

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)

Words = NDArray[np.uint64]


def philox(seed: int, counter: tuple[Words, Words, Words, Words]) -> tuple[Words, ...]:
    """Ten rounds of Philox4x32 on four counter words of 32 bits (uint64 arrays, any shape).

    Returns four arrays of 32 random bits each, in uint64.
    """
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    x0, x1, x2, x3 = counter
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * x0, _MULTIPLIERS[1] * x2
        x0, x1, x2, x3 = (
            (p1 >> _32) ^ x1 ^ np.uint64(key[0]),
            p1 & _LOW,
            (p0 >> _32) ^ x3 ^ np.uint64(key[1]),
            p0 & _LOW,
        )
        key = [(word + weyl) & 0xFFFFFFFF for word, weyl in zip(key, _WEYL, strict=True)]
    return x0, x1, x2, x3


def check_seed(seed: Any) -> int:
    """`seed` as an int; `InputError` unless it is a whole number that fits in 64 bits."""
    # NumPy's integers are Integral too, and no int.
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**64:
        raise InputError(f"seed={seed!r} must be a whole number from 0 to 2**64 - 1")
    return int(seed)


def _uniform(seed: int, first: int, second: int, purpose: int) -> float:
    """One number in [0, 1) with 53 random bits; `philox` on Python's whole numbers, for speed."""
    x0, x1, x2, x3 = first, second & 0xFFFFFFFF, purpose, second >> 32
    key_0, key_1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1 = (p1 >> 32) ^ x1 ^ key_0, p1 & 0xFFFFFFFF
        x2, x3 = (p0 >> 32) ^ x3 ^ key_1, p0 & 0xFFFFFFFF
        key_0, key_1 = (key_0 + _WEYL[0]) & 0xFFFFFFFF, (key_1 + _WEYL[1]) & 0xFFFFFFFF
    return ((x0 >> 5) * 2**26 + (x1 >> 6)) / 2**53


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


def fresh_seed() -> int:
    """A seed from the operating system, short enough to be read aloud (32 bits)."""
    import secrets

    return secrets.randbits(32)


def epoch_offset(seed: int, epoch: int, limit: int) -> int:
    """Where an epoch's first window starts: a whole number in [0, limit)."""
    return int(_uniform(seed, 0, epoch, EPOCH_OFFSET) * limit)


def permute(positions: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where each of `positions` (int64, in [0, size)) goes in an epoch's shuffle.

    A permutation of range(size) that needs no table: a six-round Feistel network with Philox
    as its round function on the smallest even number of bits that holds `size`, walked again
    wherever it leaves the range (Black & Rogaway, "Ciphers with arbitrary finite domains",
    2002).
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
        counter = (
            right,
            np.full_like(right, epoch),
            np.full_like(right, SHUFFLE_ROUND),
            np.full_like(right, round_number),
        )
        left, right = right, left ^ (philox(seed, counter)[0] & mask)
    return (left << half) | right
