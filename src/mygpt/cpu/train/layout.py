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

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mygpt.core.config import GPTConfig
from mygpt.cpu.common.layout import (
    FLOAT32,
    GELU,
    LANES,
    LINES,
    PAIRWISE,
    PANEL,
    RMS_NORM,
    ROWS,
    SWIGLU,
    TILES,
    padded,
)

# Queries whose weights are kept at once in attention's backward pass: whole tiles. More make the
# sums of dL/dK and dL/dV longer and their loads and stores fewer; fewer keep the buffers (2 *
# QUERIES * T float32: 48 KB at 96 queries and T = 64) in the cache. No measurement of the number is
# recorded.
QUERIES = 16 * ROWS

# Words of two bfloat16 to whose multiple the inner dimension of such products is rounded up: a line
# of a tile register, and whole vectors (see `bfloat16`).
PAIRS = LINES
# Queries whose scores for all keys are columns of one matrix there: two tile registers, or vectors.
ACROSS = 2 * LINES

JOB_SIZE = 46
(
    # the run; CHUNK is sequences, LOSSES_ONLY 1 where no gradients are wanted
    THREADS, BATCH, TIME, CHUNK, LOSSES_ONLY, SEED,
    # FLOAT32, PAIRWISE or TILES; the address of the tile registers' shapes
    PRODUCTS, TILE_SHAPES,
    # the shape
    LAYERS, WIDTH, HEADS, GROUPS, HEAD, HIDDEN, VOCAB, NORM, ROTARY, MLP, QK_NORM,
    # the address of the numbers that are not integers
    REALS,
    # ids: (B T) each; the distributions that smooth the targets, (B T, V), or 0 for none
    IDS, TARGETS, SOFT_TARGETS,
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
REALS_SIZE = 7
(
    EPS, DROPOUT, GRADIENT_SCALE, SMOOTHING, MUON_RATE, MUON_DECAY, MOMENTUM,
) = range(REALS_SIZE)  # fmt: skip

# A matrix of a linear layer: addresses of its weight (O, I), of its bias (0 for none), of its
# panels for the forward and for the backward pass (see `products`; 0 where the format is not
# used), of those of bfloat16; O and I; the offsets of the weight's and the bias's gradient in a
# thread's gradients.
MATRIX_SIZE = 10
(
    WEIGHT, BIAS, FORWARD, BACKWARD, FORWARD_PAIRS, BACKWARD_PAIRS, OUTPUTS, INPUTS, GRADIENT,
    BIAS_GRADIENT,
) = range(MATRIX_SIZE)  # fmt: skip

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
# become their gradients; the gradients of a layer's fields in the backward pass; two scratch
# buffers, PROJECTED (R, C) and that of `attention`; and those of `bfloat16`, for a product's packed
# operands and for a block that is packed.
WORKSPACE_FIELDS = LAYER_FIELDS + 15
(
    X_LAST, MOMENTS_LAST, NORMED_LAST, LOGITS, D_X, D_NORMED, D_QKV, D_PREPARED, D_ATTENDED,
    D_ACTIVATED, PROJECTED, ATTENTION_SCRATCH, LEFT, RIGHT, BLOCK,
) = range(LAYER_FIELDS, WORKSPACE_FIELDS)  # fmt: skip

# Rows of a chunk at most, or one window where that is longer. Few enough that the activations stay
# in the cache, many enough for tiles that are full (128 rows are 22 tiles of 6) and for each weight
# that is read to be used often. docs/lab-notes.md has the step with chunks of 128 rows: 67% to 87%
# of the speed of plain products. No other number of rows is recorded there.
_ROWS = 128
_FLOAT_BYTES = 4

# The workspaces of all threads follow each other; each consists of
#
#     | layer 0: X | MOMENTS | ... | ACTIVATED | layer 1: X | ... | X_LAST | ... | LOGITS | ... |
#      <-- `layer` floats ------------------->                    ^ num_layers * layer
#      <-- `floats`, rounded up to 1,024 (4 KiB, a page) ------------------------------------->


@dataclass(frozen=True)
class Workspace:
    """The layout of a thread's workspace.

    Attributes:
        chunk: windows that go through the model at once.
        starts: (WORKSPACE_FIELDS,) int64, where each field begins; a layer's field: in layer 0.
        layer: floats of one layer's fields.
        floats: floats of the whole workspace.
    """

    chunk: int
    starts: NDArray[np.int64]
    layer: int
    floats: int


def workspace_for(
    config: GPTConfig, batch: int, time: int, threads: int, products: int = FLOAT32
) -> Workspace:
    """The workspace of each of `threads` for batches of B windows of T."""
    chunk = max(1, min(_ROWS // time, -(-batch // threads)))
    width, heads, rows = config.embed_dim, config.num_heads, chunk * time
    prepared_heads = heads + config.kv_heads
    qkv = (prepared_heads + config.kv_heads) * config.head_size
    prepared = prepared_heads * config.head_size
    attended, hidden = heads * config.head_size, config.mlp_hidden
    inner = hidden * (2 if config.mlp == "swiglu" else 1)
    sizes = {
        X: width, MOMENTS: 2, NORMED: width, QKV: qkv, PREPARED: prepared,
        HEAD_FACTORS: prepared_heads, LOG_SUMS: heads, ATTENDED: attended,
        X_MIDDLE: width, MOMENTS_MIDDLE: 2, NORMED_MIDDLE: width, PRE_ACTIVATION: inner,
        ACTIVATED: hidden, X_LAST: width, MOMENTS_LAST: 2, NORMED_LAST: width,
        LOGITS: padded(config.vocab_size), D_X: width, D_NORMED: width,
        D_QKV: qkv, D_PREPARED: prepared, D_ATTENDED: attended, D_ACTIVATED: hidden,
        PROJECTED: width,
    }  # fmt: skip
    floats = {field: padded(rows * size) for field, size in sizes.items()}
    floats[ATTENTION_SCRATCH] = 2 * (config.head_size + QUERIES) * padded(time)
    floats |= _packed_floats(config, rows, products)
    if products != FLOAT32:  # losses are computed in float32, gradients are not
        attention = _attention_floats(config.head_size, time)
        floats[ATTENTION_SCRATCH] = max(floats[ATTENTION_SCRATCH], attention)
    starts, layer = np.zeros(WORKSPACE_FIELDS, np.int64), 0
    for field in range(LAYER_FIELDS):
        starts[field] = layer
        layer += floats[field]
    end = config.num_layers * layer
    for field in range(LAYER_FIELDS, WORKSPACE_FIELDS):
        starts[field] = end
        end += floats[field]
    return Workspace(chunk, starts, layer, -(-end // 1024) * 1024)


def pairs_of(depth: int) -> int:
    """Words of two bfloat16 for an inner dimension of `depth`."""
    return -(-depth // (2 * PAIRS)) * PAIRS


def _packed_floats(config: GPTConfig, rows: int, products: int) -> dict[int, int]:
    """The sizes of `bfloat16`'s buffers for a chunk of R rows; the words have a float's size."""
    if products == FLOAT32:
        return dict.fromkeys((LEFT, RIGHT, BLOCK), 0)
    attended = config.num_heads * config.head_size
    qkv = attended + 2 * config.kv_heads * config.head_size
    hidden = config.mlp_hidden
    inner = hidden * (2 if config.mlp == "swiglu" else 1)
    outputs = max(qkv, config.embed_dim, inner, config.vocab_size)
    inputs = max(config.embed_dim, attended, hidden)
    lines = -(-rows // LINES) * LINES  # rows: tile registers read 16 at once
    right = inputs * pairs_of(rows)
    transposed = -(-outputs // LINES) * LINES * pairs_of(rows)
    left = max(lines * pairs_of(max(inputs, outputs)), transposed)
    return {LEFT: left, RIGHT: right, BLOCK: 2 * LINES * LINES}


def _attention_floats(size: int, time: int) -> int:
    """The size of `attention_bfloat16`'s scratch in its backward pass, which needs more."""
    depth, half = pairs_of(size), pairs_of(time)
    key_value_head = half * (4 * depth + size)
    queries = 2 * depth * ACROSS + ACROSS * size + half * (4 * ACROSS + 4 * ACROSS // 2 + ACROSS)
    return key_value_head + queries + (size + 2) * ACROSS


def step_bytes(
    config: GPTConfig, batch: int, time: int, threads: int, products: int = FLOAT32
) -> int:
    """Bytes that a step takes in addition to weights, optimizer state and gradients."""
    workspace = workspace_for(config, batch, time, threads, products)
    workspaces = _FLOAT_BYTES * threads * workspace.floats
    # Two copies of each weight in float32; or one for validation, and two in bfloat16.
    panels = 2 * _FLOAT_BYTES * config.num_parameters()
    rows = batch * time * (16 + _FLOAT_BYTES)  # two ids and a loss each
    return workspaces + panels + rows


__all__ = [
    "FLOAT32", "GELU", "LANES", "PAIRWISE", "PANEL", "RMS_NORM", "ROWS", "SWIGLU", "TILES",
]  # fmt: skip
