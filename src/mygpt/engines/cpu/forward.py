"""One pass of the model over some rows: each row is one token at one position of one text.

Threads run this together. With few rows each takes a share of every matrix's outputs, and they
meet after each product; with many rows each takes a share of the rows, and they meet once a
layer, when keys and values are stored. Only the rows whose prediction is wanted ("outputs")
go through the last block beyond its keys and values.
Letters: R rows, C embedding, H heads, G key/value heads, M at.MLP width.
"""

from __future__ import annotations

from numba import types

from mygpt.engines.cpu import layout as at
from mygpt.engines.cpu.arithmetic import activate, normalize, part_start
from mygpt.engines.cpu.attention import attend, prepare_queries, store_keys_values
from mygpt.engines.cpu.matmul import copy_row, linear
from mygpt.engines.cpu.simd import (
    FLOATS,
    INT64,
    INTS,
    atomic_add,
    atomic_load,
    floats,
    ints,
    kernel,
    skip,
)

_MANY_ROWS = 4 * at.ROWS  # from here on a thread's own rows fill its tiles
_SPINS = 2000

sched_yield = types.ExternalFunction("sched_yield", types.int32())


@kernel(INTS)
def barrier(job):
    """Wait until every thread is here."""
    threads = job[at.THREADS]
    if threads == 1:
        return
    counter = ints(job[at.BARRIER])
    goal = (atomic_add(counter, 1) // threads + 1) * threads
    spins = 0
    while atomic_load(counter) < goal:
        spins += 1
        if spins > _SPINS:  # a thread has lost its core to someone: leave ours to them too
            sched_yield()


@kernel(INTS, INT64)
def _barrier_if(job, parts):
    if parts > 1:
        barrier(job)


@kernel(INT64, INT64, INT64, returns=types.UniTuple(INT64, 4))
def _my_rows(rows, thread, threads):
    """This thread's rows in whole tiles, and all columns: first, last, part, parts."""
    tiles = (rows + at.ROWS - 1) // at.ROWS
    first, last = (
        part_start(tiles, thread, threads) * at.ROWS,
        part_start(tiles, thread + 1, threads) * at.ROWS,
    )
    return first, min(last, rows), 0, 1


@kernel(INTS, FLOATS, INT64, INT64)
def _embed(job, x, first, last):
    """x = the token's embedding, plus the position's where the model has learned ones."""
    width, tokens, positions = job[at.WIDTH], ints(job[at.ROW_TOKEN]), ints(job[at.ROW_POSITION])
    for row in range(first, last):
        out = skip(x, row * job[at.WIDTH_STRIDE])
        copy_row(out, ints(job[at.EMBEDDING]), tokens[row], job[at.QUANTIZED])
        if job[at.POSITIONS] != 0:
            here = skip(floats(job[at.POSITIONS]), positions[row] * width)
            for c in range(width):
                out[c] += here[c]


@kernel(INTS, INT64, returns=FLOATS)
def _my_normed(job, thread):
    """This thread's own room for normalised rows: sharing it would cost a meeting."""
    return skip(floats(job[at.NORMED]), thread * job[at.MAX_ROWS] * job[at.WIDTH_STRIDE])


@kernel(INTS, INT64, FLOATS, INT64, INT64, INT64, INT64)
def _normalize(job, thread, x, weight, bias, first, last):
    normed, stride = _my_normed(job, thread), job[at.WIDTH_STRIDE]
    for row in range(first, last):
        normalize(
            skip(normed, row * stride), skip(x, row * stride), job[at.WIDTH], job[at.NORM],
            floats(weight), floats(bias), floats(job[at.REALS])[at.EPS],
        )  # fmt: skip


@kernel(INTS, INT64, INTS, INT64, INT64, INT64, INT64, INT64, INT64, INT64)
def _project(job, thread, layer, matrix, out, out_stride, first, last, part, parts):
    """out = normed rows times one of the layer's matrices."""
    stride = job[at.WIDTH_STRIDE]
    y = skip(floats(job[out]), first * job[out_stride])
    x = skip(_my_normed(job, thread), first * stride)
    linear(
        y, job[out_stride], x, stride, last - first, skip(layer, matrix), job[at.QUANTIZED], 0,
        part, parts,
    )  # fmt: skip


@kernel(INTS, INTS, INT64, FLOATS, INT64, INT64, INT64, INT64, INT64, INT64)
def _add_projection(job, layer, matrix, x, source, source_stride, first, last, part, parts):
    """x += rows of a buffer times one of the layer's matrices."""
    stride = job[at.WIDTH_STRIDE]
    rows = skip(floats(job[source]), first * job[source_stride])
    linear(
        skip(x, first * stride), stride, rows, job[source_stride], last - first,
        skip(layer, matrix), job[at.QUANTIZED], 1, part, parts,
    )  # fmt: skip


@kernel(INTS, INT64, INTS, INT64, FLOATS, INTS, INTS, INT64, INT64, INT64, INT64)
def attention_and_mlp(job, thread, layer, number, x, slots, positions, first, last, part, parts):
    """From queries on to the end of a block: x += attention, x += MLP."""
    heads_a_group = job[at.HEADS] // job[at.GROUPS]
    head = part_start(job[at.GROUPS], part, parts) * heads_a_group
    next_head = part_start(job[at.GROUPS], part + 1, parts) * heads_a_group
    prepare_queries(job, layer, first, last, head, next_head, positions)
    attend(job, thread, number, first, last, head, next_head, slots, positions)
    _barrier_if(job, parts)
    _add_projection(
        job, layer, at.W_OUTPUT, x, at.ATTENDED, at.ATTENDED_STRIDE, first, last, part, parts
    )
    _barrier_if(job, parts)
    _normalize(job, thread, x, layer[at.NORM_2], layer[at.NORM_2_BIAS], first, last)
    _project(job, thread, layer, at.W_GATE, at.GATE, at.HIDDEN_STRIDE, first, last, part, parts)
    if job[at.MLP] == at.SWIGLU:
        _project(job, thread, layer, at.W_UP, at.UP, at.HIDDEN_STRIDE, first, last, part, parts)
    panels = (job[at.HIDDEN_STRIDE] + at.PANEL - 1) // at.PANEL
    begin = part_start(panels, part, parts) * at.PANEL
    end = min(part_start(panels, part + 1, parts) * at.PANEL, job[at.HIDDEN_STRIDE])
    gate, up = skip(floats(job[at.GATE]), begin), skip(floats(job[at.UP]), begin)
    for row in range(first, last):
        away = row * job[at.HIDDEN_STRIDE]
        activate(skip(gate, away), skip(up, away), end - begin, job[at.MLP])
    _barrier_if(job, parts)
    _add_projection(job, layer, at.W_DOWN, x, at.GATE, at.HIDDEN_STRIDE, first, last, part, parts)
    _barrier_if(job, parts)


@kernel(INTS, INT64, INT64, INTS)
def _predict(job, thread, threads, layer):
    """The rest of the last block and the head, for the outputs alone."""
    stride, outputs = job[at.WIDTH_STRIDE], job[at.OUTPUTS]
    x, last_x, chosen = floats(job[at.X]), floats(job[at.X_LAST]), ints(job[at.OUTPUT_ROW])
    for row in range(
        part_start(outputs, thread, threads), part_start(outputs, thread + 1, threads)
    ):
        for c in range(job[at.WIDTH]):
            last_x[row * stride + c] = x[chosen[row] * stride + c]
    barrier(job)
    _normalize(job, thread, last_x, layer[at.NORM_1], layer[at.NORM_1_BIAS], 0, outputs)
    _project(job, thread, layer, at.W_QUERY, at.QUERY, at.QUERY_STRIDE, 0, outputs, thread, threads)
    barrier(job)
    slots, positions = ints(job[at.OUTPUT_SLOT]), ints(job[at.OUTPUT_POSITION])
    attention_and_mlp(
        job,
        thread,
        layer,
        job[at.LAYERS] - 1,
        last_x,
        slots,
        positions,
        0,
        outputs,
        thread,
        threads,
    )
    _normalize(job, thread, last_x, job[at.FINAL_WEIGHT], job[at.FINAL_BIAS], 0, outputs)
    logits = skip(floats(job[at.LOGITS]), job[at.OUTPUTS_BEFORE] * job[at.VOCAB_STRIDE])
    linear(
        logits, job[at.VOCAB_STRIDE], _my_normed(job, thread), stride, outputs,
        ints(job[at.HEAD_MATRIX]), job[at.QUANTIZED], 0, thread, threads,
    )  # fmt: skip


@kernel(INTS, INT64)
def forward(job, thread):
    """Read the job's rows; logits of its outputs go to LOGITS, from row OUTPUTS_BEFORE on."""
    rows, threads = job[at.NUM_ROWS], job[at.THREADS]
    slots, positions = ints(job[at.ROW_SLOT]), ints(job[at.ROW_POSITION])
    x = floats(job[at.X])
    first, last, part, parts = 0, rows, thread, threads
    if rows >= _MANY_ROWS * threads:
        first, last, part, parts = _my_rows(rows, thread, threads)
    if parts > 1:
        _embed(job, x, part_start(rows, thread, threads), part_start(rows, thread + 1, threads))
        barrier(job)
    else:
        _embed(job, x, first, last)
    groups, next_groups = (
        part_start(job[at.GROUPS], part, parts),
        part_start(job[at.GROUPS], part + 1, parts),
    )
    for number in range(job[at.LAYERS]):
        layer = skip(ints(job[at.LAYER_TABLE]), number * at.LAYER_SIZE)
        top = number == job[at.LAYERS] - 1
        _normalize(job, thread, x, layer[at.NORM_1], layer[at.NORM_1_BIAS], first, last)
        _project(
            job,
            thread,
            layer,
            at.W_KEY_VALUE,
            at.KEY_VALUE,
            at.KEY_VALUE_STRIDE,
            first,
            last,
            part,
            parts,
        )
        if not top:
            _project(
                job, thread, layer, at.W_QUERY, at.QUERY, at.QUERY_STRIDE, first, last, part, parts
            )
        _barrier_if(job, parts)
        store_keys_values(job, layer, number, first, last, groups, next_groups, slots, positions)
        if top or parts == 1:
            barrier(job)
        if not top:
            attention_and_mlp(
                job, thread, layer, number, x, slots, positions, first, last, part, parts
            )
    if job[at.OUTPUTS] > 0:
        top_layer = skip(ints(job[at.LAYER_TABLE]), (job[at.LAYERS] - 1) * at.LAYER_SIZE)
        _predict(job, thread, threads, top_layer)
