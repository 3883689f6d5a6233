"""Causal attention over a whole sequence, forward and backward, one sequence at a time.

The attention weights are not kept from one pass to the other: the backward pass recomputes them
from each row's log-sum-exp (Dao et al., "FlashAttention", 2022).
Letters: D head size, G key/value heads, H heads, T time.
"""

from __future__ import annotations

import math

from mygpt.cpu.common.arithmetic import dot, exp, f32, largest_of, padded
from mygpt.cpu.common.matmul import add_outer, product, transpose
from mygpt.cpu.common.simd import FLOAT32, FLOATS, INT64, INTS, REASSOCIATE, floats, kernel, skip
from mygpt.cpu.train import layout as at
from mygpt.cpu.train.arithmetic import drop, dropout_key

_ZERO, _ONE = f32(0), f32(1)

# Buffers of one sequence, row-major:
#
#     qkv (T, (H + 2G) D)       | query 0 | ... | query H-1 | key 0 ... G-1 | value 0 ... G-1 |
#     prepared (T, (H + G) D)   | query 0 | ... | query H-1 | key 0 ... G-1 |
#                               (after norm and rotation)
#     attended (T, H D)         | head 0 | ... | head H-1 |
#     log_sums (T, H)           log sum over t of exp(score t), of each row and head
#
# Scratch of a thread, with T' = T rounded up to whole vectors; the forward pass uses parts 1 and 3:
#
#     | keys (D, T') | values (D, T') | weights (QUERIES, T') | d_scores (QUERIES, T') |
#
# Keys (and in the backward pass values) are transposed, so that the scores of one query for many
# positions follow each other in memory, as a tile's columns must.


@kernel(FLOATS, INT64, INT64, FLOAT32, returns=FLOAT32, extra=REASSOCIATE)
def _softmax(x, count, capacity, scale):
    """x = softmax(scale x[:count]), then zeros up to `capacity`; returns log sum exp(scale x)."""
    # As `mygpt.cpu.common.arithmetic.softmax`. Compiled from one function for both, the order of
    # the sum would change here or there, and with it the last bits.
    end = padded(count)
    for i in range(count, end):
        x[i] = x[0]
    largest = largest_of(x, end)
    for i in range(end):
        x[i] = exp((x[i] - largest) * scale)
    for i in range(count, capacity):
        x[i] = _ZERO
    total = _ZERO
    for i in range(end):
        total += x[i]
    factor = _ONE / total
    for i in range(end):
        x[i] *= factor
    return largest * scale + f32(math.log(total))


@kernel(INTS, INT64, INT64, INT64, returns=INT64)
def weights_position(job, sequence, head, position):
    """Where a row of weights begins among all of a step's, (B, H, T, T): dropout's position."""
    time = job[at.TIME]
    return ((sequence * job[at.HEADS] + head) * time + position) * time


@kernel(INTS, INT64, INT64, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS)
def attend(job, layer, sequence, prepared, qkv, attended, log_sums, scratch):
    """attended (T, H D) = the attention of one sequence; log_sums is for the backward pass."""
    time, size, heads, groups = job[at.TIME], job[at.HEAD], job[at.HEADS], job[at.GROUPS]
    columns = padded(time)
    stride, wide = (heads + groups) * size, (heads + 2 * groups) * size
    scale = _ONE / f32(math.sqrt(f32(size)))
    rate = floats(job[at.REALS])[at.DROPOUT]
    key = dropout_key(job[at.SEED], 4 * layer + 3)
    keys, weights = scratch, skip(scratch, size * columns)
    for group in range(groups):
        transpose(keys, columns, skip(prepared, (heads + group) * size), stride, time, size)
        values = skip(qkv, (heads + groups + group) * size)
        # H / G query heads share a key/value head (grouped-query attention).
        for head in range(group * (heads // groups), (group + 1) * (heads // groups)):
            for first in range(0, time, at.ROWS):
                # A tile of queries computes scores up to its last row's own position; each row's
                # softmax then keeps those up to its own (the causal mask).
                rows = min(at.ROWS, time - first)
                seen = first + rows
                reach = padded(seen)
                query = skip(prepared, first * stride + head * size)
                product(weights, columns, query, stride, keys, columns, rows, size, reach)
                for r in range(rows):
                    own = skip(weights, r * columns)
                    row = first + r
                    log_sums[row * heads + head] = _softmax(own, row + 1, reach, scale)
                    if rate > _ZERO:
                        place = weights_position(job, sequence, head, row)
                        drop(own, row + 1, key, place, rate)
                out = skip(attended, first * heads * size + head * size)
                product(out, heads * size, weights, columns, values, wide, rows, seen, size)


# The backward pass of one head, with all indices over the causal triangle j <= i:
#
#     S = Q K^T / sqrt D      P = softmax(S), row by row
#     Z = P m / (1 - p)       dropout; without it Z = P
#     O = Z V                 what `attend` returns
#
#     dL/dV = Z^T dO
#     dL/dZ = dO V^T,  dL/dP = dL/dZ m / (1 - p)
#     dL/dS_ij = P_ij (dL/dP_ij - delta_i),  delta_i = sum_k P_ik dL/dP_ik
#     dL/dQ = dL/dS K / sqrt D
#     dL/dK = dL/dS^T Q / sqrt D
#
# dL/dS is the softmax's: dP_ik/dS_ij = P_ik ((k == j) - P_ij). delta needs no sum over keys:
#     delta_i = sum_k P_ik dL/dZ_ik m_ik / (1 - p) = sum_k Z_ik dL/dZ_ik
#             = sum_k Z_ik sum_d dO_id V_kd = sum_d dO_id O_id
# (Dao et al., 2022, appendix B.2). P is recomputed as exp(S - L) with L = log sum_k exp(S_ik),
# which `attend` has saved: T numbers a head instead of T * T.
#
# This function computes Z, dL/dS and dL/dQ of some queries:
@kernel(
    INTS, INT64, INT64, INT64, INT64, INT64, INT64, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS,
    FLOATS, FLOATS, FLOATS,
)  # fmt: skip
def _queries_backward(
    job, layer, sequence, head, group, first, last, prepared, attended, log_sums, d_attended,
    d_prepared, keys, values, scratch,
):  # fmt: skip
    """dL/dQ of the queries from `first` to `last` of one head, at most QUERIES.

    Leaves Z (queries, T') in `scratch` and dL/dS / sqrt D behind it, for `_keys_values_backward`.
    """
    time, size, heads, groups = job[at.TIME], job[at.HEAD], job[at.HEADS], job[at.GROUPS]
    columns = padded(time)
    stride = (heads + groups) * size
    scale = _ONE / f32(math.sqrt(f32(size)))
    rate = floats(job[at.REALS])[at.DROPOUT]
    key = dropout_key(job[at.SEED], 4 * layer + 3)
    for start in range(first, last, at.ROWS):
        rows = min(at.ROWS, last - start)
        seen = start + rows
        reach = padded(seen)
        weights = skip(scratch, (start - first) * columns)
        d_scores = skip(weights, at.QUERIES * columns)
        query = skip(prepared, start * stride + head * size)
        gradient = skip(d_attended, (start * heads + head) * size)
        # First the products: q K^T into `weights`, dL/dZ = dO V^T into `d_scores`.
        product(weights, columns, query, stride, keys, columns, rows, size, reach)
        product(d_scores, columns, gradient, heads * size, values, columns, rows, size, reach)
        for r in range(rows):
            row = start + r
            own, slope = skip(weights, r * columns), skip(d_scores, r * columns)
            place = (row * heads + head) * size
            delta = dot(skip(d_attended, place), skip(attended, place), size)
            total = log_sums[row * heads + head]
            for t in range(row + 1):
                own[t] = exp(own[t] * scale - total)  # P
            if rate > _ZERO:  # dL/dP from dL/dZ
                drop(slope, row + 1, key, weights_position(job, sequence, head, row), rate)
            for t in range(row + 1):
                slope[t] = own[t] * (slope[t] - delta) * scale
            # Later positions have no weight: zeros, as tiles of whole vectors read them.
            for t in range(row + 1, reach):
                own[t] = _ZERO
            for t in range(row + 1, reach):
                slope[t] = _ZERO
            if rate > _ZERO:  # Z from P
                drop(own, row + 1, key, weights_position(job, sequence, head, row), rate)
        out = skip(d_prepared, start * stride + head * size)
        key_rows = skip(prepared, (heads + group) * size)
        product(out, stride, d_scores, columns, key_rows, stride, rows, seen, size)


# dL/dK = dL/dS^T Q / sqrt D and dL/dV = Z^T dO, over the queries from `first` to `last`. Key t is
# seen by queries t and later, so a tile of keys sums over the rows from `begin` on (x: not zero):
#
#              keys     t
#     first    x x x x | . . .      a tile of keys that begins at t <= first sums over all rows,
#              x x x x | x . .      one that begins at t > first over those from t on
#     last-1   x x x x | x x .
#
# Rows and keys are cut at the same multiples of ROWS, so row t is the first of its tile, whose
# zeros reach to the end of the tile of keys.
@kernel(INTS, INT64, INT64, INT64, INT64, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS)
def _keys_values_backward(
    job, head, group, first, last, prepared, d_attended, d_prepared, d_qkv, scratch
):
    """Adds to dL/dK and dL/dV what `_queries_backward` has left in `scratch`."""
    time, size, heads, groups = job[at.TIME], job[at.HEAD], job[at.HEADS], job[at.GROUPS]
    columns = padded(time)
    stride, wide = (heads + groups) * size, (heads + 2 * groups) * size
    d_key = skip(d_prepared, (heads + group) * size)
    d_value = skip(d_qkv, (heads + groups + group) * size)
    weights, d_scores = scratch, skip(scratch, at.QUERIES * columns)
    for t in range(0, last, at.ROWS):
        begin = max(t - first, 0)
        high, deep = min(at.ROWS, last - t), last - first - begin
        row = first + begin
        add_outer(
            skip(d_key, t * stride), stride, skip(d_scores, begin * columns + t), columns, high,
            skip(prepared, row * stride + head * size), stride, size, deep,
        )  # fmt: skip
        add_outer(
            skip(d_value, t * wide), wide, skip(weights, begin * columns + t), columns, high,
            skip(d_attended, (row * heads + head) * size), heads * size, size, deep,
        )  # fmt: skip


# All gradients of attention from dL/dO, with the formulas above, head by head. Query heads of one
# group share a key and a value, so dL/dK and dL/dV are sums over those heads. Of a head, QUERIES
# queries at a time: their Z and dL/dS stay in the cache until dL/dK and dL/dV are computed from
# them.
@kernel(INTS, INT64, INT64, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS)
def attend_backward(
    job, layer, sequence, prepared, qkv, attended, log_sums, d_attended, d_prepared, d_qkv, scratch
):
    """Gradients of one sequence's attention from d_attended (T, H D): dL/dO.

    Sets d_prepared (T, (H + G) D), which is dL/dQ and dL/dK, and the values' columns of d_qkv.
    """
    time, size, heads, groups = job[at.TIME], job[at.HEAD], job[at.HEADS], job[at.GROUPS]
    columns = padded(time)
    stride, wide = (heads + groups) * size, (heads + 2 * groups) * size
    keys, values = scratch, skip(scratch, size * columns)
    rows_scratch = skip(scratch, 2 * size * columns)
    for group in range(groups):
        transpose(keys, columns, skip(prepared, (heads + group) * size), stride, time, size)
        value_rows = skip(qkv, (heads + groups + group) * size)
        transpose(values, columns, value_rows, wide, time, size)
        # The gradients of a key/value head are sums over its query heads and blocks of queries.
        d_key = skip(d_prepared, (heads + group) * size)
        d_value = skip(d_qkv, (heads + groups + group) * size)
        for t in range(time):
            for d in range(size):
                d_key[t * stride + d] = _ZERO
            for d in range(size):
                d_value[t * wide + d] = _ZERO
        for head in range(group * (heads // groups), (group + 1) * (heads // groups)):
            for first in range(0, time, at.QUERIES):
                last = min(first + at.QUERIES, time)
                _queries_backward(
                    job, layer, sequence, head, group, first, last, prepared, attended, log_sums,
                    d_attended, d_prepared, keys, values, rows_scratch,
                )  # fmt: skip
                _keys_values_backward(
                    job, head, group, first, last, prepared, d_attended, d_prepared, d_qkv,
                    rows_scratch,
                )  # fmt: skip
