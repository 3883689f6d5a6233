"""One training step of a GPT as machine code: losses and gradients of a batch, chunk by chunk.

Each thread takes its share of the sequences, a few at a time, through the whole model and back,
so that what lies between stays in the cache. The twin of `mygpt.core.model` and torch's autograd.
Letters: B batch, T time, C embedding, D head size, G key/value heads, H heads, M MLP width,
N layers, Q width of query, key and value together, R rows of a chunk (whole sequences),
V vocabulary.
"""

from __future__ import annotations

from mygpt.engines.cpu import layout as kinds
from mygpt.engines.cpu.arithmetic import f32, part_start
from mygpt.engines.cpu.simd import FLOATS, INT64, INTS, floats, ints, kernel, skip
from mygpt.training.compiled import layout as at
from mygpt.training.compiled.arithmetic import (
    activate_rows,
    activate_rows_backward,
    cross_entropy_row,
    drop,
    dropout_key,
    norm_rows,
    norm_rows_backward,
    prepare_head,
    prepare_head_backward,
)
from mygpt.training.compiled.attention import attend, attend_backward
from mygpt.training.compiled.products import linear_backward, linear_forward, pack_matrix

_ZERO = f32(0)


@kernel(FLOATS, FLOATS, INT64)
def _copy(out, x, count):
    for i in range(count):
        out[i] = x[i]


@kernel(FLOATS, FLOATS, INT64)
def _add(out, x, count):
    for i in range(count):
        out[i] += x[i]


@kernel(INTS, INT64, INT64, INT64, returns=FLOATS)
def workspace(job, thread, layer, field):
    """A thread's buffer: a layer's own, or one that there is once."""
    start = ints(job[at.WORKSPACE_TABLE])[field] + thread * job[at.WORKSPACE_SIZE]
    if field < at.LAYER_FIELDS:
        start += layer * job[at.LAYER_WORKSPACE]
    return skip(floats(job[at.WORKSPACE]), start)


@kernel(INTS, INT64, INT64, INT64, FLOATS)
def _drop_rows(job, site, first_row, rows, x):
    rate = floats(job[at.REALS])[at.DROPOUT]
    if rate > _ZERO:
        width = job[at.WIDTH]
        drop(x, rows * width, dropout_key(job[at.SEED], site), first_row * width, rate)


@kernel(INTS, INT64, INT64, FLOATS)
def _embed(job, first_row, rows, x):
    """x (R, C) = token plus position embeddings."""
    width, time = job[at.WIDTH], job[at.TIME]
    ids, embedding = ints(job[at.IDS]), floats(job[at.EMBEDDING])
    for row in range(rows):
        out = skip(x, row * width)
        token = skip(embedding, ids[first_row + row] * width)
        for i in range(width):
            out[i] = token[i]
        if job[at.POSITIONS] != 0:
            position = skip(floats(job[at.POSITIONS]), (first_row + row) % time * width)
            for i in range(width):
                out[i] += position[i]
    _drop_rows(job, 0, first_row, rows, x)


@kernel(INTS, INT64, FLOATS, FLOATS, FLOATS, INTS)
def prepare_heads(job, rows, turned, combined, kept, layer):
    """turned (R, (H + G) D) = queries and keys, normalised and turned where the model does."""
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
                skip(turned, row * stride + head * size), skip(combined, row * wide + head * size),
                size, norm, job[at.QK_NORM], job[at.ROTARY], cosines, sines, eps,
                skip(kept, row * (heads + groups) + head),
            )  # fmt: skip


@kernel(INTS, INT64, FLOATS, FLOATS, FLOATS, FLOATS, INTS, FLOATS)
def prepare_heads_backward(job, rows, d_combined, d_turned, combined, kept, layer, gradients):
    """The queries' and keys' columns of d_combined from d_turned."""
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
                skip(d_combined, place), skip(d_turned, row * stride + head * size),
                skip(combined, place), size, norm, job[at.QK_NORM], job[at.ROTARY], cosines,
                sines, skip(kept, row * (heads + groups) + head), gradients,
            )  # fmt: skip


@kernel(INTS, INTS, FLOATS, FLOATS, INT64, INT64, INT64, INT64, FLOATS)
def _project(job, matrix, out, x, x_stride, first_row, rows, site, scratch):
    """out += dropout(x W^T + b): what a block adds to the residual stream."""
    width = job[at.WIDTH]
    if floats(job[at.REALS])[at.DROPOUT] > _ZERO:
        linear_forward(scratch, width, x, x_stride, rows, matrix, 0)
        _drop_rows(job, site, first_row, rows, scratch)
        _add(out, scratch, rows * width)
    else:
        linear_forward(out, width, x, x_stride, rows, matrix, 1)


@kernel(INTS, INT64, INT64, INT64, INT64)
def block_forward(job, thread, number, first_row, rows):
    """One block, from its X to the next one's (or X_LAST)."""
    width, size, heads, groups = job[at.WIDTH], job[at.HEAD], job[at.HEADS], job[at.GROUPS]
    time, hidden, wide = job[at.TIME], job[at.HIDDEN], (heads + 2 * groups) * size
    inner = 2 * hidden if job[at.MLP] == kinds.SWIGLU else hidden
    layer = skip(ints(job[at.LAYER_TABLE]), number * at.LAYER_SIZE)
    eps = floats(job[at.REALS])[at.EPS]
    x, normed = workspace(job, thread, number, at.X), workspace(job, thread, number, at.NORMED)
    combined, turned = (
        workspace(job, thread, number, at.QKV),
        workspace(job, thread, number, at.PREPARED),
    )
    mixed, scratch = (
        workspace(job, thread, number, at.ATTENDED),
        workspace(job, thread, 0, at.PROJECTED),
    )
    norm = skip(layer, at.ATTENTION_NORM)
    moments = workspace(job, thread, number, at.MOMENTS)
    norm_rows(normed, x, rows, width, job[at.NORM], norm, eps, moments)
    linear_forward(combined, wide, normed, width, rows, skip(layer, at.W_ATTENTION), 0)
    prepare_heads(
        job, rows, turned, combined, workspace(job, thread, number, at.HEAD_FACTORS), layer
    )
    for window in range(rows // time):
        start = window * time
        attend(
            job, number, first_row // time + window,
            skip(turned, start * (heads + groups) * size), skip(combined, start * wide),
            skip(mixed, start * heads * size),
            skip(workspace(job, thread, number, at.LOG_SUMS), start * heads),
            workspace(job, thread, 0, at.ATTENTION_SCRATCH),
        )  # fmt: skip
    between = workspace(job, thread, number, at.X_MIDDLE)
    _copy(between, x, rows * width)
    _project(
        job, skip(layer, at.W_OUTPUT), between, mixed, heads * size, first_row, rows,
        4 * number + 1, scratch,
    )  # fmt: skip
    normed = workspace(job, thread, number, at.NORMED_MIDDLE)
    moments = workspace(job, thread, number, at.MOMENTS_MIDDLE)
    norm_rows(normed, between, rows, width, job[at.NORM], skip(layer, at.MLP_NORM), eps, moments)
    numbers = workspace(job, thread, number, at.PRE_ACTIVATION)
    active = workspace(job, thread, number, at.ACTIVATED)
    linear_forward(numbers, inner, normed, width, rows, skip(layer, at.W_MLP_IN), 0)
    activate_rows(active, numbers, rows, hidden, job[at.MLP])
    after = workspace(job, thread, 0, at.X_LAST)
    if number + 1 < job[at.LAYERS]:
        after = workspace(job, thread, number + 1, at.X)
    _copy(after, between, rows * width)
    _project(
        job, skip(layer, at.W_MLP_OUT), after, active, hidden, first_row, rows, 4 * number + 2,
        scratch,
    )  # fmt: skip


@kernel(INTS, INT64, INT64, INT64, INT64, FLOATS)
def block_backward(job, thread, number, first_row, rows, gradients):
    """D_X becomes the gradient of the block's X."""
    width, size, heads, groups = job[at.WIDTH], job[at.HEAD], job[at.HEADS], job[at.GROUPS]
    time, hidden, wide = job[at.TIME], job[at.HIDDEN], (heads + 2 * groups) * size
    inner = 2 * hidden if job[at.MLP] == kinds.SWIGLU else hidden
    layer = skip(ints(job[at.LAYER_TABLE]), number * at.LAYER_SIZE)
    d_x, d_normed = workspace(job, thread, 0, at.D_X), workspace(job, thread, 0, at.D_NORMED)
    d_hidden, d_mixed = (
        workspace(job, thread, 0, at.D_ACTIVATED),
        workspace(job, thread, 0, at.D_ATTENDED),
    )
    d_combined, d_turned = (
        workspace(job, thread, 0, at.D_QKV),
        workspace(job, thread, 0, at.D_PREPARED),
    )
    projected = workspace(job, thread, 0, at.PROJECTED)

    numbers = workspace(job, thread, number, at.PRE_ACTIVATION)
    _copy(projected, d_x, rows * width)
    _drop_rows(job, 4 * number + 2, first_row, rows, projected)
    linear_backward(
        d_hidden, hidden, projected, width, workspace(job, thread, number, at.ACTIVATED), hidden,
        rows, skip(layer, at.W_MLP_OUT), gradients,
    )  # fmt: skip
    activate_rows_backward(numbers, d_hidden, rows, hidden, job[at.MLP])
    linear_backward(
        d_normed, width, numbers, inner, workspace(job, thread, number, at.NORMED_MIDDLE), width,
        rows, skip(layer, at.W_MLP_IN), gradients,
    )  # fmt: skip
    norm_rows_backward(
        d_x, d_normed, workspace(job, thread, number, at.X_MIDDLE), rows, width, job[at.NORM],
        skip(layer, at.MLP_NORM), workspace(job, thread, number, at.MOMENTS_MIDDLE), gradients,
    )  # fmt: skip

    mixed, turned = (
        workspace(job, thread, number, at.ATTENDED),
        workspace(job, thread, number, at.PREPARED),
    )
    combined = workspace(job, thread, number, at.QKV)
    _copy(projected, d_x, rows * width)
    _drop_rows(job, 4 * number + 1, first_row, rows, projected)
    linear_backward(
        d_mixed, heads * size, projected, width, mixed, heads * size, rows,
        skip(layer, at.W_OUTPUT), gradients,
    )  # fmt: skip
    for window in range(rows // time):
        start = window * time
        pair, narrow = start * (heads + groups) * size, start * heads * size
        attend_backward(
            job, number, first_row // time + window, skip(turned, pair),
            skip(combined, start * wide), skip(mixed, narrow),
            skip(workspace(job, thread, number, at.LOG_SUMS), start * heads), skip(d_mixed, narrow),
            skip(d_turned, pair), skip(d_combined, start * wide),
            workspace(job, thread, 0, at.ATTENTION_SCRATCH),
        )  # fmt: skip
    factors = workspace(job, thread, number, at.HEAD_FACTORS)
    prepare_heads_backward(job, rows, d_combined, d_turned, combined, factors, layer, gradients)
    linear_backward(
        d_normed, width, d_combined, wide, workspace(job, thread, number, at.NORMED), width, rows,
        skip(layer, at.W_ATTENTION), gradients,
    )  # fmt: skip
    norm_rows_backward(
        d_x, d_normed, workspace(job, thread, number, at.X), rows, width, job[at.NORM],
        skip(layer, at.ATTENTION_NORM), workspace(job, thread, number, at.MOMENTS), gradients,
    )  # fmt: skip


@kernel(INTS, INT64, INT64, INT64, FLOATS)
def head_forward_and_backward(job, thread, first_row, rows, gradients):
    """Losses of the rows, and D_X: the gradient of X_LAST."""
    width, vocab = job[at.WIDTH], job[at.VOCAB]
    room = (vocab + at.LANES - 1) // at.LANES * at.LANES
    reals, losses = floats(job[at.REALS]), floats(job[at.LOSSES])
    x, normed = workspace(job, thread, 0, at.X_LAST), workspace(job, thread, 0, at.NORMED_LAST)
    moments, logits = (
        workspace(job, thread, 0, at.MOMENTS_LAST),
        workspace(job, thread, 0, at.LOGITS),
    )
    norm, matrix = ints(job[at.FINAL_NORM]), ints(job[at.HEAD_MATRIX])
    norm_rows(normed, x, rows, width, job[at.NORM], norm, reals[at.EPS], moments)
    linear_forward(logits, room, normed, width, rows, matrix, 0)
    targets = ints(job[at.TARGETS])
    for row in range(rows):
        losses[first_row + row] = cross_entropy_row(
            skip(logits, row * room), vocab, targets[first_row + row], reals[at.GRADIENT_SCALE]
        )
    if job[at.LOSSES_ONLY]:
        return
    d_x, d_normed = workspace(job, thread, 0, at.D_X), workspace(job, thread, 0, at.D_NORMED)
    linear_backward(d_normed, width, logits, room, normed, width, rows, matrix, gradients)
    for i in range(rows * width):
        d_x[i] = _ZERO
    norm_rows_backward(d_x, d_normed, x, rows, width, job[at.NORM], norm, moments, gradients)


@kernel(INTS, INT64, INT64, INT64, FLOATS)
def embed_backward(job, thread, first_row, rows, gradients):
    """Gradients of the token and position embeddings from D_X."""
    width, time = job[at.WIDTH], job[at.TIME]
    d_x, ids = workspace(job, thread, 0, at.D_X), ints(job[at.IDS])
    _drop_rows(job, 0, first_row, rows, d_x)
    tokens = skip(gradients, job[at.EMBEDDING_GRADIENT])
    positions = skip(gradients, job[at.POSITIONS_GRADIENT])
    for row in range(rows):
        own = skip(d_x, row * width)
        _add(skip(tokens, ids[first_row + row] * width), own, width)
        if job[at.POSITIONS] != 0:
            _add(skip(positions, (first_row + row) % time * width), own, width)


@kernel(INT64, INT64, returns=INT64)
def pack_weights(job_address, part):
    """Lay out this part's share of the matrices for the step."""
    job = ints(job_address)
    count, parts = job[at.MATRIX_COUNT], job[at.THREADS]
    for number in range(part, count, parts):
        pack_matrix(ints(ints(job[at.MATRICES])[number]))
    return 0


@kernel(INT64, INT64, returns=INT64)
def losses_and_gradients(job_address, part):
    """Losses of this part's sequences, and their gradients into this part's own, unless losses
    alone are wanted.
    """
    job = ints(job_address)
    batch, time, parts = job[at.BATCH], job[at.TIME], job[at.THREADS]
    gradients = skip(floats(job[at.GRADIENTS]), part * job[at.GRADIENTS_SIZE])
    if not job[at.LOSSES_ONLY]:
        for i in range(job[at.GRADIENTS_SIZE]):
            gradients[i] = _ZERO
    first, last = part_start(batch, part, parts), part_start(batch, part + 1, parts)
    for sequence in range(first, last, job[at.CHUNK]):
        row, rows = sequence * time, (min(sequence + job[at.CHUNK], last) - sequence) * time
        x = workspace(job, part, 0, at.X)
        _embed(job, row, rows, x)
        for layer in range(job[at.LAYERS]):
            block_forward(job, part, layer, row, rows)
        head_forward_and_backward(job, part, row, rows, gradients)
        if job[at.LOSSES_ONLY]:
            continue
        for layer in range(job[at.LAYERS] - 1, -1, -1):
            block_backward(job, part, layer, row, rows, gradients)
        embed_backward(job, part, row, rows, gradients)
    return 0
