"""Positions of all fields in the arrays that Python passes to the training kernels.

As for decoding (see `mygpt.cpu.common.layout`), a kernel gets the address of a job: one row of
int64 with sizes, switches, and addresses of arrays of float32 (of int64 for ids).

    job       | THREADS | ... | LAYER_TABLE | ... | GRADIENTS | ... | WORKSPACE | ... |
                                     |                 |                 |
                                     |                 |                 v  for each thread
                                     |                 |                 | layer 0 | ... | shared |
                                     |                 v  for each thread, in the model's order
                                     v                 | parameter 0 | parameter 1 | ... |
              for each layer: | 4 norms of 4 fields | 4 matrices of 8 fields |

Each list below names the fields of one kind of row in their order.
Letters: B batch, T time, C embedding, D head size, G key/value heads, H heads, M MLP width,
N layers, Q width of query, key and value together, R rows of a chunk, V vocabulary.
"""

from __future__ import annotations

from mygpt.cpu.common.layout import LANES, PANEL, ROWS

# Queries whose weights are kept at once in attention's backward pass: whole tiles. More make the
# sums of dL/dK and dL/dV longer and their loads and stores fewer; fewer keep the buffers (2 *
# QUERIES * T float32: 48 KB at 96 queries and T = 64) in the cache. No measurement of the number is
# recorded.
QUERIES = 16 * ROWS

JOB_SIZE = 43
(
    # the run; CHUNK is sequences, LOSSES_ONLY 1 where no gradients are wanted
    THREADS, BATCH, TIME, CHUNK, LOSSES_ONLY, SEED,
    # the shape
    LAYERS, WIDTH, HEADS, GROUPS, HEAD, HIDDEN, VOCAB, NORM, ROTARY, MLP, QK_NORM,
    # the address of the numbers that are not integers
    REALS,
    # ids: (B T) each
    IDS, TARGETS,
    # the model: addresses; of EMBEDDING_GRADIENT and POSITIONS_GRADIENT the offset in GRADIENTS
    LAYER_TABLE, EMBEDDING, EMBEDDING_GRADIENT, POSITIONS, POSITIONS_GRADIENT, COSINES, SINES,
    FINAL_NORM, HEAD_MATRIX,
    # gradients: the address of the first thread's, the number of floats of each thread's
    GRADIENTS, GRADIENTS_SIZE,
    # the result: the loss of each row, (B T,)
    LOSSES,
    # workspace: the address of the first thread's, the number of floats of each thread's, the table
    # of the offsets of the fields below, the number of floats of a layer
    WORKSPACE, WORKSPACE_SIZE, WORKSPACE_TABLE, LAYER_WORKSPACE,
    # the table of all matrices' addresses, and their number
    MATRICES, MATRIX_COUNT,
    # Muon: the table of its matrices, their number, its iterations; workspace as above
    MUON_TABLE, MUON_COUNT, MUON_ITERATIONS, MUON_WORKSPACE, MUON_WORKSPACE_SIZE,
) = range(JOB_SIZE)  # fmt: skip

# REALS: float32 numbers.
REALS_SIZE = 6
EPS, DROPOUT, GRADIENT_SCALE, MUON_RATE, MUON_DECAY, MOMENTUM = range(REALS_SIZE)

# A matrix of a linear layer: addresses of its weight (O, I), of its bias (0 for none), of its
# panels for the forward and for the backward pass (see `products`); O and I; the offsets of the
# weight's and the bias's gradient in a thread's gradients.
MATRIX_SIZE = 8
WEIGHT, BIAS, FORWARD, BACKWARD, OUTPUTS, INPUTS, GRADIENT, BIAS_GRADIENT = range(MATRIX_SIZE)

# A norm: addresses of its weight and of its bias (0 for none), and the offsets of their gradients.
NORM_SIZE = 4
SCALE, SHIFT, SCALE_GRADIENT, SHIFT_GRADIENT = range(NORM_SIZE)

# One layer: its norms, then its matrices.
ATTENTION_NORM, MLP_NORM, QUERY_NORM, KEY_NORM = range(0, 4 * NORM_SIZE, NORM_SIZE)
W_ATTENTION, W_OUTPUT, W_MLP_IN, W_MLP_OUT = range(
    4 * NORM_SIZE, 4 * NORM_SIZE + 4 * MATRIX_SIZE, MATRIX_SIZE
)
LAYER_SIZE = 4 * NORM_SIZE + 4 * MATRIX_SIZE

# A matrix that Muon updates, which may be some rows of a parameter: addresses of its weights,
# of its momentum, of its gradient; its rows and columns.
MUON_SIZE = 5
MUON_WEIGHT, MUON_MOMENTUM, MUON_GRADIENT, MUON_ROWS, MUON_COLUMNS = range(MUON_SIZE)

# The fields of a thread's workspace. Those that the forward pass of each layer leaves for its
# backward pass, row-major with R rows (the picture of a block is in `block`):
#
#     X                (R, C)           the residual stream before the block
#     MOMENTS          (R, 2)           mean and 1 / standard deviation of its rows
#     NORMED           (R, C)           its norm
#     QKV              (R, Q)           queries, keys, values
#     PREPARED         (R, (H + G) D)   queries and keys after norm and rotation
#     HEAD_FACTORS     (R, H + G)       1 / root mean square of each query and key
#     LOG_SUMS         (R, H)           log-sum-exp of the scores
#     ATTENDED         (R, H D)         the result of attention
#     X_MIDDLE         (R, C)           the residual stream between attention and MLP
#     MOMENTS_MIDDLE   (R, 2)
#     NORMED_MIDDLE    (R, C)
#     PRE_ACTIVATION   (R, M or 2M)     of SwiGLU gate and up
#     ACTIVATED        (R, M)
LAYER_FIELDS = 13
(
    X, MOMENTS, NORMED, QKV, PREPARED, HEAD_FACTORS, LOG_SUMS, ATTENDED, X_MIDDLE, MOMENTS_MIDDLE,
    NORMED_MIDDLE, PRE_ACTIVATION, ACTIVATED,
) = range(LAYER_FIELDS)  # fmt: skip
# The fields that all layers share: the end of the residual stream, whose LOGITS (R, V padded)
# become their gradients; the gradients of a layer's fields in the backward pass; and two scratch
# buffers, PROJECTED (R, C) and that of `attention`.
WORKSPACE_FIELDS = LAYER_FIELDS + 12
(
    X_LAST, MOMENTS_LAST, NORMED_LAST, LOGITS, D_X, D_NORMED, D_QKV, D_PREPARED, D_ATTENDED,
    D_ACTIVATED, PROJECTED, ATTENTION_SCRATCH,
) = range(LAYER_FIELDS, WORKSPACE_FIELDS)  # fmt: skip


def padded(count: int) -> int:
    """`count` rounded up to whole vectors."""
    return -(-count // LANES) * LANES


__all__ = ["LANES", "PANEL", "ROWS"]
