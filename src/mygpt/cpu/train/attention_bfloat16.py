"""Attention of the training step with products of bfloat16; the formulas are in `attention`.

Scores are stored transposed, keys down and queries across, so that softmax needs no sum within a
vector: each lane has its own query.
Letters: D head size, G key/value heads, H heads, T time, T' T rounded up to a multiple of 32.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types

from mygpt.cpu.common.arithmetic import f32
from mygpt.cpu.common.simd import (
    FLOAT32,
    FLOATS,
    INT64,
    INTS,
    WORDS,
    as_words,
    bits_of_float,
    float_of_bits,
    floats,
    kernel,
    skip,
    transpose_words,
)
from mygpt.cpu.train import layout as at
from mygpt.cpu.train.arithmetic import drop_every, dropout_key
from mygpt.cpu.train.attention import weights_position
from mygpt.cpu.train.bfloat16 import (
    multiply_bfloat16,
    pack_columns,
    pack_lines,
    pack_lines_transposed,
    pack_pairs,
    pack_rows,
    pairs_of,
)
from mygpt.cpu.train.columns import gradient_columns, softmax_columns, weight_columns

_ZERO, _ONE, _TWO = f32(0), f32(1), f32(2)
_THIRD, _FIFTH, _SEVENTH, _NINTH = f32(1 / 3), f32(1 / 5), f32(1 / 7), f32(1 / 9)
_LN2, _ROOT_HALF_BITS = f32(math.log(2)), np.int32(0x3F3504F3)
_23, _HIDDEN = np.int32(23), f32(-1e30)

# Queries of a head, ACROSS = 32 at a time (two vectors, two tile registers): those from `first` on
# see the keys t <= first + 31, so 32 columns of scores have reach = first + 32 lines. Each x is a
# score that counts:
#
#               query  first ... first + 31
#     t = 0            x  x  x  x               all lines before `first` count entirely
#         ...          x  x  x  x
#     t = first        x  x  x  x
#         ...          .  x  x  x               the causal mask: i >= t - first
#     t = first + 31   .  .  .  x
#
# Products, each named by its packed operands (x on the left, w on the right, see `bfloat16`); ' is
# the transposed matrix. delta is summed over keys (`gradient_columns`): it is dO O too, but of dO
# before it was rounded, and with that a query that sees one key would have a gradient.
#
#     S' (reach, 32) = K Q'                      rows of K          | lines of Q'
#     O' (D, 32)     = V' P'                     columns of V       | lines of P'
#     dZ' (reach, 32) = V dO'                    rows of V          | lines of dO'
#     dV (reach, D) += Z' dO                     rows of Z'         | lines of dO
#     dK (reach, D) += dS' Q                     rows of dS'        | lines of Q
#     dQ' (D, 32)    = K' dS'                    columns of K       | lines of dS'
ACROSS = at.ACROSS
_PAIRS = ACROSS // 2  # words for the queries of a block, where they are the inner dimension


@kernel(FLOAT32, returns=FLOAT32)
def _log(x):
    """The logarithm of a normal positive number, with an error of about 1e-7."""
    # x = 2**n m with m from sqrt(1/2) to sqrt(2). With s = (m - 1) / (m + 1), at most 0.172,
    # log m = 2 artanh s = 2 (s + s**3 / 3 + s**5 / 5 + ...).
    bits = bits_of_float(x)
    n = np.int32(np.int32(bits - _ROOT_HALF_BITS) >> _23)
    m = float_of_bits(np.int32(bits - np.int32(n << _23)))
    s = (m - _ONE) / (m + _ONE)
    z = s * s
    series = _ONE + z * (_THIRD + z * (_FIFTH + z * (_SEVENTH + z * _NINTH)))
    return f32(n) * _LN2 + _TWO * s * series


@kernel(FLOATS, INT64)
def _hide_later(scores, first):
    """The causal mask: scores (reach, 32) whose weights are 0."""
    for hidden in range(1, ACROSS):
        own = skip(scores, (first + hidden) * ACROSS)
        for i in range(hidden):
            own[i] = _HIDDEN


@kernel(INTS, INT64, INT64, INT64, INT64, INT64, FLOATS)
def _drop_weights(job, layer, sequence, head, first, reach, x):
    """Dropout on x (reach, 32): the same choice as `attention` makes for these weights."""
    rate = floats(job[at.REALS])[at.DROPOUT]
    if rate > _ZERO:
        key = dropout_key(job[at.SEED], 4 * layer + 3)
        start = weights_position(job, sequence, head, first)
        for t in range(reach):
            drop_every(skip(x, t * ACROSS), ACROSS, key, start + t, job[at.TIME], rate)


@kernel(WORDS, INT64, FLOATS, INT64, INT64, INT64)
def _pack_all_rows(out, pairs, x, x_stride, rows, depth):
    """`pack_rows`, and zeros up to T' rows."""
    pack_rows(out, pairs, x, x_stride, rows, depth)
    for i in range(rows * pairs, 2 * pairs_of(rows) * pairs):
        out[i] = 0


@kernel(FLOATS, INT64, FLOATS, INT64, INT64, FLOATS)
def _store_transposed(out, out_stride, x, size, count, block):
    """The first `count` rows of out (32, D) = x (D, 32) transposed."""
    for query in range(0, count, at.LANES):
        for d in range(0, size, at.LANES):
            source = as_words(skip(x, d * ACROSS + query))
            transpose_words(as_words(block), at.LANES, source, ACROSS)
            for r in range(min(at.LANES, count - query)):
                own, line = skip(out, (query + r) * out_stride + d), skip(block, r * at.LANES)
                for i in range(at.LANES):
                    own[i] = line[i]


@kernel(FLOATS, FLOATS, FLOATS, INT64, INT64, INT64, WORDS)
def _pack_across(across, lines, x, x_stride, count, size, block):
    """Rows of queries x (count, D), as lines of x' and as lines of x."""
    pack_lines_transposed(as_words(across), x, x_stride, count, size, ACROSS, block)
    pack_lines(as_words(lines), x, x_stride, count, size, _PAIRS)


@kernel(INTS, FLOATS, INT64, FLOATS, INT64, INT64, FLOATS, INT64, INT64, INT64, FLOATS)
def _multiply(job, y, y_stride, x, x_stride, rows, w, outputs, pairs, adding, block):
    """`multiply_bfloat16` of packed operands that are in fields of float32."""
    multiply_bfloat16(
        job[at.PRODUCTS], y, y_stride, as_words(x), x_stride, rows, as_words(w), outputs, pairs,
        adding, block,
    )  # fmt: skip


# Scratch of the forward pass, with d = pairs_of(D) and h = T' / 2:
#
#     | rows of K (T', d) | columns of V (D, h) | lines of Q' (d, 32) | S' (T', 32) |
#     | lines of P' (h, 32) | O' (D, 32) | largest, sum (32) |
@kernel(INTS, INT64, INT64, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS)
def attend_bfloat16(job, layer, sequence, prepared, qkv, attended, log_sums, scratch, block):
    """attended (T, H D) = the attention of one sequence; arguments as for `attend`."""
    time, size, heads, groups = job[at.TIME], job[at.HEAD], job[at.HEADS], job[at.GROUPS]
    stride, wide = (heads + groups) * size, (heads + 2 * groups) * size
    scale = _ONE / f32(math.sqrt(f32(size)))
    depth, half = pairs_of(size), pairs_of(time)
    keys, values = scratch, skip(scratch, 2 * half * depth)
    query_lines = skip(values, size * half)
    scores = skip(query_lines, depth * ACROSS)
    weight_lines = skip(scores, 2 * half * ACROSS)
    out = skip(weight_lines, half * ACROSS)
    largest, total = skip(out, size * ACROSS), skip(out, (size + 1) * ACROSS)
    for group in range(groups):
        key_rows = skip(prepared, (heads + group) * size)
        value_rows = skip(qkv, (heads + groups + group) * size)
        _pack_all_rows(as_words(keys), depth, key_rows, stride, time, size)
        pack_columns(as_words(values), half, value_rows, wide, time, size, as_words(block))
        for head in range(group * (heads // groups), (group + 1) * (heads // groups)):
            for first in range(0, time, ACROSS):
                reach, count = first + ACROSS, min(ACROSS, time - first)
                query = skip(prepared, first * stride + head * size)
                pack_lines_transposed(
                    as_words(query_lines), query, stride, count, size, ACROSS, as_words(block)
                )
                _multiply(
                    job, scores, ACROSS, keys, depth, reach, query_lines, ACROSS, depth, 0, block
                )
                _hide_later(scores, first)
                softmax_columns(scores, reach, scale, largest, total)
                _drop_weights(job, layer, sequence, head, first, reach, scores)
                pack_pairs(
                    as_words(weight_lines), ACROSS, scores, ACROSS, reach, ACROSS, reach // 2
                )
                _multiply(
                    job, out, ACROSS, values, half, size, weight_lines, ACROSS, reach // 2, 0, block
                )
                for i in range(ACROSS):
                    largest[i] = largest[i] * scale + _log(total[i])
                    total[i] = _ONE / total[i]
                for d in range(size):
                    line = skip(out, d * ACROSS)
                    for i in range(ACROSS):
                        line[i] *= total[i]
                for i in range(count):
                    log_sums[(first + i) * heads + head] = largest[i]
                to = skip(attended, (first * heads + head) * size)
                _store_transposed(to, heads * size, out, size, count, block)


# Scratch of the backward pass:
#
#     of a key/value head    | rows of K (T', d) | rows of V (T', d) | columns of K (D, h) |
#     of a block of queries  | lines of Q' (d, 32) | lines of dO' (d, 32) | lines of Q (16, D) |
#                            | lines of dO (16, D) | S' (T', 32) | dS' (T', 32) |
#                            | rows of Z' (T', 16) | rows of dS' (T', 16) | lines of dS' (h, 32) |
#                            | dQ' (D, 32) | log sums (32) |
@kernel(FLOATS, INT64, INT64, INT64, returns=types.UniTuple(FLOATS, 14))
def _buffers(scratch, depth, size, half):
    """The fields of the picture, in its order."""
    keys, values = scratch, skip(scratch, 2 * half * depth)
    key_columns = skip(values, 2 * half * depth)
    query_across = skip(key_columns, size * half)
    gradient_across = skip(query_across, depth * ACROSS)
    query_lines = skip(gradient_across, depth * ACROSS)
    gradient_lines = skip(query_lines, _PAIRS * size)
    scores = skip(gradient_lines, _PAIRS * size)
    slopes = skip(scores, 2 * half * ACROSS)
    weight_rows = skip(slopes, 2 * half * ACROSS)
    slope_rows = skip(weight_rows, 2 * half * _PAIRS)
    slope_lines = skip(slope_rows, 2 * half * _PAIRS)
    out = skip(slope_lines, half * ACROSS)
    return (
        keys, values, key_columns, query_across, gradient_across, query_lines, gradient_lines,
        scores, slopes, weight_rows, slope_rows, slope_lines, out, skip(out, size * ACROSS),
    )  # fmt: skip


@kernel(
    INTS, INT64, INT64, INT64, INT64, INT64, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS
)
def _queries_backward(
    job, layer, sequence, head, group, first, prepared, log_sums, d_attended, d_prepared, d_qkv,
    scratch, block,
):  # fmt: skip
    """dL/dQ of the 32 queries from `first` on; adds their parts to dL/dK and dL/dV."""
    time, size, heads, groups = job[at.TIME], job[at.HEAD], job[at.HEADS], job[at.GROUPS]
    stride, wide = (heads + groups) * size, (heads + 2 * groups) * size
    scale = _ONE / f32(math.sqrt(f32(size)))
    depth, half = pairs_of(size), pairs_of(time)
    reach, count = first + ACROSS, min(ACROSS, time - first)
    (
        keys, values, key_columns, query_across, gradient_across, query_lines, gradient_lines,
        scores, slopes, weight_rows, slope_rows, slope_lines, out, logs,
    ) = _buffers(scratch, depth, size, half)  # fmt: skip
    query = skip(prepared, first * stride + head * size)
    gradient = skip(d_attended, (first * heads + head) * size)
    words = as_words(block)
    _pack_across(query_across, query_lines, query, stride, count, size, words)
    _pack_across(gradient_across, gradient_lines, gradient, heads * size, count, size, words)
    for i in range(ACROSS):
        logs[i] = _ZERO
    for i in range(count):
        logs[i] = log_sums[(first + i) * heads + head]
    # S' = K Q' becomes P', then Z'; dZ' = V dO' becomes dP', then dS'.
    _multiply(job, scores, ACROSS, keys, depth, reach, query_across, ACROSS, depth, 0, block)
    _multiply(job, slopes, ACROSS, values, depth, reach, gradient_across, ACROSS, depth, 0, block)
    _hide_later(scores, first)
    weight_columns(scores, reach, scale, logs)
    _drop_weights(job, layer, sequence, head, first, reach, slopes)
    gradient_columns(slopes, scores, reach, scale)
    _drop_weights(job, layer, sequence, head, first, reach, scores)
    pack_rows(as_words(weight_rows), _PAIRS, scores, ACROSS, reach, ACROSS)
    pack_rows(as_words(slope_rows), _PAIRS, slopes, ACROSS, reach, ACROSS)
    pairs = reach // 2
    pack_pairs(as_words(slope_lines), ACROSS, slopes, ACROSS, reach, ACROSS, pairs)
    seen = min(reach, time)
    dv, dk = skip(d_qkv, (heads + groups + group) * size), skip(d_prepared, (heads + group) * size)
    _multiply(job, dv, wide, weight_rows, _PAIRS, seen, gradient_lines, size, _PAIRS, 1, block)
    _multiply(job, dk, stride, slope_rows, _PAIRS, seen, query_lines, size, _PAIRS, 1, block)
    _multiply(job, out, ACROSS, key_columns, half, size, slope_lines, ACROSS, pairs, 0, block)
    to = skip(d_prepared, first * stride + head * size)
    _store_transposed(to, stride, out, size, count, block)


@kernel(INTS, INT64, INT64, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS)
def attend_backward_bfloat16(
    job, layer, sequence, prepared, qkv, log_sums, d_attended, d_prepared, d_qkv, scratch, block
):
    """Gradients of one sequence's attention; arguments as for `attend_backward`."""
    time, size, heads, groups = job[at.TIME], job[at.HEAD], job[at.HEADS], job[at.GROUPS]
    stride, wide = (heads + groups) * size, (heads + 2 * groups) * size
    depth, half = pairs_of(size), pairs_of(time)
    keys, values = as_words(scratch), as_words(skip(scratch, 2 * half * depth))
    key_columns = skip(values, 2 * half * depth)
    for group in range(groups):
        key_rows = skip(prepared, (heads + group) * size)
        value_rows = skip(qkv, (heads + groups + group) * size)
        _pack_all_rows(keys, depth, key_rows, stride, time, size)
        _pack_all_rows(values, depth, value_rows, wide, time, size)
        pack_columns(key_columns, half, key_rows, stride, time, size, as_words(block))
        # The gradients of a key/value head are sums over its query heads and blocks of queries.
        for t in range(time):
            d_key = skip(d_prepared, t * stride + (heads + group) * size)
            d_value = skip(d_qkv, t * wide + (heads + groups + group) * size)
            for d in range(size):
                d_key[d] = _ZERO
            for d in range(size):
                d_value[d] = _ZERO
        for head in range(group * (heads // groups), (group + 1) * (heads // groups)):
            for first in range(0, time, ACROSS):
                _queries_backward(
                    job, layer, sequence, head, group, first, prepared, log_sums, d_attended,
                    d_prepared, d_qkv, scratch, block,
                )  # fmt: skip
