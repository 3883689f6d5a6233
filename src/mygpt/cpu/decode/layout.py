"""Positions of all fields in the arrays that Python passes to the decoding kernels.

Kernels take one argument from Python: the address of a job. A job is one row of int64: sizes,
switches, and addresses of other arrays (an int64 holds any address of a 64-bit system):

    job       | THREADS | MODE | ... | LAYERS | ... | LAYER_TABLE | ... | KEYS | ... | X | ... |
                                                         |               |          |
    layer 0   | NORM_1 | ... | W_QUERY: 6 fields | ... | <+               v          v
    layer 1   | ...                                    |              float32    float32
                                     |
    panels    | k = 0 | k = 1 | ...  | <- the field DATA of a matrix; see `matmul` for panels

Each list below names the fields of one kind of row in their order. A "stride" is the number of
elements from one row to the next: the row's length rounded up to whole vectors, so that a kernel
can read and write whole vectors to its end.
Letters: C embedding, H heads, G key/value heads, D head size, L window, M MLP width, V vocabulary.
"""

from __future__ import annotations

from mygpt.cpu.common.layout import GELU, LANES, PANEL, RMS_NORM, ROWS, SWIGLU, VECTORS

# MODE: what a run does with each active slot.
# PREFILL reads all tokens but the last one into the caches. DRAW draws tokens. PREDICT leaves
# probabilities for the caller. RACE appends argmax(probability / noise), with the caller's noise.
PREFILL, DRAW, PREDICT, RACE = 0, 1, 2, 3

# STATUS of a slot. The last two are failures: logits that are not finite, and finite logits that a
# temperature or penalty has made overflow.
FREE, ACTIVE, ENDED, BROKEN_MODEL, OVERFLOWING_SETTINGS = 0, 1, 2, 3, 4

# OVERFLOW (see `mygpt.core.window.Window`).
CROP, REFILL, STOP = 0, 1, 2

JOB_SIZE = 74
(
    # the run: OUTPUTS rows of this pass have a prediction, OUTPUTS_BEFORE those of earlier passes
    # of the same step; FAILED is 1 once any slot has failed
    THREADS, MODE, STEPS, SLOTS, MAX_ROWS, NUM_ROWS, OUTPUTS, OUTPUTS_BEFORE, BARRIER, FAILED,
    REALS,
    # the shape
    LAYERS, WIDTH, HEADS, GROUPS, HEAD, VOCAB, WINDOW, NORM, ROTARY, MLP, QK_NORM,
    INPUT_WORDS,
    # strides; TIME_STRIDE is the capacity of the caches in tokens
    WIDTH_STRIDE, QUERY_STRIDE, KEY_VALUE_STRIDE, ATTENDED_STRIDE, HIDDEN_STRIDE, VOCAB_STRIDE,
    TIME_STRIDE, HEAD_STRIDE, TEXT_STRIDE,
    # the model: addresses
    LAYER_TABLE, EMBEDDING, HEAD_MATRIX, POSITIONS, COSINES, SINES, FINAL_WEIGHT, FINAL_BIAS,
    # what is kept from step to step: addresses
    KEYS, VALUES, SLOT_TABLE, SETTINGS, TEXT, SEEN,
    # drafts (see `draft`): at most so many of a slot, and of all slots together, in one step; the
    # address of a draft table (0 for none); addresses of RECENT and GUESS; how many tokens must
    # be equal to copy what follows, and with how many the copy is as likely as not
    MOST_DRAFTS, DRAFTS_LISTED, SPARE_OUTPUTS, NGRAMS, RECENT, GUESS, MATCH, HALF_MATCH,
    # buffers of one pass: addresses (see `memory`)
    X, X_LAST, NORMED, QUERY, KEY_VALUE, ATTENDED, GATE, UP, SCORES, LOGITS, PROBABILITIES, NOISE,
    SCRATCH, INPUTS,
    ROW_SLOT, ROW_POSITION, ROW_TOKEN, OUTPUT_ROW, OUTPUT_SLOT, OUTPUT_POSITION,
) = range(JOB_SIZE)  # fmt: skip

# REALS: float32 numbers of the model: the norms' epsilon and 1 / sqrt(D).
EPS, SCORE_SCALE = range(2)

# A packed matrix: addresses of its panels, of one scale for each output (for int8) and of its
# bias (0 for none), its inner dimension, its outputs rounded up to whole vectors, and the format of
# its numbers.
#
#     | DATA | SCALES | BIAS | DEPTH | OUTPUTS_PADDED | FORMAT |
MATRIX_SIZE = 6
DATA, SCALES, BIAS, DEPTH, OUTPUTS_PADDED, FORMAT = range(MATRIX_SIZE)
IN_FLOAT32, IN_INT8, IN_INT4 = range(3)

# A row of the layer table: addresses of a block's six vectors, then its six matrices:
#
#     | NORM_1 | ... | KEY_NORM | W_QUERY: DATA SCALES BIAS ... FORMAT | W_KEY_VALUE: ... | ...
_VECTORS = 6
NORM_1, NORM_1_BIAS, NORM_2, NORM_2_BIAS, QUERY_NORM, KEY_NORM = range(_VECTORS)
W_QUERY, W_KEY_VALUE, W_OUTPUT, W_GATE, W_UP, W_DOWN = range(
    _VECTORS, _VECTORS + 6 * MATRIX_SIZE, MATRIX_SIZE
)
LAYER_SIZE = _VECTORS + 6 * MATRIX_SIZE

# One slot: a text that is being continued. Of its LENGTH tokens the model sees those from START on
# (-1: not yet decided), of which the first CACHED have keys and values in the cache:
#
#     TEXT of the slot   | forgotten | cached ...      | unread ... |
#                        0         START      START + CACHED      LENGTH
#
# DRAWN tokens of at most LIMIT are drawn. STEPS_DONE counts the steps of the current run in which
# the slot has had its prediction, which is in row LOGITS_ROW of LOGITS (-1: in the slot's own row
# of PROBABILITIES, where it is copied when the slot ends).
#
# A run draws until DRAWN is at least ENOUGH; drafts that are right can make it more, up to GOAL.
# DRAFTED drafts are read with the last token of the text, and written behind it:
#
#     TEXT of the slot   | ... | last token | draft | ... | draft |
#                                         LENGTH            LENGTH + DRAFTED
#
# The text is indexed for copies up to INDEXED. TRUSTED is 0 once a draft's row may have had numbers
# that are not finite. From PASSES on the passes that drew tokens are counted: those with 0, 1, ...
# drafts. From ACCEPTED on it is counted how often draft number 0, 1, ... of a pass was right.
MOST_DRAFTS_A_PASS = 7
(
    STATUS, LENGTH, START, CACHED, DRAWN, LIMIT, STEPS_DONE, OVERFLOW, TOP_K, GREEDY, SEED, INDEX,
    LOGITS_ROW, ENOUGH, GOAL, DRAFTED, INDEXED, TRUSTED, PASSES,
) = range(19)  # fmt: skip
ACCEPTED = PASSES + MOST_DRAFTS_A_PASS + 1
SLOT_SIZE = ACCEPTED + MOST_DRAFTS_A_PASS

# A draft table: addresses of its arrays (see `mygpt.decode.draft_table`), how far a key is shifted
# to the right to get its bucket, and the n of the largest n-grams.
TABLE_SIZE = 7
KEYS_OF_CONTEXTS, BUCKETS, SHIFT, CONTEXT_STARTS, FOLLOWERS, DISCOUNTS, ORDER = range(TABLE_SIZE)

# RECENT has a row of so many places for each slot; matches are compared over so many tokens.
RECENT_SIZE, LONGEST_MATCH = 4096, 32

# SEEN: two bits for each slot and token of the vocabulary: the token occurred in the text (for the
# repetition penalty), and it ends the text once it is drawn.
OCCURRED, ENDS = 1, 2

# SETTINGS: float32 numbers of a slot. TOP_P of 1, LOG_MIN_P of -inf and PENALTY of 1 mean off.
SETTINGS_SIZE = 4
TEMPERATURE, TOP_P, LOG_MIN_P, PENALTY = range(SETTINGS_SIZE)

__all__ = ["GELU", "LANES", "PANEL", "RMS_NORM", "ROWS", "SWIGLU", "VECTORS"]
