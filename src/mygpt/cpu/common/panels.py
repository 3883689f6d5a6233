"""Packing float32 matrices into panels as fast as memory allows (see `matmul` for the layout)."""

from __future__ import annotations

from mygpt.cpu.common import layout as at
from mygpt.cpu.common.simd import FLOATS, INT64, floats, ints, kernel, skip

# A transposition either reads or writes with a long stride. In blocks of 16 x 16 both sides stay
# within 16 cache lines (16 float32 are one line of 64 bytes), so each line is fetched once. Larger
# blocks would not: rows whose distance is a power of two fall on the same few places of a cache.
_BLOCK = 16


@kernel(FLOATS, FLOATS, INT64, INT64, INT64)
def fill_panel(panel, rows, count, width, depth):
    """panel (C, width) = rows (count, C) transposed; columns past `count` stay as they are."""
    for k in range(0, depth, _BLOCK):
        for n in range(0, count, _BLOCK):
            for line in range(k, min(k + _BLOCK, depth)):
                for column in range(n, min(n + _BLOCK, count)):
                    panel[line * width + column] = rows[column * depth + line]


@kernel(INT64, INT64, returns=INT64)
def pack_matrices(table_address, count):
    """Pack `count` matrices.

    The table has four int64 for each: the address of its rows (N, C), that of the buffer for its
    panels, N and C.
    """
    for number in range(count):
        entry = skip(ints(table_address), 4 * number)
        rows, buffer = floats(entry[0]), floats(entry[1])
        outputs, depth = entry[2], entry[3]
        padded = (outputs + at.LANES - 1) // at.LANES * at.LANES
        for first in range(0, outputs, at.PANEL):
            # The last panel has fewer outputs and is narrower; the caller has zeroed its columns
            # between the outputs and the next whole vector.
            here = min(at.PANEL, outputs - first)
            width = min(at.PANEL, padded - first)
            fill_panel(skip(buffer, first * depth), skip(rows, first * depth), here, width, depth)
    return 0
