"""One training step of a GPT as machine code: losses and gradients of a batch.

It computes what `mygpt.core.model` with torch's autograd computes; that is its reference
implementation. Each thread takes its part of the sequences through the whole model, forward and
backward, in chunks of a few sequences (see `workspace_for`), so that the activations of a chunk
stay in the cache. Threads wait for each other only after packing the weights and at the end of a
step; each sums the gradients of its sequences in an array of its own.

In all formulas dX is the gradient of the loss L with respect to X, dL/dX.
Letters: B batch, T time, C embedding, R rows of a chunk (whole sequences), V vocabulary.
"""

from __future__ import annotations

from mygpt.cpu.common.arithmetic import f32, padded, part_start
from mygpt.cpu.common.simd import FLOATS, INT64, INTS, floats, ints, kernel, skip, words
from mygpt.cpu.train import layout as at
from mygpt.cpu.train.amx import begin_tiles, end_tiles
from mygpt.cpu.train.arithmetic import cross_entropy_row, norm_rows, norm_rows_backward, smooth_row
from mygpt.cpu.train.block import add_row, block_backward, block_forward, drop_rows
from mygpt.cpu.train.products import linear_backward, linear_forward, pack_matrix, workspace

_ZERO = f32(0)


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
        # A chunk consists of whole sequences, so a row's position is its number modulo T.
        if job[at.POSITIONS] != 0:
            position = skip(floats(job[at.POSITIONS]), (first_row + row) % time * width)
            for i in range(width):
                out[i] += position[i]
    drop_rows(job, 0, first_row, rows, x)


# x_r = E[id_r] + P[r mod T], so
#     dL/dE[v] = sum over the rows r with id_r == v of dL/dx_r
#     dL/dP[t] = sum over the rows r with r mod T == t of dL/dx_r
# Where the head is tied to E, `head_forward_and_backward` has added its part to the same array.
@kernel(INTS, INT64, INT64, INT64, FLOATS)
def embed_backward(job, thread, first_row, rows, gradients):
    """Gradients of the token and position embeddings from D_X."""
    width, time = job[at.WIDTH], job[at.TIME]
    d_x, ids = workspace(job, thread, 0, at.D_X), ints(job[at.IDS])
    drop_rows(job, 0, first_row, rows, d_x)
    tokens = skip(gradients, job[at.EMBEDDING_GRADIENT])
    positions = skip(gradients, job[at.POSITIONS_GRADIENT])
    for row in range(rows):
        own = skip(d_x, row * width)
        add_row(skip(tokens, ids[first_row + row] * width), own, width)
        if job[at.POSITIONS] != 0:
            add_row(skip(positions, (first_row + row) % time * width), own, width)


# z = norm(X_LAST) W^T, L = mean over all rows of the batch of cross_entropy(z, target):
#     dL/dz = (softmax(z) - onehot(target)) / (B T)        see `cross_entropy_row`
#           + s (onehot(target) - q) / (B T)               see `smooth_row`, for smoothed targets
#     dL/dNORMED_LAST = dL/dz W,  dL/dW += dL/dz^T NORMED_LAST
#     dL/dX_LAST = norm'(dL/dNORMED_LAST)
@kernel(INTS, INT64, INT64, INT64, FLOATS)
def head_forward_and_backward(job, thread, first_row, rows, gradients):
    """Losses of the rows, and D_X: the gradient of X_LAST."""
    width, vocab = job[at.WIDTH], job[at.VOCAB]
    columns = padded(vocab)  # of LOGITS
    reals, losses = floats(job[at.REALS]), floats(job[at.LOSSES])
    x, normed = workspace(job, thread, 0, at.X_LAST), workspace(job, thread, 0, at.NORMED_LAST)
    moments = workspace(job, thread, 0, at.MOMENTS_LAST)
    logits = workspace(job, thread, 0, at.LOGITS)
    norm, matrix = ints(job[at.FINAL_NORM]), ints(job[at.HEAD_MATRIX])
    norm_rows(normed, x, rows, width, job[at.NORM], norm, reals[at.EPS], moments)
    linear_forward(job, thread, logits, columns, normed, width, rows, matrix, 0)
    targets = ints(job[at.TARGETS])
    for row in range(rows):
        # GRADIENT_SCALE is 1 / (B T); the logits become their gradients.
        losses[first_row + row] = cross_entropy_row(
            skip(logits, row * columns), vocab, targets[first_row + row], reals[at.GRADIENT_SCALE]
        )
        if job[at.SOFT_TARGETS] != 0:
            smooth_row(
                skip(logits, row * columns), vocab, targets[first_row + row],
                skip(floats(job[at.SOFT_TARGETS]), (first_row + row) * vocab),
                reals[at.SMOOTHING] * reals[at.GRADIENT_SCALE],
            )  # fmt: skip
    if job[at.LOSSES_ONLY]:
        return
    d_x, d_normed = workspace(job, thread, 0, at.D_X), workspace(job, thread, 0, at.D_NORMED)
    linear_backward(
        job, thread, d_normed, width, logits, columns, normed, width, rows, matrix, gradients
    )
    # The norm's backward pass adds to D_X, and nothing else leads to X_LAST.
    for i in range(rows * width):
        d_x[i] = _ZERO
    norm_rows_backward(d_x, d_normed, x, rows, width, job[at.NORM], norm, moments, gradients)


@kernel(INT64, INT64, returns=INT64)
def pack_weights(job_address, part):
    """Pack this part's matrices into panels: their weights have changed since the last step."""
    job = ints(job_address)
    count, parts = job[at.MATRIX_COUNT], job[at.THREADS]
    for number in range(part, count, parts):
        pack_matrix(job, part, ints(ints(job[at.MATRICES])[number]))
    return 0


@kernel(INT64, INT64, returns=INT64)
def losses_and_gradients(job_address, part):
    """Losses of this part's sequences and, unless LOSSES_ONLY, their gradients.

    The gradients are in this part's own array; `sum_gradients` adds up those of all parts.
    """
    job = ints(job_address)
    batch, time, parts = job[at.BATCH], job[at.TIME], job[at.THREADS]
    gradients = skip(floats(job[at.GRADIENTS]), part * job[at.GRADIENTS_SIZE])
    # All kernels add to gradients: over rows, chunks, and the two uses of a tied embedding.
    if not job[at.LOSSES_ONLY]:
        for i in range(job[at.GRADIENTS_SIZE]):
            gradients[i] = _ZERO
    if job[at.PRODUCTS] == at.TILES:
        begin_tiles(words(job[at.TILE_SHAPES]))
    first, last = part_start(batch, part, parts), part_start(batch, part + 1, parts)
    # A chunk goes forward and backward before the next one begins: its activations are needed only
    # once and are then overwritten.
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
    if job[at.PRODUCTS] == at.TILES:
        end_tiles()
    return 0


@kernel(INT64, INT64, returns=INT64)
def sum_gradients(job_address, part):
    """Add the gradients of all parts to those of the first: this part's portion of them."""
    job = ints(job_address)
    size, parts = job[at.GRADIENTS_SIZE], job[at.THREADS]
    total = floats(job[at.GRADIENTS])
    first, last = part_start(size, part, parts), part_start(size, part + 1, parts)
    for other in range(1, parts):  # in this order, whatever the portions are
        add_row(skip(total, first), skip(total, other * size + first), last - first)
    return 0
