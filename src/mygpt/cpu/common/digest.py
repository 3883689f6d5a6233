"""A digest of a model's weights in place, which shows whether any of them has changed."""

from __future__ import annotations

import numpy as np

from mygpt.cpu.common.simd import INT64, WORDS, ints, kernel, words

# 2**32 / golden ratio, odd: products with 0, 1, 2, ... are spread evenly (Knuth, The Art of
# Computer Programming, volume 3, 6.4). Position i of a word is mixed in by it, so that two words
# that change places change the sum.
_PLACE = np.uint32(0x9E3779B1)
# The finaliser of MurmurHash3 (Appleby, 2011), with its two factors and its shifts of 16, 13 and 16
# bits: each bit of a word influences each bit of its hash. It maps words one to one, so a change of
# one word always changes the sum; changes of several cancel with probability 2**-32.
_FACTOR_1, _FACTOR_2 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_13, _16 = np.uint32(13), np.uint32(16)


@kernel(WORDS, INT64, returns=INT64)
def _digest_array(data, size):
    """The sum of the hashes of all words, each with its position; modulo 2**32."""
    # A sum, not a chain in which each hash depends on the one before: so the loop vectorises, and
    # the digest of all weights at each call costs one pass over the memory.
    total = np.uint32(0)
    for i in range(size):
        h = np.uint32(np.uint32(data[i]) ^ np.uint32(np.uint32(i) * _PLACE))
        h = np.uint32(np.uint32(h ^ (h >> _16)) * _FACTOR_1)
        h = np.uint32(np.uint32(h ^ (h >> _13)) * _FACTOR_2)
        total = np.uint32(total + np.uint32(h ^ (h >> _16)))
    return np.int64(total)


@kernel(INT64, INT64, returns=INT64)
def digest(table_address, count):
    """A hash of `count` arrays of 32-bit words; the table holds address and words of each."""
    table = ints(table_address)
    total = np.int64(0)
    for number in range(count):
        # The prime of 64-bit FNV (Fowler, Noll & Vo): a polynomial, in which the order counts.
        total = total * np.int64(0x100000001B3) + _digest_array(
            words(table[2 * number]), table[2 * number + 1]
        )
    return total
