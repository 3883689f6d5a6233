"""Rows times a packed matrix, in tiles that keep one order of addition for any number of rows.

A matrix of N outputs lies in panels: at.PANEL outputs wide (the last one narrower, a whole number
of vectors), and within a panel all outputs of one input side by side, so that one row times
the matrix reads memory from one end to the other.
Letters: C inner dimension (depth), N outputs.
"""

from __future__ import annotations

from mygpt.engines.cpu import layout as at
from mygpt.engines.cpu.arithmetic import f32
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
)  # fmt: skip

# Inner products are summed in pieces of this depth, so that a piece of a panel stays in the
# cache while all rows pass over it.
DEPTH_BLOCK = 512

_float_tiles = make_tiles(quantized=False)
_int8_tiles = make_tiles(quantized=True)
_ZERO = f32(0)


@kernel(FLOATS, WHOLE, FLOATS, WHOLE, FLOATS, WHOLE, WHOLE, WHOLE, WHOLE)
def add_product(y, y_stride, x, x_stride, w, w_stride, depth, rows, vectors):
    """y += x w for one tile of float32; see `make_tiles`."""
    _float_tiles(y, y_stride, x, x_stride, w, w_stride, depth, y, rows, vectors)


@kernel(FLOATS, WHOLE, FLOATS, WHOLE, BYTES, WHOLE, WHOLE, FLOATS, WHOLE, WHOLE)
def _add_int8_product(y, y_stride, x, x_stride, w, w_stride, depth, scales, rows, vectors):
    _int8_tiles(y, y_stride, x, x_stride, w, w_stride, depth, scales, rows, vectors)


@kernel(FLOATS, WHOLE, WHOLE, INTS, WHOLE, WHOLE, WHOLE)
def _prepare(y, y_stride, rows, matrix, adding, begin, end):
    """Set y's columns to the bias or to 0; when adding, add the bias."""
    bias = floats(matrix[at.BIAS])
    has_bias = matrix[at.BIAS] != 0
    for row in range(rows):
        out = skip(y, row * y_stride)
        if adding:
            if has_bias:
                for i in range(begin, end):
                    out[i] += bias[i]
        elif has_bias:
            for i in range(begin, end):
                out[i] = bias[i]
        else:
            for i in range(begin, end):
                out[i] = _ZERO


@kernel(FLOATS, WHOLE, FLOATS, WHOLE, WHOLE, INTS, WHOLE, WHOLE, WHOLE, WHOLE)
def linear(y, y_stride, x, x_stride, rows, matrix, quantized, adding, part, parts):
    """y = x W + b, or y += x W + b, for this part's share of the outputs.

    y is (rows, N padded to whole vectors) and x (rows, C), float32; `matrix` points to a packed
    matrix's description. Parts share the panels.
    """
    outputs = matrix[at.OUTPUTS_PADDED]
    panels = (outputs + at.PANEL - 1) // at.PANEL
    first, last = panels * part // parts, panels * (part + 1) // parts
    begin, end = first * at.PANEL, min(last * at.PANEL, outputs)
    _prepare(y, y_stride, rows, matrix, adding, begin, end)
    depth = matrix[at.DEPTH]
    scales = floats(matrix[at.SCALES])
    for panel in range(first, last):
        width = min(at.PANEL, outputs - panel * at.PANEL)
        for k in range(0, depth, DEPTH_BLOCK):
            deep = min(DEPTH_BLOCK, depth - k)
            start = panel * at.PANEL * depth + k * width
            for row in range(0, rows, at.ROWS):
                high = min(at.ROWS, rows - row)
                y_tile = skip(y, row * y_stride + panel * at.PANEL)
                x_tile = skip(x, row * x_stride + k)
                if quantized:
                    w = skip(int8s(matrix[at.DATA]), start)
                    scale = skip(scales, panel * at.PANEL)
                    _add_int8_product(
                        y_tile, y_stride, x_tile, x_stride, w, width, deep, scale, high,
                        width // at.LANES,
                    )  # fmt: skip
                else:
                    w = skip(floats(matrix[at.DATA]), start)
                    add_product(
                        y_tile, y_stride, x_tile, x_stride, w, width, deep, high, width // at.LANES
                    )


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
