"""Where everything lies in the numbers that Python hands to the compiled step.

A job is one row of int64: sizes, switches, and addresses of arrays of float32 (of int64 for
ids). Each list below gives its fields' places in order.
Letters: B batch, T time, C embedding, D head size, G key/value heads, H heads, M MLP width,
N layers, Q width of query, key and value together, R rows of a chunk, V vocabulary.
"""

from __future__ import annotations

from mygpt.engines.cpu.layout import LANES, PANEL, ROWS

# Queries whose scores are held at once on the way back: whole tiles.
QUERIES = 16 * ROWS

JOB_SIZE = 43
(
    # the run; whether losses alone are wanted
    THREADS, BATCH, TIME, CHUNK, LOSSES_ONLY, SEED,
    # the shape
    LAYERS, WIDTH, HEADS, GROUPS, HEAD, HIDDEN, VOCAB, NORM, ROTARY, MLP, QK_NORM,
    # numbers that are no whole ones
    REALS,
    # ids: (B T) each
    IDS, TARGETS,
    # the model
    LAYER_TABLE, EMBEDDING, EMBEDDING_GRADIENT, POSITIONS, POSITIONS_GRADIENT, COSINES, SINES,
    FINAL_NORM, HEAD_MATRIX,
    # gradients: the address of the first thread's, the floats of each thread's
    GRADIENTS, GRADIENTS_SIZE,
    # what comes out: the loss of each row
    LOSSES,
    # room to work in: the address of the first thread's, the floats of each thread's, where in it
    # the fields below begin, the floats of a layer's
    WORKSPACE, WORKSPACE_SIZE, WORKSPACE_TABLE, LAYER_WORKSPACE,
    # all matrices' addresses, and how many
    MATRICES, MATRIX_COUNT,
    # Muon: the matrices, how many, its iterations, and a thread's room
    MUON_TABLE, MUON_COUNT, MUON_ITERATIONS, MUON_WORKSPACE, MUON_WORKSPACE_SIZE,
) = range(JOB_SIZE)  # fmt: skip

# REALS: float32.
REALS_SIZE = 6
EPS, DROPOUT, GRADIENT_SCALE, MUON_RATE, MUON_DECAY, MOMENTUM = range(REALS_SIZE)

# A matrix of a linear layer: addresses of its (O, I) rows, of its bias (0 for none), of its
# panels for the way forward and for the way back; O and I; where in a thread's gradients its own
# and its bias's begin.
MATRIX_SIZE = 8
WEIGHT, BIAS, FORWARD, BACKWARD, OUTPUTS, INPUTS, GRADIENT, BIAS_GRADIENT = range(MATRIX_SIZE)

# A norm: addresses of its weight and of its bias (0 for none), and where their gradients begin.
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

# A thread's room. What every layer keeps for the way back: the residual stream before it, its
# norm's moments, the normed; query, key and value; ready queries and keys, their norms'
# factors, logarithms of sums, the mixed values; the stream between, its norm's moments, the
# normed; the MLP's inner numbers and what they activate.
LAYER_FIELDS = 13
(
    X, MOMENTS, NORMED, QKV, PREPARED, HEAD_FACTORS, LOG_SUMS, ATTENDED, X_MIDDLE, MOMENTS_MIDDLE,
    NORMED_MIDDLE, PRE_ACTIVATION, ACTIVATED,
) = range(LAYER_FIELDS)  # fmt: skip
# What there is once: the end of the stream, and the gradients on the way back.
WORKSPACE_FIELDS = LAYER_FIELDS + 12
(
    X_LAST, MOMENTS_LAST, NORMED_LAST, LOGITS, D_X, D_NORMED, D_QKV, D_PREPARED, D_ATTENDED,
    D_ACTIVATED, PROJECTED, ATTENTION_SCRATCH,
) = range(LAYER_FIELDS, WORKSPACE_FIELDS)  # fmt: skip


def padded(count: int) -> int:
    """Rounded up to whole vectors."""
    return -(-count // LANES) * LANES


__all__ = ["LANES", "PANEL", "ROWS"]
