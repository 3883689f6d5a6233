"""Laying float32 matrices out in panels, at the memory's pace (see `matmul` for the layout)."""

from __future__ import annotations

from mygpt.engines.cpu import layout as at
from mygpt.engines.cpu.simd import FLOATS, WHOLE, floats, ints, kernel, skip

_BLOCK = 16  # rows and columns at a time: rows a power of two apart share few places in a cache


@kernel(FLOATS, FLOATS, WHOLE, WHOLE, WHOLE)
def fill_panel(panel, rows, count, width, depth):
    """panel (C, width) = rows (count, C) transposed; columns past `count` stay."""
    for k in range(0, depth, _BLOCK):
        for n in range(0, count, _BLOCK):
            for line in range(k, min(k + _BLOCK, depth)):
                for column in range(n, min(n + _BLOCK, count)):
                    panel[line * width + column] = rows[column * depth + line]


@kernel(WHOLE, WHOLE, returns=WHOLE)
def lay_panels(table_address, count):
    """Lay out `count` matrices.

    The table holds for each: the address of its rows (N, C), that of its room, N and C.
    """
    for number in range(count):
        entry = skip(ints(table_address), 4 * number)
        rows, room = floats(entry[0]), floats(entry[1])
        outputs, depth = entry[2], entry[3]
        padded = (outputs + at.LANES - 1) // at.LANES * at.LANES
        for first in range(0, outputs, at.PANEL):
            here = min(at.PANEL, outputs - first)
            width = min(at.PANEL, padded - first)
            fill_panel(skip(room, first * depth), skip(rows, first * depth), here, width, depth)
    return 0
