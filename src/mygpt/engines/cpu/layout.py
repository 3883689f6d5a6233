"""Where everything lies in the numbers that Python hands to the compiled loop.

A job is one row of int64: sizes, switches, and addresses of arrays. Each list below gives its
fields' places in order. "Stride" is elements from one row to the next: a size rounded up so
that whole vectors can be read and written.
Letters: C embedding, H heads, G key/value heads, D head size, L window, M MLP width, V vocabulary.
"""

from __future__ import annotations

import llvmlite.binding as llvm

# 16 floats fill a register of AVX-512, 8 one of AVX2 (two of NEON).
LANES = 16 if llvm.get_host_cpu_features().get("avx512f") else 8
# A tile of ROWS x VECTORS sums stays in registers: 24 of 32, or 12 of 16.
VECTORS = 4
ROWS = 6 if LANES == 16 else 3
PANEL = VECTORS * LANES  # outputs of a packed matrix that lie side by side

# What a run does with the slots that go on.
# fill caches only; draw tokens; leave probabilities for the caller; take the caller's draw first
PREFILL, DRAW, PREDICT, RACE = 0, 1, 2, 3

# Why a slot draws nothing more, or may.
FREE, ACTIVE, ENDED, BROKEN_MODEL, OVERFLOWING_SETTINGS = 0, 1, 2, 3, 4

CROP, REFILL, STOP = 0, 1, 2
LAYER_NORM, RMS_NORM = 0, 1
GELU, GELU_TANH, SWIGLU = 0, 1, 2

JOB_SIZE = 65
(
    # the run
    THREADS, MODE, STEPS, SLOTS, MAX_ROWS, NUM_ROWS, OUTPUTS, OUTPUTS_BEFORE, BARRIER, FAILED,
    REALS,
    # the shape
    LAYERS, WIDTH, HEADS, GROUPS, HEAD, VOCAB, WINDOW, NORM, ROTARY, MLP, QK_NORM,
    QUANTIZED,
    # strides
    WIDTH_STRIDE, QUERY_STRIDE, KEY_VALUE_STRIDE, ATTENDED_STRIDE, HIDDEN_STRIDE, VOCAB_STRIDE,
    TIME_STRIDE, HEAD_STRIDE, TEXT_STRIDE,
    # the model: addresses
    LAYER_TABLE, EMBEDDING, HEAD_MATRIX, POSITIONS, COSINES, SINES, FINAL_WEIGHT, FINAL_BIAS,
    # what is remembered between steps: addresses
    KEYS, VALUES, SLOT_TABLE, SETTINGS, TEXT, SEEN,
    # room to work in: addresses
    X, X_LAST, NORMED, QUERY, KEY_VALUE, ATTENDED, GATE, UP, SCORES, LOGITS, PROBABILITIES, NOISE,
    SCRATCH,
    ROW_SLOT, ROW_POSITION, ROW_TOKEN, OUTPUT_ROW, OUTPUT_SLOT, OUTPUT_POSITION,
) = range(JOB_SIZE)  # fmt: skip

# REALS: float32 numbers of the model.
EPS, SCORE_SCALE = range(2)

# A packed matrix: addresses of its panels, of one scale an output (0 for float32) and of its
# bias (0 for none), its inner dimension, and its outputs rounded up to whole vectors.
MATRIX_SIZE = 5
DATA, SCALES, BIAS, DEPTH, OUTPUTS_PADDED = range(MATRIX_SIZE)

# One layer: addresses of its vectors, then its matrices.
_VECTORS = 6
NORM_1, NORM_1_BIAS, NORM_2, NORM_2_BIAS, QUERY_NORM, KEY_NORM = range(_VECTORS)
W_QUERY, W_KEY_VALUE, W_OUTPUT, W_GATE, W_UP, W_DOWN = range(
    _VECTORS, _VECTORS + 6 * MATRIX_SIZE, MATRIX_SIZE
)
LAYER_SIZE = _VECTORS + 6 * MATRIX_SIZE

# One slot: a text on its way. TURN counts the steps of the current run it has taken part in.
SLOT_SIZE = 13
(
    STATUS, LENGTH, START, CACHED, DRAWN, LIMIT, STEPS_DONE, OVERFLOW, TOP_K, GREEDY, SEED, INDEX,
    LOGITS_ROW,
) = range(SLOT_SIZE)  # fmt: skip

# SEEN: bits of each token of the vocabulary, for a slot.
OCCURRED, ENDS = 1, 2  # it occurred in the text; it ends the text once it is drawn

# SETTINGS: float32 numbers of a slot; MIN_P is its logarithm, 1 means off; PENALTY 1 is off.
SETTINGS_SIZE = 4
TEMPERATURE, TOP_P, LOG_MIN_P, PENALTY = range(SETTINGS_SIZE)
