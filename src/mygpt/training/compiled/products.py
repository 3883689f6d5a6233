"""Products of matrices for a training step, all made of the decoding engine's tiles.

A weight (O, I) lies in panels (see `mygpt.engines.cpu.matmul`): transposed for y = x W^T, as it
is for dx = dy W. The third product, dW = dy^T x, reads both operands where they lie.
Letters: I inputs, O outputs.
"""

from __future__ import annotations

from mygpt.engines.cpu.matmul import DEPTH_BLOCK, multiply
from mygpt.engines.cpu.panels import fill_panel
from mygpt.engines.cpu.simd import FLOATS, INTS, WHOLE, floats, kernel, make_tiles, skip
from mygpt.training.compiled import layout as at

_outer_tiles = make_tiles(quantized=False, transposed=True)


@kernel(FLOATS, WHOLE, FLOATS, WHOLE, WHOLE, FLOATS, WHOLE, WHOLE, WHOLE)
def times_panels(y, y_stride, x, x_stride, rows, panels, outputs, depth, adding):
    """y = x w, or y += x w, for `rows` rows; w (depth, outputs) lies in panels.

    Of y, whole vectors are written: as many columns as `outputs` rounded up to them.
    """
    room = (outputs + at.LANES - 1) // at.LANES * at.LANES
    for first in range(0, room, at.PANEL):
        width = min(at.PANEL, room - first)
        for k in range(0, depth, DEPTH_BLOCK):
            deep = min(DEPTH_BLOCK, depth - k)
            w = skip(panels, first * depth + k * width)
            keep = 1 if k > 0 else adding
            for row in range(0, rows, at.ROWS):
                multiply(
                    skip(y, row * y_stride + first), y_stride, skip(x, row * x_stride + k),
                    x_stride, w, width, deep, min(at.ROWS, rows - row), width // at.LANES, keep,
                )  # fmt: skip


@kernel(FLOATS, WHOLE, FLOATS, WHOLE, WHOLE, FLOATS, WHOLE, WHOLE, WHOLE)
def add_outer(y, y_stride, a, a_stride, a_columns, b, b_stride, b_columns, rows):
    """y (a_columns, b_columns) += a^T b, over `rows` rows; b_columns are whole vectors."""
    for first in range(0, b_columns, at.PANEL):
        vectors = min(at.PANEL, b_columns - first) // at.LANES
        for m in range(0, a_columns, at.ROWS):
            out = skip(y, m * y_stride + first)
            high = min(at.ROWS, a_columns - m)
            _outer_tiles(
                out, y_stride, skip(a, m), a_stride, skip(b, first), b_stride, rows, out, high,
                vectors, 1,
            )  # fmt: skip


@kernel(FLOATS, WHOLE, FLOATS, WHOLE, WHOLE, INTS, WHOLE)
def forward(y, y_stride, x, x_stride, rows, matrix, adding):
    """y = x W^T + b, or y += x W^T + b."""
    outputs = matrix[at.OUTPUTS]
    if matrix[at.BIAS] != 0:
        bias = floats(matrix[at.BIAS])
        for row in range(rows):
            out = skip(y, row * y_stride)
            if adding:
                for i in range(outputs):
                    out[i] += bias[i]
            else:
                for i in range(outputs):
                    out[i] = bias[i]
        if not adding:  # whole vectors are read and written
            for row in range(rows):
                for i in range(outputs, (outputs + at.LANES - 1) // at.LANES * at.LANES):
                    y[row * y_stride + i] = 0
        adding = 1
    times_panels(
        y, y_stride, x, x_stride, rows, floats(matrix[at.FORWARD]), outputs, matrix[at.INPUTS],
        adding,
    )  # fmt: skip


@kernel(FLOATS, WHOLE, FLOATS, WHOLE, FLOATS, WHOLE, WHOLE, INTS, FLOATS)
def backward(dx, dx_stride, dy, dy_stride, x, x_stride, rows, matrix, gradients):
    """dx = dy W; adds dy^T x to W's gradient, and dy's sum over rows to the bias's."""
    outputs, inputs = matrix[at.OUTPUTS], matrix[at.INPUTS]
    times_panels(
        dx, dx_stride, dy, dy_stride, rows, floats(matrix[at.BACKWARD]), inputs, outputs, 0
    )
    own = skip(gradients, matrix[at.GRADIENT])
    add_outer(own, inputs, dy, dy_stride, outputs, x, x_stride, inputs, rows)
    if matrix[at.BIAS] != 0:
        total = skip(gradients, matrix[at.BIAS_GRADIENT])
        for row in range(rows):
            part = skip(dy, row * dy_stride)
            for i in range(outputs):
                total[i] += part[i]


@kernel(INTS)
def lay_out(matrix):
    """Put a matrix into its panels, for both ways."""
    rows, outputs, inputs = floats(matrix[at.WEIGHT]), matrix[at.OUTPUTS], matrix[at.INPUTS]
    room = (outputs + at.LANES - 1) // at.LANES * at.LANES
    panels = floats(matrix[at.FORWARD])
    for first in range(0, outputs, at.PANEL):
        here, width = min(at.PANEL, outputs - first), min(at.PANEL, room - first)
        fill_panel(skip(panels, first * inputs), skip(rows, first * inputs), here, width, inputs)
    panels = floats(matrix[at.BACKWARD])
    for first in range(0, inputs, at.PANEL):
        width = min(at.PANEL, inputs - first)
        panel = skip(panels, first * outputs)
        for k in range(outputs):
            line, row = skip(panel, k * width), skip(rows, k * inputs + first)
            for i in range(width):
                line[i] = row[i]
