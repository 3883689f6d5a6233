"""Attention over cached keys and values, for rows of any mixture of texts.

Keys lie transposed, (D, time), so that one query's scores for many positions come out of the
same tile kernel as every other product; values lie (time, D padded).
Letters: R rows, H heads, G key/value heads, D head size, T time.
"""

from __future__ import annotations

from mygpt.engines.cpu import layout as at
from mygpt.engines.cpu.arithmetic import normalize, softmax
from mygpt.engines.cpu.matmul import DEPTH_BLOCK, multiply
from mygpt.engines.cpu.simd import (
    FLOATS,
    INTS,
    WHOLE,
    floats,
    kernel,
    skip,
)


@kernel(INTS, WHOLE, WHOLE, WHOLE, returns=WHOLE)
def _cache_offset(job, slot, layer, group):
    """Which of the (slots, layers, G) pieces of the cache this is."""
    return (slot * job[at.LAYERS] + layer) * job[at.GROUPS] + group


@kernel(FLOATS, WHOLE, INTS)
def _turn(x, position, job):
    """Rotate the head x of D numbers by its position's angles, by halves, in place."""
    half = job[at.HEAD] // 2
    cosines = skip(floats(job[at.COSINES]), position * job[at.HEAD])
    sines = skip(floats(job[at.SINES]), position * job[at.HEAD])
    for i in range(half):
        first, second = x[i], x[i + half]
        x[i] = first * cosines[i] - second * sines[i]
        x[i + half] = second * cosines[i] + first * sines[i]


@kernel(FLOATS, WHOLE, INTS, WHOLE)
def _ready(x, position, job, norm):
    """Normalise and turn one query or key head in place, where the model does."""
    if job[at.QK_NORM]:
        weight = floats(norm)
        normalize(x, x, job[at.HEAD], at.RMS_NORM, weight, weight, floats(job[at.REALS])[at.EPS])
    if job[at.ROTARY]:
        _turn(x, position, job)


@kernel(INTS, INTS, WHOLE, WHOLE, WHOLE, WHOLE, INTS)
def prepare_queries(job, layer, first_row, last_row, first_head, last_head, positions):
    """Normalise and turn queries in place."""
    for row in range(first_row, last_row):
        query = skip(floats(job[at.QUERY]), row * job[at.QUERY_STRIDE])
        for head in range(first_head, last_head):
            _ready(skip(query, head * job[at.HEAD]), positions[row], job, layer[at.QUERY_NORM])


@kernel(INTS, INTS, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, INTS, INTS)
def store_pairs(job, layer, number, first_row, last_row, first_group, last_group, slots, positions):
    """Put keys and values of rows where later rows of their texts find them."""
    size, wide, time = job[at.HEAD], job[at.HEAD_STRIDE], job[at.TIME_STRIDE]
    for row in range(first_row, last_row):
        pair = skip(floats(job[at.PAIR]), row * job[at.PAIR_STRIDE])
        position = positions[row]
        for group in range(first_group, last_group):
            key, value = skip(pair, group * size), skip(pair, (job[at.GROUPS] + group) * size)
            _ready(key, position, job, layer[at.KEY_NORM])
            piece = _cache_offset(job, slots[row], number, group)
            keys = skip(floats(job[at.KEYS]), piece * size * time + position)
            values = skip(floats(job[at.VALUES]), (piece * time + position) * wide)
            for d in range(size):
                values[d] = value[d]
            for d in range(size):
                keys[d * time] = key[d]


@kernel(INTS, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE)
def _attend_tile(job, thread, number, row, rows, head, slot, position):
    """`rows` rows of one text, the first at `position`, one head."""
    size, wide, time = job[at.HEAD], job[at.HEAD_STRIDE], job[at.TIME_STRIDE]
    piece = _cache_offset(job, slot, number, head // (job[at.HEADS] // job[at.GROUPS]))
    keys = skip(floats(job[at.KEYS]), piece * size * time)
    values = skip(floats(job[at.VALUES]), piece * time * wide)
    scores = skip(floats(job[at.SCORES]), thread * at.ROWS * time)
    query = skip(floats(job[at.QUERY]), row * job[at.QUERY_STRIDE] + head * size)
    seen = position + rows  # positions the tile's last row looks at
    columns = (seen + at.LANES - 1) // at.LANES * at.LANES
    for t in range(0, columns, at.PANEL):
        vectors = min(at.VECTORS, (columns - t) // at.LANES)
        multiply(
            skip(scores, t), time, query, job[at.QUERY_STRIDE], skip(keys, t), time, size, rows,
            vectors, 0,
        )  # fmt: skip
    for r in range(rows):
        own = skip(scores, r * time)
        softmax(own, position + r + 1, columns, floats(job[at.REALS])[at.SCORE_SCALE])
    mixed = skip(floats(job[at.MIXED]), row * job[at.MIXED_STRIDE] + head * wide)
    for d in range(0, wide, at.PANEL):
        vectors = min(at.VECTORS, (wide - d) // at.LANES)
        for t in range(0, seen, DEPTH_BLOCK):
            multiply(
                skip(mixed, d), job[at.MIXED_STRIDE], skip(scores, t), time,
                skip(values, t * wide + d), wide, min(DEPTH_BLOCK, seen - t), rows, vectors, t,
            )  # fmt: skip


@kernel(INTS, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, INTS, INTS)
def attend(job, thread, number, first_row, last_row, first_head, last_head, slots, positions):
    """Each row's and head's mixture of values up to the row's own position, into MIXED."""
    row = first_row
    while row < last_row:
        rows = 1  # consecutive positions of one text go through the tiles together
        while (
            rows < at.ROWS
            and row + rows < last_row
            and slots[row + rows] == slots[row]
            and positions[row + rows] == positions[row] + rows
        ):
            rows += 1
        for head in range(first_head, last_head):
            _attend_tile(job, thread, number, row, rows, head, slots[row], positions[row])
        row += rows
