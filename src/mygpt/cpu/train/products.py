"""Matrix products of a training step, all made of the decoding engine's tiles.

A linear layer with a weight W (O, I) has three of them (x, y and their gradients have R rows):

    forward   y (R, O) = x (R, I) W^T + b
    backward  dL/dx (R, I) = dL/dy (R, O) W
              dL/dW (O, I) += dL/dy^T (O, R) x (R, I),   dL/db (O,) += sum over rows of dL/dy

Letters: I inputs, O outputs, R rows.
"""

from __future__ import annotations

from mygpt.cpu.common.matmul import DEPTH_BLOCK, multiply
from mygpt.cpu.common.panels import fill_panel
from mygpt.cpu.common.simd import FLOATS, INT64, INTS, floats, kernel, make_tiles, skip
from mygpt.cpu.train import layout as at

_outer_tiles = make_tiles(quantized=False, transposed=True)

# A tile computes y = x w for a w whose columns follow each other in memory (see `simd`). So W is
# packed twice at the beginning of each step, into panels (P = PANEL columns wide, see `matmul`):
#
#     FORWARD    panels of W^T (I, O):  for each block of P outputs, all inputs:  w[o..o+P-1, i]
#     BACKWARD   panels of W (O, I):    for each block of P inputs, all outputs:  w[o, i..i+P-1]
#
# That reads and writes O * I numbers twice for 6 R O I operations of the products. dL/dW has both
# operands as they are: the rows of x follow each other as its columns must, and dL/dy is read
# transposed, one number at a time, which a tile's broadcast does anyway.


@kernel(FLOATS, INT64, FLOATS, INT64, INT64, FLOATS, INT64, INT64, INT64)
def multiply_panels(y, y_stride, x, x_stride, rows, panels, outputs, depth, adding):
    """y = x w, or y += x w, for `rows` rows; w (depth, outputs) is packed into panels.

    Whole vectors of y are written: as many columns as `outputs` rounded up to them.
    """
    padded = (outputs + at.LANES - 1) // at.LANES * at.LANES
    # The same loops as `mygpt.cpu.common.matmul.linear`: a piece of a panel stays in the cache
    # while all rows pass over it.
    for first in range(0, padded, at.PANEL):
        width = min(at.PANEL, padded - first)
        for k in range(0, depth, DEPTH_BLOCK):
            deep = min(DEPTH_BLOCK, depth - k)
            w = skip(panels, first * depth + k * width)
            keep = 1 if k > 0 else adding
            for row in range(0, rows, at.ROWS):
                multiply(
                    skip(y, row * y_stride + first), y_stride, skip(x, row * x_stride + k),
                    x_stride, w, width, deep, min(at.ROWS, rows - row), width // at.LANES, keep,
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
            _outer_tiles(
                out, y_stride, skip(a, m), a_stride, skip(b, first), b_stride, rows, out, high,
                vectors, 1,
            )  # fmt: skip


@kernel(FLOATS, INT64, FLOATS, INT64, INT64, INTS, INT64)
def linear_forward(y, y_stride, x, x_stride, rows, matrix, adding):
    """y = x W^T + b, or y += x W^T + b."""
    outputs = matrix[at.OUTPUTS]
    if matrix[at.BIAS] != 0:
        # The bias first, then the products are added to it.
        bias = floats(matrix[at.BIAS])
        for row in range(rows):
            out = skip(y, row * y_stride)
            if adding:
                for i in range(outputs):
                    out[i] += bias[i]
            else:
                for i in range(outputs):
                    out[i] = bias[i]
        if not adding:
            # Tiles add to whole vectors: the columns after the last output must be numbers.
            for row in range(rows):
                for i in range(outputs, (outputs + at.LANES - 1) // at.LANES * at.LANES):
                    y[row * y_stride + i] = 0
        adding = 1
    multiply_panels(
        y, y_stride, x, x_stride, rows, floats(matrix[at.FORWARD]), outputs, matrix[at.INPUTS],
        adding,
    )  # fmt: skip


# y_ro = sum_i x_ri W_oi + b_o, so by the chain rule
#     dL/dx_ri = sum_o dL/dy_ro W_oi      dL/dx = dL/dy W
#     dL/dW_oi = sum_r dL/dy_ro x_ri      dL/dW = dL/dy^T x
#     dL/db_o  = sum_r dL/dy_ro
@kernel(FLOATS, INT64, FLOATS, INT64, FLOATS, INT64, INT64, INTS, FLOATS)
def linear_backward(dx, dx_stride, dy, dy_stride, x, x_stride, rows, matrix, gradients):
    """dx = dy W; adds to the gradients of W and b."""
    outputs, inputs = matrix[at.OUTPUTS], matrix[at.INPUTS]
    multiply_panels(
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
def pack_matrix(matrix):
    """Pack a weight into its panels for the forward and the backward pass."""
    rows, outputs, inputs = floats(matrix[at.WEIGHT]), matrix[at.OUTPUTS], matrix[at.INPUTS]
    padded = (outputs + at.LANES - 1) // at.LANES * at.LANES
    panels = floats(matrix[at.FORWARD])
    for first in range(0, outputs, at.PANEL):
        here, width = min(at.PANEL, outputs - first), min(at.PANEL, padded - first)
        fill_panel(skip(panels, first * inputs), skip(rows, first * inputs), here, width, inputs)
    # Not transposed: a panel's line k is a piece of row k. LANES divides I (see `suits`).
    panels = floats(matrix[at.BACKWARD])
    for first in range(0, inputs, at.PANEL):
        width = min(at.PANEL, inputs - first)
        panel = skip(panels, first * outputs)
        for k in range(outputs):
            line, row = skip(panel, k * width), skip(rows, k * inputs + first)
            for i in range(width):
                line[i] = row[i]
