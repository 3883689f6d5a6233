"""Causal attention over whole windows, forward and back, one sequence at a time.

Scores are not kept: the way back computes them anew, from each row's logarithm of the sum of
exponentials (Dao et al., 2022).
Letters: D head size, G key/value heads, H heads, Q width of query, key and value, T time.
"""

from __future__ import annotations

import math

from mygpt.engines.cpu.arithmetic import exp, f32, largest_of
from mygpt.engines.cpu.matmul import DEPTH_BLOCK, multiply
from mygpt.engines.cpu.simd import FLOATS, INTS, REAL, SUMMING, WHOLE, floats, kernel, skip
from mygpt.training.compiled import layout as at
from mygpt.training.compiled.arithmetic import dot, drop, dropout_key
from mygpt.training.compiled.products import add_outer

_ZERO, _ONE = f32(0), f32(1)


@kernel(FLOATS, WHOLE, FLOATS, WHOLE, FLOATS, WHOLE, WHOLE, WHOLE, WHOLE)
def _scores(out, room, x, x_stride, columns_first, rows, size, columns, head_stride):
    """out (rows, columns) = x (rows, D) times (D, T) keys or values that lie transposed."""
    for t in range(0, columns, at.PANEL):
        vectors = min(at.PANEL, columns - t) // at.LANES
        multiply(
            skip(out, t), room, x, x_stride, skip(columns_first, t), head_stride, size, rows,
            vectors, 0,
        )  # fmt: skip


@kernel(FLOATS, WHOLE, FLOATS, WHOLE, FLOATS, WHOLE, WHOLE, WHOLE, WHOLE)
def _mix(out, out_stride, weights, room, values, values_stride, rows, size, seen):
    """out (rows, D) = weights (rows, seen) times (seen, D)."""
    for d in range(0, size, at.PANEL):
        vectors = min(at.PANEL, size - d) // at.LANES
        for t in range(0, seen, DEPTH_BLOCK):
            multiply(
                skip(out, d), out_stride, skip(weights, t), room,
                skip(values, t * values_stride + d), values_stride, min(DEPTH_BLOCK, seen - t),
                rows, vectors, t,
            )  # fmt: skip


@kernel(FLOATS, WHOLE, WHOLE, REAL, returns=REAL, extra=SUMMING)
def _softmax(x, count, room, scale):
    """x = softmax(scale x[:count]), then zeros up to `room`; returns the logarithm of the sum."""
    whole = (count + at.LANES - 1) // at.LANES * at.LANES
    for i in range(count, whole):
        x[i] = x[0]
    largest = largest_of(x, whole)
    for i in range(whole):
        x[i] = exp((x[i] - largest) * scale)
    for i in range(count, room):
        x[i] = _ZERO
    total = _ZERO
    for i in range(whole):
        total += x[i]
    factor = _ONE / total
    for i in range(whole):
        x[i] *= factor
    return largest * scale + f32(math.log(total))


@kernel(FLOATS, WHOLE, FLOATS, WHOLE, WHOLE, WHOLE)
def _transpose(out, out_stride, rows, stride, count, size):
    """out (D, T) = rows (T, D) transposed."""
    for t in range(count):
        own = skip(rows, t * stride)
        for d in range(size):
            out[d * out_stride + t] = own[d]


@kernel(INTS, WHOLE, WHOLE, WHOLE, returns=WHOLE)
def _place(job, sequence, head, position):
    """Where a row of attention weights lies among all of a step's, for dropout."""
    time = job[at.TIME]
    return ((sequence * job[at.HEADS] + head) * time + position) * time


@kernel(INTS, WHOLE, WHOLE, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS)
def attend(job, layer, sequence, turned, combined, mixed, sums, room):
    """mixed (T, H D) = the attention of one sequence.

    `turned` (T, (H + G) D) holds ready queries and keys, `combined` (T, Q) the values at its
    end; `sums` (T, H) is for the way back.
    """
    time, size, heads, groups = job[at.TIME], job[at.HEAD], job[at.HEADS], job[at.GROUPS]
    columns = (time + at.LANES - 1) // at.LANES * at.LANES
    stride, wide = (heads + groups) * size, (heads + 2 * groups) * size
    scale = _ONE / f32(math.sqrt(f32(size)))
    rate = floats(job[at.REALS])[at.DROPOUT]
    key = dropout_key(job[at.SEED], 4 * layer + 3)
    keys, weights = room, skip(room, size * columns)
    for group in range(groups):
        _transpose(keys, columns, skip(turned, (heads + group) * size), stride, time, size)
        values = skip(combined, (heads + groups + group) * size)
        for head in range(group * (heads // groups), (group + 1) * (heads // groups)):
            for first in range(0, time, at.ROWS):
                rows = min(at.ROWS, time - first)
                seen = first + rows
                reach = (seen + at.LANES - 1) // at.LANES * at.LANES
                query = skip(turned, first * stride + head * size)
                _scores(weights, columns, query, stride, keys, rows, size, reach, columns)
                for r in range(rows):
                    own = skip(weights, r * columns)
                    sums[(first + r) * heads + head] = _softmax(own, first + r + 1, reach, scale)
                    if rate > _ZERO:
                        place = _place(job, sequence, head, first + r)
                        drop(own, first + r + 1, key, place, rate)
                out = skip(mixed, first * heads * size + head * size)
                _mix(out, heads * size, weights, columns, values, wide, rows, size, seen)


@kernel(
    INTS, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS,
    FLOATS, FLOATS, FLOATS,
)  # fmt: skip
def _block_back(
    job, layer, sequence, head, group, first, last, turned, mixed, sums, d_mixed, d_turned, keys,
    values_turned, room,
):  # fmt: skip
    """Weights and their gradients' slopes of some queries, and those queries' gradients.

    Leaves (queries, T) weights in `room`, and behind them the gradients of the scores.
    """
    time, size, heads, groups = job[at.TIME], job[at.HEAD], job[at.HEADS], job[at.GROUPS]
    columns = (time + at.LANES - 1) // at.LANES * at.LANES
    stride = (heads + groups) * size
    scale = _ONE / f32(math.sqrt(f32(size)))
    rate = floats(job[at.REALS])[at.DROPOUT]
    key = dropout_key(job[at.SEED], 4 * layer + 3)
    for start in range(first, last, at.ROWS):
        rows = min(at.ROWS, last - start)
        seen = start + rows
        reach = (seen + at.LANES - 1) // at.LANES * at.LANES
        weights = skip(room, (start - first) * columns)
        slopes = skip(weights, at.QUERIES * columns)
        query = skip(turned, start * stride + head * size)
        gradient = skip(d_mixed, (start * heads + head) * size)
        _scores(weights, columns, query, stride, keys, rows, size, reach, columns)
        _scores(slopes, columns, gradient, heads * size, values_turned, rows, size, reach, columns)
        for r in range(rows):
            row = start + r
            own, slope = skip(weights, r * columns), skip(slopes, r * columns)
            place = (row * heads + head) * size
            along = dot(skip(d_mixed, place), skip(mixed, place), size)
            total = sums[row * heads + head]
            for t in range(row + 1):
                own[t] = exp(own[t] * scale - total)
            if rate > _ZERO:
                drop(slope, row + 1, key, _place(job, sequence, head, row), rate)
            for t in range(row + 1):
                slope[t] = own[t] * (slope[t] - along) * scale
            for t in range(row + 1, reach):
                own[t] = _ZERO
            for t in range(row + 1, reach):
                slope[t] = _ZERO
            if rate > _ZERO:
                drop(own, row + 1, key, _place(job, sequence, head, row), rate)
        out = skip(d_turned, start * stride + head * size)
        key_rows = skip(turned, (heads + group) * size)
        _mix(out, stride, slopes, columns, key_rows, stride, rows, size, seen)


@kernel(INTS, WHOLE, WHOLE, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS)
def attend_back(
    job, layer, sequence, turned, combined, mixed, sums, d_mixed, d_turned, d_combined, room
):
    """Gradients of one sequence's attention.

    Sets d_turned (T, (H + G) D) and the values' columns of d_combined (T, Q) from d_mixed
    (T, H D).
    """
    time, size, heads, groups = job[at.TIME], job[at.HEAD], job[at.HEADS], job[at.GROUPS]
    columns = (time + at.LANES - 1) // at.LANES * at.LANES
    stride, wide = (heads + groups) * size, (heads + 2 * groups) * size
    keys, values_turned = room, skip(room, size * columns)
    block_room = skip(room, 2 * size * columns)
    for group in range(groups):
        _transpose(keys, columns, skip(turned, (heads + group) * size), stride, time, size)
        values = skip(combined, (heads + groups + group) * size)
        _transpose(values_turned, columns, values, wide, time, size)
        d_key = skip(d_turned, (heads + group) * size)
        d_value = skip(d_combined, (heads + groups + group) * size)
        for t in range(time):
            for d in range(size):
                d_key[t * stride + d] = _ZERO
            for d in range(size):
                d_value[t * wide + d] = _ZERO
        for head in range(group * (heads // groups), (group + 1) * (heads // groups)):
            for first in range(0, time, at.QUERIES):
                last = min(first + at.QUERIES, time)
                _block_back(
                    job, layer, sequence, head, group, first, last, turned, mixed, sums, d_mixed,
                    d_turned, keys, values_turned, block_room,
                )  # fmt: skip
                weights = block_room
                slopes = skip(block_room, at.QUERIES * columns)
                for t in range(0, last, at.ROWS):
                    begin = max(t - first, 0)  # earlier queries do not look at this key
                    high, deep = min(at.ROWS, last - t), last - first - begin
                    row = first + begin
                    add_outer(
                        skip(d_key, t * stride), stride, skip(slopes, begin * columns + t),
                        columns, high, skip(turned, row * stride + head * size), stride, size,
                        deep,
                    )  # fmt: skip
                    add_outer(
                        skip(d_value, t * wide), wide, skip(weights, begin * columns + t),
                        columns, high, skip(d_mixed, (row * heads + head) * size), heads * size,
                        size, deep,
                    )  # fmt: skip
