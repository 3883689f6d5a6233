"""Rows times a packed matrix, in tiles that keep one order of addition for any number of rows.

A matrix with N outputs is stored in panels (picture below), so that one row times the matrix reads
memory from one end to the other.
Letters: C inner dimension (depth), N outputs.
"""

from __future__ import annotations

from mygpt.cpu.common import layout as at
from mygpt.cpu.common.arithmetic import f32, part_start
from mygpt.cpu.common.simd import (
    BYTES,
    FLOATS,
    INT64,
    INTS,
    floats,
    int8s,
    kernel,
    make_tiles,
    skip,
)

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
# (see `simd`) loads up to VECTORS vectors that follow each other, then step k + 1 the next ones.
# After Goto & van de Geijn, "Anatomy of high-performance matrix multiplication", 2008.

# Inner products are summed in pieces of this depth: 512 x 64 float32 are 128 KiB of a panel, which
# stay in the second-level cache while all rows pass over them. A row's sum is (piece 0) + (piece
# 1) + ..., for one row and for many, so the depth is part of a result's last bits.
DEPTH_BLOCK = 512

_float_tiles = make_tiles(quantized=False)
_int8_tiles = make_tiles(quantized=True)


@kernel(FLOATS, INT64, FLOATS, INT64, FLOATS, INT64, INT64, INT64, INT64, INT64)
def multiply(y, y_stride, x, x_stride, w, w_stride, depth, rows, vectors, adding):
    """y = x w, or y += x w, for one tile of float32; see `make_tiles`."""
    # The place of `scales` is taken by any pointer (y): float32 tiles do not read it.
    _float_tiles(y, y_stride, x, x_stride, w, w_stride, depth, y, rows, vectors, adding)


@kernel(FLOATS, INT64, FLOATS, INT64, BYTES, INT64, INT64, FLOATS, INT64, INT64, INT64)
def _multiply_int8(y, y_stride, x, x_stride, w, w_stride, depth, scales, rows, vectors, adding):
    """The same with w as int8 and one scale for each output."""
    _int8_tiles(y, y_stride, x, x_stride, w, w_stride, depth, scales, rows, vectors, adding)


@kernel(FLOATS, INT64, FLOATS, INT64, FLOATS, INT64, INT64, INT64, INT64)
def _panel(y, y_stride, x, x_stride, w, width, depth, rows, adding):
    """y (rows, width) (+)= x times one panel of float32 that starts at `w`."""
    # Tiles of ROWS rows and one last lower tile: no row's sum depends on its tile's height.
    for row in range(0, rows, at.ROWS):
        high = min(at.ROWS, rows - row)
        multiply(
            skip(y, row * y_stride), y_stride, skip(x, row * x_stride), x_stride, w, width, depth,
            high, width // at.LANES, adding,
        )  # fmt: skip


@kernel(FLOATS, INT64, FLOATS, INT64, BYTES, INT64, INT64, FLOATS, INT64, INT64)
def _panel_int8(y, y_stride, x, x_stride, w, width, depth, scales, rows, adding):
    """The same for a panel of int8."""
    for row in range(0, rows, at.ROWS):
        high = min(at.ROWS, rows - row)
        _multiply_int8(
            skip(y, row * y_stride), y_stride, skip(x, row * x_stride), x_stride, w, width, depth,
            scales, high, width // at.LANES, adding,
        )  # fmt: skip


@kernel(FLOATS, INT64, INT64, FLOATS, INT64, INT64, INT64)
def _set_bias(y, y_stride, rows, bias, adding, begin, end):
    """Set the columns from `begin` to `end` of y to the bias, or add the bias to them."""
    for row in range(rows):
        out = skip(y, row * y_stride)
        if adding:
            for i in range(begin, end):
                out[i] += bias[i]
        else:
            for i in range(begin, end):
                out[i] = bias[i]


@kernel(FLOATS, INT64, FLOATS, INT64, INT64, INTS, INT64, INT64, INT64, INT64)
def linear(y, y_stride, x, x_stride, rows, matrix, quantized, adding, part, parts):
    """y = x W + b, or y += x W + b, for the outputs of part number `part` of `parts`.

    y is (rows, N padded to whole vectors) and x (rows, C), float32; `matrix` points to a packed
    matrix's description (see `layout`). Each part computes whole panels.
    """
    outputs, depth = matrix[at.OUTPUTS_PADDED], matrix[at.DEPTH]
    panels = (outputs + at.PANEL - 1) // at.PANEL
    first, last = part_start(panels, part, parts), part_start(panels, part + 1, parts)
    if matrix[at.BIAS] != 0:
        begin, end = first * at.PANEL, min(last * at.PANEL, outputs)
        _set_bias(y, y_stride, rows, floats(matrix[at.BIAS]), adding, begin, end)
        adding = 1  # the products are added to the bias
    # Panels outside, depth inside, rows innermost: a piece of a panel is read from memory once and
    # used for all rows; y's tiles are loaded and stored again for each piece of the depth.
    for panel in range(first, last):
        width = min(at.PANEL, outputs - panel * at.PANEL)
        for k in range(0, depth, DEPTH_BLOCK):
            deep = min(DEPTH_BLOCK, depth - k)
            # All panels before this one are PANEL wide; in this one a row k is `width` long.
            start = panel * at.PANEL * depth + k * width
            y_panel, x_part = skip(y, panel * at.PANEL), skip(x, k)
            keep = 1 if k > 0 else adding  # later pieces are added to the first
            if quantized:
                w = skip(int8s(matrix[at.DATA]), start)
                scales = skip(floats(matrix[at.SCALES]), panel * at.PANEL)
                _panel_int8(y_panel, y_stride, x_part, x_stride, w, width, deep, scales, rows, keep)
            else:
                w = skip(floats(matrix[at.DATA]), start)
                _panel(y_panel, y_stride, x_part, x_stride, w, width, deep, rows, keep)


@kernel(FLOATS, INTS, INT64, INT64)
def copy_row(out, matrix, row, quantized):
    """out = the C weights of output number `row`: a token's embedding."""
    # An embedding (V, C) is a packed matrix with V outputs, which a tied head multiplies by. Its
    # row is a column of a panel: every width-th element.
    depth, outputs = matrix[at.DEPTH], matrix[at.OUTPUTS_PADDED]
    panel = row // at.PANEL
    width = min(at.PANEL, outputs - panel * at.PANEL)
    start = panel * at.PANEL * depth + row - panel * at.PANEL
    if quantized:
        data, scale = skip(int8s(matrix[at.DATA]), start), floats(matrix[at.SCALES])[row]
        for k in range(depth):
            out[k] = f32(data[k * width]) * scale
    else:
        values = skip(floats(matrix[at.DATA]), start)
        for k in range(depth):
            out[k] = values[k * width]
