"""One transformer block of the training step, forward and backward, on the rows of a chunk.

In all formulas dX is the gradient of the loss L with respect to X, dL/dX.
Letters: C embedding, D head size, G key/value heads, H heads, M MLP width, Q = (H + 2G) D width of
query, key and value together, R rows of a chunk (whole sequences), T time.
"""

from __future__ import annotations

from mygpt.cpu.common.arithmetic import f32
from mygpt.cpu.common.simd import FLOATS, INT64, INTS, floats, ints, kernel, skip
from mygpt.cpu.train import layout as at
from mygpt.cpu.train.activations import activate_vectors, activate_vectors_backward
from mygpt.cpu.train.arithmetic import (
    activate_rows,
    activate_rows_backward,
    drop,
    dropout_key,
    norm_rows,
    norm_rows_backward,
    prepare_head,
    prepare_head_backward,
)
from mygpt.cpu.train.attention import attend, attend_backward
from mygpt.cpu.train.attention_bfloat16 import attend_backward_bfloat16, attend_bfloat16
from mygpt.cpu.train.products import linear_backward, linear_forward, workspace

_ZERO = f32(0)

# One block. Capitals are fields of the workspace (see `layout`). On the left are those of a layer,
# which the forward pass leaves for the backward pass; on the right gradients, of which there is one
# buffer each for all layers. Read the right column from the bottom to the top.
#
#     forward                                            backward
#
#     X (R, C) ---------------------------+              D_X  <- D_X + norm'(D_NORMED)
#      | norm                             |
#     NORMED (R, C)                       |              D_NORMED <- D_QKV W_ATTENTION
#      | W_ATTENTION                      |
#     QKV (R, Q)                          |              D_QKV <- norm and rotation'(D_PREPARED)
#      | norm and rotation of q and k     | residual
#     PREPARED (R, (H + G) D)             |              D_PREPARED (and values of D_QKV) <-
#      | attention                        |                  attention'(D_ATTENDED)
#     ATTENDED (R, H D)                   |              D_ATTENDED <- dropout'(D_X) W_OUTPUT
#      | W_OUTPUT, dropout                |
#     X_MIDDLE = X + ... <----------------+              D_X  <- D_X + norm'(D_NORMED)
#      | norm                             |
#     NORMED_MIDDLE (R, C)                |              D_NORMED <- d PRE_ACTIVATION W_MLP_IN
#      | W_MLP_IN                         |
#     PRE_ACTIVATION (R, M or 2M)         | residual     (in place) <- activation'(D_ACTIVATED)
#      | GELU or SwiGLU                   |
#     ACTIVATED (R, M)                    |              D_ACTIVATED <- dropout'(D_X) W_MLP_OUT
#      | W_MLP_OUT, dropout               |
#     next block's X = X_MIDDLE + ... <---+              D_X  is given by the next block
#
# A residual connection y = x + f(x) has dL/dx = dL/dy + f'(x)^T dL/dy: that is why D_X stays and
# the norm's backward pass adds to it. ' means: multiplied by the transposed Jacobian.
#
# Each dropout of the model has a number ("site"), from which its random numbers derive: 0 after the
# embeddings, and in layer n 4n + 1 after attention, 4n + 2 after the MLP, 4n + 3 on the attention
# weights. The positions of a site are counted through the batch, whatever the chunks are.


@kernel(FLOATS, FLOATS, INT64)
def _copy(out, x, count):
    """out = x."""
    for i in range(count):
        out[i] = x[i]


@kernel(FLOATS, FLOATS, INT64)
def add_row(out, x, count):
    """out += x."""
    for i in range(count):
        out[i] += x[i]


@kernel(INTS, INT64, INT64, INT64, FLOATS)
def drop_rows(job, site, first_row, rows, x):
    """Dropout on x (R, C), and its own backward pass; nothing where the rate is 0."""
    rate = floats(job[at.REALS])[at.DROPOUT]
    if rate > _ZERO:
        width = job[at.WIDTH]
        drop(x, rows * width, dropout_key(job[at.SEED], site), first_row * width, rate)


@kernel(INTS, INT64, FLOATS, FLOATS, FLOATS, INTS)
def prepare_heads(job, rows, prepared, qkv, factors, layer):
    """prepared (R, (H + G) D) = queries and keys, normalised and rotated as the model does."""
    time, size, heads, groups = job[at.TIME], job[at.HEAD], job[at.HEADS], job[at.GROUPS]
    stride, wide = (heads + groups) * size, (heads + 2 * groups) * size
    eps = floats(job[at.REALS])[at.EPS]
    for row in range(rows):
        angle = row % time * size
        cosines = skip(floats(job[at.COSINES]), angle)
        sines = skip(floats(job[at.SINES]), angle)
        for head in range(heads + groups):
            norm = skip(layer, at.QUERY_NORM if head < heads else at.KEY_NORM)
            prepare_head(
                skip(prepared, row * stride + head * size), skip(qkv, row * wide + head * size),
                size, norm, job[at.QK_NORM], job[at.ROTARY], cosines, sines, eps,
                skip(factors, row * (heads + groups) + head),
            )  # fmt: skip


# Head by head: dL/dqkv = norm'(rotation^T dL/dprepared). The formulas are above
# `prepare_head_backward`.
@kernel(INTS, INT64, FLOATS, FLOATS, FLOATS, FLOATS, INTS, FLOATS)
def prepare_heads_backward(job, rows, d_qkv, d_prepared, qkv, factors, layer, gradients):
    """The queries' and keys' columns of d_qkv from d_prepared (which changes); the values' stay."""
    time, size, heads, groups = job[at.TIME], job[at.HEAD], job[at.HEADS], job[at.GROUPS]
    stride, wide = (heads + groups) * size, (heads + 2 * groups) * size
    for row in range(rows):
        angle = row % time * size
        cosines = skip(floats(job[at.COSINES]), angle)
        sines = skip(floats(job[at.SINES]), angle)
        for head in range(heads + groups):
            norm = skip(layer, at.QUERY_NORM if head < heads else at.KEY_NORM)
            place = row * wide + head * size
            prepare_head_backward(
                skip(d_qkv, place), skip(d_prepared, row * stride + head * size),
                skip(qkv, place), size, norm, job[at.QK_NORM], job[at.ROTARY], cosines,
                sines, skip(factors, row * (heads + groups) + head), gradients,
            )  # fmt: skip


@kernel(INTS, INT64, INTS, FLOATS, FLOATS, INT64, INT64, INT64, INT64)
def _project(job, thread, matrix, out, x, x_stride, first_row, rows, site):
    """out += dropout(x W^T + b): what a block adds to the residual stream."""
    # Without dropout the product adds to `out` by itself, and the detour over `scratch` is spared.
    width, scratch = job[at.WIDTH], workspace(job, thread, 0, at.PROJECTED)
    if floats(job[at.REALS])[at.DROPOUT] > _ZERO:
        linear_forward(job, thread, scratch, width, x, x_stride, rows, matrix, 0)
        drop_rows(job, site, first_row, rows, scratch)
        add_row(out, scratch, rows * width)
    else:
        linear_forward(job, thread, out, width, x, x_stride, rows, matrix, 1)


# y = x + dropout(z W^T + b) with the residual stream x:
#     dL/dx += dL/dy           D_X stays as it is
#     dL/dz = dropout'(dL/dy) W,  and the gradients of W and b as for any linear layer
@kernel(INTS, INT64, INTS, FLOATS, FLOATS, INT64, INT64, INT64, INT64, FLOATS)
def _project_backward(job, thread, matrix, d_z, z, z_width, first_row, rows, site, gradients):
    """d_z (R, Z) = the gradient of z, the input of `_project`, from D_X."""
    width, d_x = job[at.WIDTH], workspace(job, thread, 0, at.D_X)
    projected = workspace(job, thread, 0, at.PROJECTED)
    _copy(projected, d_x, rows * width)  # dropout works in place
    drop_rows(job, site, first_row, rows, projected)
    linear_backward(
        job, thread, d_z, z_width, projected, width, z, z_width, rows, matrix, gradients
    )


@kernel(INTS, INT64, INT64, INT64, INT64)
def attention_forward(job, thread, number, first_row, rows):
    """X_MIDDLE = X + dropout(attention(norm(X)) W_OUTPUT^T) of layer `number`."""
    width, size, heads, groups = job[at.WIDTH], job[at.HEAD], job[at.HEADS], job[at.GROUPS]
    time, wide = job[at.TIME], (heads + 2 * groups) * size
    layer = skip(ints(job[at.LAYER_TABLE]), number * at.LAYER_SIZE)
    x, normed = workspace(job, thread, number, at.X), workspace(job, thread, number, at.NORMED)
    moments = workspace(job, thread, number, at.MOMENTS)
    norm, eps = skip(layer, at.ATTENTION_NORM), floats(job[at.REALS])[at.EPS]
    norm_rows(normed, x, rows, width, job[at.NORM], norm, eps, moments)
    qkv = workspace(job, thread, number, at.QKV)
    linear_forward(job, thread, qkv, wide, normed, width, rows, skip(layer, at.W_ATTENTION), 0)
    prepared = workspace(job, thread, number, at.PREPARED)
    factors = workspace(job, thread, number, at.HEAD_FACTORS)
    prepare_heads(job, rows, prepared, qkv, factors, layer)
    attended = workspace(job, thread, number, at.ATTENDED)
    log_sums = workspace(job, thread, number, at.LOG_SUMS)
    scratch = workspace(job, thread, 0, at.ATTENTION_SCRATCH)
    block = workspace(job, thread, 0, at.BLOCK)
    for window in range(rows // time):
        start, sequence = window * time, first_row // time + window
        heads_of = skip(prepared, start * (heads + groups) * size), skip(qkv, start * wide)
        result = skip(attended, start * heads * size), skip(log_sums, start * heads)
        if job[at.PRODUCTS] == at.FLOAT32:
            attend(job, number, sequence, *heads_of, *result, scratch)
        else:
            attend_bfloat16(job, number, sequence, *heads_of, *result, scratch, block)
    middle = workspace(job, thread, number, at.X_MIDDLE)
    _copy(middle, x, rows * width)
    _project(
        job, thread, skip(layer, at.W_OUTPUT), middle, attended, heads * size, first_row, rows,
        4 * number + 1,
    )  # fmt: skip


# The right column of the upper half of the picture, from the bottom to the top:
#
#     dL/dATTENDED = dropout'(dL/dX_MIDDLE) W_OUTPUT
#     dL/dPREPARED, dL/dV = attention'(dL/dATTENDED)       see `attend_backward`
#     dL/dQKV = | norm and rotation'(dL/dPREPARED) | dL/dV |
#     dL/dNORMED = dL/dQKV W_ATTENTION
#     dL/dX = dL/dX_MIDDLE + norm'(dL/dNORMED)
@kernel(INTS, INT64, INT64, INT64, INT64, FLOATS)
def attention_backward(job, thread, number, first_row, rows, gradients):
    """D_X, the gradient of X_MIDDLE, becomes that of X."""
    width, size, heads, groups = job[at.WIDTH], job[at.HEAD], job[at.HEADS], job[at.GROUPS]
    time, wide = job[at.TIME], (heads + 2 * groups) * size
    layer = skip(ints(job[at.LAYER_TABLE]), number * at.LAYER_SIZE)
    attended = workspace(job, thread, number, at.ATTENDED)
    d_attended = workspace(job, thread, 0, at.D_ATTENDED)
    _project_backward(
        job, thread, skip(layer, at.W_OUTPUT), d_attended, attended, heads * size, first_row, rows,
        4 * number + 1, gradients,
    )  # fmt: skip
    prepared, qkv = (
        workspace(job, thread, number, at.PREPARED),
        workspace(job, thread, number, at.QKV),
    )
    d_prepared, d_qkv = (
        workspace(job, thread, 0, at.D_PREPARED),
        workspace(job, thread, 0, at.D_QKV),
    )
    log_sums = workspace(job, thread, number, at.LOG_SUMS)
    scratch = workspace(job, thread, 0, at.ATTENTION_SCRATCH)
    block = workspace(job, thread, 0, at.BLOCK)
    for window in range(rows // time):
        start, sequence = window * time, first_row // time + window
        pair, narrow = start * (heads + groups) * size, start * heads * size
        kept = skip(prepared, pair), skip(qkv, start * wide)
        result = skip(attended, narrow)
        sums = skip(log_sums, start * heads)
        found = skip(d_attended, narrow), skip(d_prepared, pair), skip(d_qkv, start * wide)
        if job[at.PRODUCTS] == at.FLOAT32:
            attend_backward(job, number, sequence, *kept, result, sums, *found, scratch)
        else:
            attend_backward_bfloat16(job, number, sequence, *kept, sums, *found, scratch, block)
    factors = workspace(job, thread, number, at.HEAD_FACTORS)
    prepare_heads_backward(job, rows, d_qkv, d_prepared, qkv, factors, layer, gradients)
    d_x, d_normed = workspace(job, thread, 0, at.D_X), workspace(job, thread, 0, at.D_NORMED)
    linear_backward(
        job, thread, d_normed, width, d_qkv, wide, workspace(job, thread, number, at.NORMED), width,
        rows, skip(layer, at.W_ATTENTION), gradients,
    )  # fmt: skip
    norm_rows_backward(
        d_x, d_normed, workspace(job, thread, number, at.X), rows, width, job[at.NORM],
        skip(layer, at.ATTENTION_NORM), workspace(job, thread, number, at.MOMENTS), gradients,
    )  # fmt: skip


@kernel(INTS, INT64, INT64, INT64, INT64)
def mlp_forward(job, thread, number, first_row, rows):
    """The next block's X (or X_LAST) = X_MIDDLE + dropout(MLP(norm(X_MIDDLE)))."""
    width, hidden = job[at.WIDTH], job[at.HIDDEN]
    inner = 2 * hidden if job[at.MLP] == at.SWIGLU else hidden  # gate and up side by side
    layer = skip(ints(job[at.LAYER_TABLE]), number * at.LAYER_SIZE)
    middle = workspace(job, thread, number, at.X_MIDDLE)
    normed = workspace(job, thread, number, at.NORMED_MIDDLE)
    moments = workspace(job, thread, number, at.MOMENTS_MIDDLE)
    norm, eps = skip(layer, at.MLP_NORM), floats(job[at.REALS])[at.EPS]
    norm_rows(normed, middle, rows, width, job[at.NORM], norm, eps, moments)
    pre_activation = workspace(job, thread, number, at.PRE_ACTIVATION)
    activated = workspace(job, thread, number, at.ACTIVATED)
    w_in = skip(layer, at.W_MLP_IN)
    linear_forward(job, thread, pre_activation, inner, normed, width, rows, w_in, 0)
    if job[at.PRODUCTS] == at.FLOAT32:
        activate_rows(activated, pre_activation, rows, hidden, job[at.MLP])
    else:
        activate_vectors(activated, pre_activation, rows, hidden, job[at.MLP])
    after = workspace(job, thread, 0, at.X_LAST)
    if number + 1 < job[at.LAYERS]:
        after = workspace(job, thread, number + 1, at.X)
    _copy(after, middle, rows * width)
    _project(
        job, thread, skip(layer, at.W_MLP_OUT), after, activated, hidden, first_row, rows,
        4 * number + 2,
    )  # fmt: skip


# The right column of the lower half of the picture, from the bottom to the top:
#
#     dL/dACTIVATED = dropout'(dL/dX_next) W_MLP_OUT
#     dL/dPRE_ACTIVATION = activation'(dL/dACTIVATED)       see `activate_rows_backward`
#     dL/dNORMED_MIDDLE = dL/dPRE_ACTIVATION W_MLP_IN
#     dL/dX_MIDDLE = dL/dX_next + norm'(dL/dNORMED_MIDDLE)
@kernel(INTS, INT64, INT64, INT64, INT64, FLOATS)
def mlp_backward(job, thread, number, first_row, rows, gradients):
    """D_X, the gradient of the block's result, becomes that of X_MIDDLE."""
    width, hidden = job[at.WIDTH], job[at.HIDDEN]
    inner = 2 * hidden if job[at.MLP] == at.SWIGLU else hidden
    layer = skip(ints(job[at.LAYER_TABLE]), number * at.LAYER_SIZE)
    d_activated = workspace(job, thread, 0, at.D_ACTIVATED)
    _project_backward(
        job, thread, skip(layer, at.W_MLP_OUT), d_activated,
        workspace(job, thread, number, at.ACTIVATED), hidden, first_row, rows, 4 * number + 2,
        gradients,
    )  # fmt: skip
    # PRE_ACTIVATION is not needed again, so its gradient replaces it.
    d_pre_activation = workspace(job, thread, number, at.PRE_ACTIVATION)
    if job[at.PRODUCTS] == at.FLOAT32:
        activate_rows_backward(d_pre_activation, d_activated, rows, hidden, job[at.MLP])
    else:
        activate_vectors_backward(d_pre_activation, d_activated, rows, hidden, job[at.MLP])
    d_x, d_normed = workspace(job, thread, 0, at.D_X), workspace(job, thread, 0, at.D_NORMED)
    linear_backward(
        job, thread, d_normed, width, d_pre_activation, inner,
        workspace(job, thread, number, at.NORMED_MIDDLE), width, rows, skip(layer, at.W_MLP_IN),
        gradients,
    )  # fmt: skip
    norm_rows_backward(
        d_x, d_normed, workspace(job, thread, number, at.X_MIDDLE), rows, width, job[at.NORM],
        skip(layer, at.MLP_NORM), workspace(job, thread, number, at.MOMENTS_MIDDLE), gradients,
    )  # fmt: skip


@kernel(INTS, INT64, INT64, INT64, INT64)
def block_forward(job, thread, number, first_row, rows):
    """One block, from its X to the next one's (or X_LAST)."""
    attention_forward(job, thread, number, first_row, rows)
    mlp_forward(job, thread, number, first_row, rows)


# dL/dX = dL/dX_next (I + MLP') (I + attention'), in the order of the chain rule: last step first.
@kernel(INTS, INT64, INT64, INT64, INT64, FLOATS)
def block_backward(job, thread, number, first_row, rows, gradients):
    """D_X, the gradient of the block's result, becomes that of the block's X."""
    mlp_backward(job, thread, number, first_row, rows, gradients)
    attention_backward(job, thread, number, first_row, rows, gradients)
