"""A digest of a model's numbers where they lie, to notice that any of them was changed."""

from __future__ import annotations

import numpy as np

from mygpt.engines.cpu.simd import WHOLE, WORDS, ints, kernel, words

_PLACE = np.uint32(0x9E3779B1)  # the golden ratio's
# Every bit of a word acts on every bit of its hash: MurmurHash3's last step (Appleby, 2011).
_FACTOR_1, _FACTOR_2 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_13, _16 = np.uint32(13), np.uint32(16)


@kernel(WORDS, WHOLE, returns=WHOLE)
def _digest_array(data, size):
    """The sum of every word's own hash, which depends on its place too: it vectorises."""
    total = np.uint32(0)
    for i in range(size):
        h = np.uint32(np.uint32(data[i]) ^ np.uint32(np.uint32(i) * _PLACE))
        h = np.uint32(np.uint32(h ^ (h >> _16)) * _FACTOR_1)
        h = np.uint32(np.uint32(h ^ (h >> _13)) * _FACTOR_2)
        total = np.uint32(total + np.uint32(h ^ (h >> _16)))
    return np.int64(total)


@kernel(WHOLE, WHOLE, returns=WHOLE)
def digest(table_address, count):
    """A hash of `count` arrays of 32-bit words; the table holds address and words of each."""
    table = ints(table_address)
    total = np.int64(0)
    for number in range(count):
        total = total * np.int64(0x100000001B3) + _digest_array(
            words(table[2 * number]), table[2 * number + 1]
        )
    return total
