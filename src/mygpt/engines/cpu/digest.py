"""A digest of a model's numbers where they lie, to notice that any of them was changed."""

from __future__ import annotations

import numpy as np

from mygpt.engines.cpu.simd import WHOLE, WORDS, ints, kernel, words

# Any odd numbers do; these are the golden ratio's and FNV's.
_PLACE, _FACTOR = np.uint32(0x9E3779B1), np.uint32(0x01000193)
_SHIFT = np.uint32(15)


@kernel(WORDS, WHOLE, returns=WHOLE)
def _digest_array(data, size):
    """The sum of every word's own hash, which depends on its place too: it vectorises."""
    total = np.uint32(0)
    for i in range(size):
        mixed = np.uint32((np.uint32(data[i]) ^ np.uint32(np.uint32(i) * _PLACE)) * _FACTOR)
        total = np.uint32(total + np.uint32(np.uint32(mixed ^ (mixed >> _SHIFT)) * _PLACE))
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
