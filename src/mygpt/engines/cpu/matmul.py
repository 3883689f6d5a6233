"""Rows times a packed matrix, in tiles that keep one order of addition for any number of rows.

A matrix of N outputs lies in panels: PANEL outputs wide (the last one narrower, a whole number
of vectors), and within a panel all outputs of one input side by side, so that one row times
the matrix reads memory from one end to the other.
Letters: C inner dimension (depth), N outputs.
"""

from __future__ import annotations

from mygpt.engines.cpu import layout as at
from mygpt.engines.cpu.arithmetic import f32, share
from mygpt.engines.cpu.simd import (
    BYTES,
    FLOATS,
    INTS,
    WHOLE,
    floats,
    int8s,
    kernel,
    make_tiles,
    skip,
)

# Inner products are summed in pieces of this depth, so that a piece of a panel stays in the
# cache while all rows pass over it.
DEPTH_BLOCK = 512

_float_tiles = make_tiles(quantized=False)
_int8_tiles = make_tiles(quantized=True)


@kernel(FLOATS, WHOLE, FLOATS, WHOLE, FLOATS, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE)
def multiply(y, y_stride, x, x_stride, w, w_stride, depth, rows, vectors, adding):
    """y = x w, or y += x w, for one tile of float32; see `make_tiles`."""
    _float_tiles(y, y_stride, x, x_stride, w, w_stride, depth, y, rows, vectors, adding)


@kernel(FLOATS, WHOLE, FLOATS, WHOLE, BYTES, WHOLE, WHOLE, FLOATS, WHOLE, WHOLE, WHOLE)
def _multiply_int8(y, y_stride, x, x_stride, w, w_stride, depth, scales, rows, vectors, adding):
    _int8_tiles(y, y_stride, x, x_stride, w, w_stride, depth, scales, rows, vectors, adding)


@kernel(FLOATS, WHOLE, FLOATS, WHOLE, FLOATS, WHOLE, WHOLE, WHOLE, WHOLE)
def _panel(y, y_stride, x, x_stride, w, width, depth, rows, adding):
    """All rows through one panel of float32."""
    for row in range(0, rows, at.ROWS):
        high = min(at.ROWS, rows - row)
        multiply(
            skip(y, row * y_stride), y_stride, skip(x, row * x_stride), x_stride, w, width, depth,
            high, width // at.LANES, adding,
        )  # fmt: skip


@kernel(FLOATS, WHOLE, FLOATS, WHOLE, BYTES, WHOLE, WHOLE, FLOATS, WHOLE, WHOLE)
def _panel_int8(y, y_stride, x, x_stride, w, width, depth, scales, rows, adding):
    """All rows through one panel of int8."""
    for row in range(0, rows, at.ROWS):
        high = min(at.ROWS, rows - row)
        _multiply_int8(
            skip(y, row * y_stride), y_stride, skip(x, row * x_stride), x_stride, w, width, depth,
            scales, high, width // at.LANES, adding,
        )  # fmt: skip


@kernel(FLOATS, WHOLE, WHOLE, FLOATS, WHOLE, WHOLE, WHOLE)
def _lay_bias(y, y_stride, rows, bias, adding, begin, end):
    """Set y's columns to the bias, or add it."""
    for row in range(rows):
        out = skip(y, row * y_stride)
        if adding:
            for i in range(begin, end):
                out[i] += bias[i]
        else:
            for i in range(begin, end):
                out[i] = bias[i]


@kernel(FLOATS, WHOLE, FLOATS, WHOLE, WHOLE, INTS, WHOLE, WHOLE, WHOLE, WHOLE)
def linear(y, y_stride, x, x_stride, rows, matrix, quantized, adding, part, parts):
    """y = x W + b, or y += x W + b, for this part's share of the outputs.

    y is (rows, N padded to whole vectors) and x (rows, C), float32; `matrix` points to a packed
    matrix's description. Parts share the panels.
    """
    outputs, depth = matrix[at.OUTPUTS_PADDED], matrix[at.DEPTH]
    panels = (outputs + at.PANEL - 1) // at.PANEL
    first, last = share(panels, part, parts), share(panels, part + 1, parts)
    if matrix[at.BIAS] != 0:
        begin, end = first * at.PANEL, min(last * at.PANEL, outputs)
        _lay_bias(y, y_stride, rows, floats(matrix[at.BIAS]), adding, begin, end)
        adding = 1
    for panel in range(first, last):
        width = min(at.PANEL, outputs - panel * at.PANEL)
        for k in range(0, depth, DEPTH_BLOCK):
            deep = min(DEPTH_BLOCK, depth - k)
            start = panel * at.PANEL * depth + k * width
            y_panel, x_part = skip(y, panel * at.PANEL), skip(x, k)
            keep = 1 if k > 0 else adding
            if quantized:
                w = skip(int8s(matrix[at.DATA]), start)
                scales = skip(floats(matrix[at.SCALES]), panel * at.PANEL)
                _panel_int8(y_panel, y_stride, x_part, x_stride, w, width, deep, scales, rows, keep)
            else:
                w = skip(floats(matrix[at.DATA]), start)
                _panel(y_panel, y_stride, x_part, x_stride, w, width, deep, rows, keep)


@kernel(FLOATS, INTS, WHOLE, WHOLE)
def copy_row(out, matrix, row, quantized):
    """out = the C numbers of output number `row`: a token's embedding."""
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
