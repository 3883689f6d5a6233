"""Matrix products, all made of tiles that keep one order of addition for any number of rows.

A weight with N outputs is stored in panels (picture below), so that one row times the matrix reads
memory from one end to the other.
Letters: C inner dimension (depth), N outputs.
"""

from __future__ import annotations

from typing import Any

from mygpt.cpu.common import layout as at
from mygpt.cpu.common.arithmetic import padded
from mygpt.cpu.common.simd import BYTES, FLOATS, INT64, kernel, skip
from mygpt.cpu.common.tile import make_tile

# A weight (N, C), as torch has it, is packed into panels of P = PANEL outputs:
#
#     weight (N, C)               packed, from left to right in memory
#      k = 0 1 ... C-1            (each box: the weights of all the panel's outputs for one k)
#     +---------------+ n = 0     +-------+-------+-----+---------+
#     |    panel 0    |           | k = 0 | k = 1 | ... | k = C-1 |  P numbers a box
#     +---------------+ P         +-------+-------+-----+---------+
#     |    panel 1    |           | k = 0 | k = 1 | ... | k = C-1 |  P numbers a box
#     +---------------+ 2P        +-------+-------+-----+---------+
#     | panel 2, last |           | k = 0 | k = 1 | ... | k = C-1 |  N - 2P numbers a box, rounded
#     +---------------+ N         +-------+-------+-----+---------+  up to whole vectors by zeros
#
# So element (n, k) of a full panel is at (n // P) * P * C + k * P + n % P, and a tile's step k
# (see `tile`) loads up to VECTORS vectors that follow each other, then step k + 1 the next ones.
# After Goto & van de Geijn, "Anatomy of high-performance matrix multiplication", 2008.

# Inner products are summed in pieces of this depth: 512 x 64 float32 are 128 KiB of a panel, which
# stay in the second-level cache while all rows pass over them. A row's sum is (piece 0) + (piece
# 1) + ..., for one row and for many, so the depth is part of a result's last bits.
DEPTH_BLOCK = 512
# Up to so many rows a matrix of float32 is multiplied by tall tiles, which read memory faster. With
# more rows arithmetic takes most of the time: on a Zen 3 lower tiles do 92 GFLOP/s, tall ones 82.
_FEW_ROWS = 24

_tile = make_tile(quantized=False)
_outer_tile = make_tile(quantized=False, transposed=True)


@kernel(FLOATS, INT64, FLOATS, INT64, FLOATS, INT64, INT64, INT64, INT64)
def product(y, y_stride, x, x_stride, w, w_stride, rows, depth, columns):
    """y (rows, columns) = x (rows, depth) w (depth, columns); LANES divides `columns`.

    w is row-major, not packed: its rows are `w_stride` apart.
    """
    # The place of `scales` is taken by any pointer (y): float32 tiles do not read it.
    for first in range(0, columns, at.PANEL):
        vectors = min(at.PANEL, columns - first) // at.LANES
        for k in range(0, depth, DEPTH_BLOCK):
            for row in range(0, rows, at.ROWS):
                _tile(
                    skip(y, row * y_stride + first), y_stride, skip(x, row * x_stride + k),
                    x_stride, skip(w, k * w_stride + first), w_stride,
                    min(DEPTH_BLOCK, depth - k), y, min(at.ROWS, rows - row), vectors, k,
                )  # fmt: skip


@kernel(FLOATS, INT64, FLOATS, INT64, INT64, FLOATS, INT64, INT64, INT64)
def add_outer(y, y_stride, a, a_stride, a_columns, b, b_stride, b_columns, rows):
    """y (a_columns, b_columns) += a^T b, summed over `rows` rows; LANES divides b_columns."""
    # A sum of outer products, one a row. The depth is not cut: a chunk has few rows.
    for first in range(0, b_columns, at.PANEL):
        vectors = min(at.PANEL, b_columns - first) // at.LANES
        for m in range(0, a_columns, at.ROWS):
            out = skip(y, m * y_stride + first)
            high = min(at.ROWS, a_columns - m)
            _outer_tile(
                out, y_stride, skip(a, m), a_stride, skip(b, first), b_stride, rows, out, high,
                vectors, 1,
            )  # fmt: skip


def _packed_product(*, quantized: bool) -> Any:
    """The kernel that multiplies with a packed matrix of float32, or of int8 with scales."""
    tile = make_tile(quantized=quantized, tall=not quantized)
    numbers, few = (BYTES, 0) if quantized else (FLOATS, _FEW_ROWS)

    @kernel(FLOATS, INT64, FLOATS, INT64, INT64, numbers, FLOATS, INT64, INT64, INT64)
    def multiply(y, y_stride, x, x_stride, rows, panels, scales, outputs, depth, adding):
        # Panels outside, depth inside, rows innermost: a piece of a panel is read from memory once
        # and used for all rows; y's tiles are loaded and stored again for each piece of the depth.
        end = padded(outputs)
        for first in range(0, end, at.PANEL):
            width = min(at.PANEL, end - first)
            height = at.TALL_ROWS if rows <= few and width == at.PANEL else at.ROWS
            for k in range(0, depth, DEPTH_BLOCK):
                # All panels before this one are PANEL wide; in this one a row k is `width` long.
                w = skip(panels, first * depth + k * width)
                keep = 1 if k > 0 else adding  # later pieces are added to the first
                for row in range(0, rows, height):
                    tile(
                        skip(y, row * y_stride + first), y_stride, skip(x, row * x_stride + k),
                        x_stride, w, width, min(DEPTH_BLOCK, depth - k), skip(scales, first),
                        min(height, rows - row), width // at.LANES, keep,
                    )  # fmt: skip

    return multiply


# y (rows, N padded to whole vectors) = x w, or y += x w, for a packed w (C, N). `scales` (N,) are
# read by the second only.
multiply = _packed_product(quantized=False)
multiply_int8 = _packed_product(quantized=True)


@kernel(FLOATS, INT64, INT64, FLOATS, INT64, INT64)
def set_bias(y, y_stride, rows, bias, outputs, adding):
    """Set the first `outputs` columns of y to the bias, or add the bias to them."""
    for row in range(rows):
        out = skip(y, row * y_stride)
        if adding:
            for i in range(outputs):
                out[i] += bias[i]
        else:
            for i in range(outputs):
                out[i] = bias[i]


@kernel(FLOATS, INT64, FLOATS, INT64, INT64, INT64)
def transpose(out, out_stride, x, x_stride, rows, columns):
    """out (columns, rows) = x (rows, columns) transposed."""
    for row in range(rows):
        own = skip(x, row * x_stride)
        for column in range(columns):
            out[column * out_stride + row] = own[column]
