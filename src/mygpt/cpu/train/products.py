"""Matrix products of a training step, made of the decoding engine's tiles or of `bfloat16`'s.

A linear layer with a weight W (O, I) has three of them (x, y and their gradients have R rows):

    forward   y (R, O) = x (R, I) W^T + b
    backward  dL/dx (R, I) = dL/dy (R, O) W
              dL/dW (O, I) += dL/dy^T (O, R) x (R, I),   dL/db (O,) += sum over rows of dL/dy

Letters: I inputs, O outputs, R rows.
"""

from __future__ import annotations

from mygpt.cpu.common.arithmetic import padded
from mygpt.cpu.common.matmul import add_outer, multiply, set_bias
from mygpt.cpu.common.simd import FLOATS, INT64, INTS, floats, ints, kernel, skip
from mygpt.cpu.common.weights import pack_panels
from mygpt.cpu.train import layout as at
from mygpt.cpu.train.bfloat16 import backward_bfloat16, forward_bfloat16, pack_matrix_bfloat16

# A tile computes y = x w for a w whose columns follow each other in memory (see `tile`). So W is
# packed twice at the beginning of each step, into panels (P = PANEL columns wide, see `matmul`):
#
#     FORWARD    panels of W^T (I, O):  for each block of P outputs, all inputs:  w[o..o+P-1, i]
#     BACKWARD   panels of W (O, I):    for each block of P inputs, all outputs:  w[o, i..i+P-1]
#
# That reads and writes O * I numbers twice for 6 R O I operations of the products. dL/dW has both
# operands as they are: the rows of x follow each other as its columns must, and dL/dy is read
# transposed, one number at a time, which a tile's broadcast does anyway.


@kernel(INTS, INT64, INT64, INT64, returns=FLOATS)
def workspace(job, thread, layer, field):
    """The address of a field of a thread's workspace; `layer` counts only for a layer's fields."""
    # WORKSPACE_SIZE floats for each thread; in them LAYER_WORKSPACE floats for each layer, then the
    # fields that all layers share (picture in `layout.py`).
    start = ints(job[at.WORKSPACE_TABLE])[field] + thread * job[at.WORKSPACE_SIZE]
    if field < at.LAYER_FIELDS:
        start += layer * job[at.LAYER_WORKSPACE]
    return skip(floats(job[at.WORKSPACE]), start)


@kernel(INTS, INT64, FLOATS, INT64, FLOATS, INT64, INT64, INTS, INT64)
def linear_forward(job, thread, y, y_stride, x, x_stride, rows, matrix, adding):
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
    if job[at.PRODUCTS] == at.FLOAT32:
        w = floats(matrix[at.FORWARD])
        multiply(y, y_stride, x, x_stride, rows, w, y, outputs, matrix[at.INPUTS], adding)
    else:
        forward_bfloat16(
            job[at.PRODUCTS], y, y_stride, x, x_stride, rows, matrix, adding,
            workspace(job, thread, 0, at.LEFT), workspace(job, thread, 0, at.BLOCK),
        )  # fmt: skip


# y_ro = sum_i x_ri W_oi + b_o, so by the chain rule
#     dL/dx_ri = sum_o dL/dy_ro W_oi      dL/dx = dL/dy W
#     dL/dW_oi = sum_r dL/dy_ro x_ri      dL/dW = dL/dy^T x
#     dL/db_o  = sum_r dL/dy_ro
@kernel(INTS, INT64, FLOATS, INT64, FLOATS, INT64, FLOATS, INT64, INT64, INTS, FLOATS)
def linear_backward(
    job, thread, dx, dx_stride, dy, dy_stride, x, x_stride, rows, matrix, gradients
):
    """dx = dy W; adds to the gradients of W and b."""
    outputs, inputs = matrix[at.OUTPUTS], matrix[at.INPUTS]
    own = skip(gradients, matrix[at.GRADIENT])
    if job[at.PRODUCTS] == at.FLOAT32:
        w = floats(matrix[at.BACKWARD])
        multiply(dx, dx_stride, dy, dy_stride, rows, w, dx, inputs, outputs, 0)
        add_outer(own, inputs, dy, dy_stride, outputs, x, x_stride, inputs, rows)
    else:
        backward_bfloat16(
            job[at.PRODUCTS], dx, dx_stride, dy, dy_stride, x, x_stride, rows, matrix, own,
            workspace(job, thread, 0, at.LEFT), workspace(job, thread, 0, at.RIGHT),
            workspace(job, thread, 0, at.BLOCK),
        )  # fmt: skip
    if matrix[at.BIAS] != 0:
        total = skip(gradients, matrix[at.BIAS_GRADIENT])
        for row in range(rows):
            part = skip(dy, row * dy_stride)
            for i in range(outputs):
                total[i] += part[i]


@kernel(INTS, INT64, INTS)
def pack_matrix(job, thread, matrix):
    """Pack a weight into its panels for the forward and the backward pass."""
    if job[at.PRODUCTS] != at.FLOAT32:
        pack_matrix_bfloat16(matrix, workspace(job, thread, 0, at.BLOCK))
        return
    rows, outputs, inputs = floats(matrix[at.WEIGHT]), matrix[at.OUTPUTS], matrix[at.INPUTS]
    pack_panels(floats(matrix[at.FORWARD]), rows, outputs, inputs)
    if matrix[at.BACKWARD] == 0:  # gradients are computed in bfloat16, so this is for losses
        return
    # Not transposed: a panel's line k is a piece of row k. LANES divides I (see `suits`).
    panels = floats(matrix[at.BACKWARD])
    for first in range(0, inputs, at.PANEL):
        width = min(at.PANEL, inputs - first)
        panel = skip(panels, first * outputs)
        for k in range(outputs):
            line, row = skip(panel, k * width), skip(rows, k * inputs + first)
            for i in range(width):
                line[i] = row[i]
