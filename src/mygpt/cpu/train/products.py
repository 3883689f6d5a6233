"""Matrix products of a training step, all made of the decoding engine's tiles.

A linear layer with a weight W (O, I) has three of them (x, y and their gradients have R rows):

    forward   y (R, O) = x (R, I) W^T + b
    backward  dL/dx (R, I) = dL/dy (R, O) W
              dL/dW (O, I) += dL/dy^T (O, R) x (R, I),   dL/db (O,) += sum over rows of dL/dy

Letters: I inputs, O outputs, R rows.
"""

from __future__ import annotations

from mygpt.cpu.common.arithmetic import padded
from mygpt.cpu.common.matmul import add_outer, multiply, set_bias
from mygpt.cpu.common.simd import FLOATS, INT64, INTS, floats, kernel, skip
from mygpt.cpu.common.weights import pack_panels
from mygpt.cpu.train import layout as at

# A tile computes y = x w for a w whose columns follow each other in memory (see `simd`). So W is
# packed twice at the beginning of each step, into panels (P = PANEL columns wide, see `matmul`):
#
#     FORWARD    panels of W^T (I, O):  for each block of P outputs, all inputs:  w[o..o+P-1, i]
#     BACKWARD   panels of W (O, I):    for each block of P inputs, all outputs:  w[o, i..i+P-1]
#
# That reads and writes O * I numbers twice for 6 R O I operations of the products. dL/dW has both
# operands as they are: the rows of x follow each other as its columns must, and dL/dy is read
# transposed, one number at a time, which a tile's broadcast does anyway.


@kernel(FLOATS, INT64, FLOATS, INT64, INT64, INTS, INT64)
def linear_forward(y, y_stride, x, x_stride, rows, matrix, adding):
    """y = x W^T + b, or y += x W^T + b."""
    outputs = matrix[at.OUTPUTS]
    if matrix[at.BIAS] != 0:
        # The bias first, then the products are added to it.
        set_bias(y, y_stride, rows, floats(matrix[at.BIAS]), outputs, adding)
        if not adding:
            # Tiles add to whole vectors: the columns after the last output must be numbers.
            for row in range(rows):
                for i in range(outputs, padded(outputs)):
                    y[row * y_stride + i] = 0
        adding = 1
    w = floats(matrix[at.FORWARD])
    multiply(y, y_stride, x, x_stride, rows, w, y, outputs, matrix[at.INPUTS], adding)


# y_ro = sum_i x_ri W_oi + b_o, so by the chain rule
#     dL/dx_ri = sum_o dL/dy_ro W_oi      dL/dx = dL/dy W
#     dL/dW_oi = sum_r dL/dy_ro x_ri      dL/dW = dL/dy^T x
#     dL/db_o  = sum_r dL/dy_ro
@kernel(FLOATS, INT64, FLOATS, INT64, FLOATS, INT64, INT64, INTS, FLOATS)
def linear_backward(dx, dx_stride, dy, dy_stride, x, x_stride, rows, matrix, gradients):
    """dx = dy W; adds to the gradients of W and b."""
    outputs, inputs = matrix[at.OUTPUTS], matrix[at.INPUTS]
    w = floats(matrix[at.BACKWARD])
    multiply(dx, dx_stride, dy, dy_stride, rows, w, dx, inputs, outputs, 0)
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
    pack_panels(floats(matrix[at.FORWARD]), rows, outputs, inputs)
    # Not transposed: a panel's line k is a piece of row k. LANES divides I (see `suits`).
    panels = floats(matrix[at.BACKWARD])
    for first in range(0, inputs, at.PANEL):
        width = min(at.PANEL, inputs - first)
        panel = skip(panels, first * outputs)
        for k in range(outputs):
            line, row = skip(panel, k * width), skip(rows, k * inputs + first)
            for i in range(width):
                line[i] = row[i]
