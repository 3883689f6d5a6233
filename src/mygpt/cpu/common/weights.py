"""What is done with weights in place: packed into panels (see `matmul`), and a digest of them."""

from __future__ import annotations

import numpy as np

from mygpt.cpu.common import layout as at
from mygpt.cpu.common.arithmetic import PLACE, hash32, padded
from mygpt.cpu.common.simd import FLOATS, INT64, WORDS, floats, ints, kernel, skip, words

# A transposition either reads or writes with a long stride. In blocks of 16 x 16 both sides stay
# within 16 cache lines (16 float32 are one line of 64 bytes), so each line is fetched once. Larger
# blocks would not: rows whose distance is a power of two fall on the same few places of a cache.
_BLOCK = 16


@kernel(FLOATS, FLOATS, INT64, INT64, INT64)
def _fill_panel(panel, rows, count, width, depth):
    """panel (C, width) = rows (count, C) transposed; columns past `count` stay as they are."""
    for k in range(0, depth, _BLOCK):
        for n in range(0, count, _BLOCK):
            for line in range(k, min(k + _BLOCK, depth)):
                for column in range(n, min(n + _BLOCK, count)):
                    panel[line * width + column] = rows[column * depth + line]


@kernel(FLOATS, FLOATS, INT64, INT64)
def pack_panels(panels, rows, outputs, depth):
    """panels = a matrix `rows` (N, C), as the left picture in `matmul` becomes the right one."""
    # The last panel has fewer outputs and is narrower; the caller has zeroed its columns between
    # the outputs and the next whole vector.
    for first in range(0, outputs, at.PANEL):
        here, width = min(at.PANEL, outputs - first), min(at.PANEL, padded(outputs) - first)
        _fill_panel(skip(panels, first * depth), skip(rows, first * depth), here, width, depth)


@kernel(INT64, INT64, returns=INT64)
def pack_matrices(table_address, count):
    """Pack `count` matrices.

    The table has four int64 for each: the address of its rows (N, C), that of the buffer for its
    panels, N and C.
    """
    for number in range(count):
        entry = skip(ints(table_address), 4 * number)
        pack_panels(floats(entry[1]), floats(entry[0]), entry[2], entry[3])
    return 0


@kernel(WORDS, INT64, returns=INT64)
def _digest_array(data, size):
    """The sum of the hashes of all words, each with its position; modulo 2**32."""
    # A sum, not a chain in which each hash depends on the one before: so the loop vectorises, and
    # the digest of all weights at each call costs one pass over the memory. The position is mixed
    # in, so that two words that change places change the sum. A change of one word always changes
    # it; changes of several cancel with probability 2**-32.
    total = np.uint32(0)
    for i in range(size):
        h = hash32(np.uint32(np.uint32(data[i]) ^ np.uint32(np.uint32(i) * PLACE)))
        total = np.uint32(total + h)
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
