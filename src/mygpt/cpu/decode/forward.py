"""One pass of the model over some rows: each row is one token at one position of one text.

All threads run this at once and divide the work in one of two ways:

- With few rows (decoding) each thread computes a part of every matrix's outputs, and some of the
  heads, for all rows. Threads have to wait for each other after each product: five barriers a
  layer.
- With many rows (a prompt) each thread takes whole rows through the layers. They wait once a layer,
  when keys and values are stored, since a row attends to those of other threads' rows.

Only the rows whose prediction is wanted ("outputs": the last one of a prompt) go through the last
block beyond its keys and values, and through the head.
Letters: R rows, C embedding, H heads, G key/value heads, M MLP width.
"""

from __future__ import annotations

from numba import types

from mygpt.cpu.common.arithmetic import activate, f32, normalize, part_start
from mygpt.cpu.common.int4 import multiply_int4, pack_inputs
from mygpt.cpu.common.int4_format import GROUP, INPUT_WORDS
from mygpt.cpu.common.matmul import multiply, multiply_int8, set_bias
from mygpt.cpu.common.simd import (
    FLOATS,
    INT64,
    INTS,
    WORDS,
    atomic_add,
    atomic_load,
    floats,
    int8s,
    ints,
    kernel,
    skip,
    words,
)
from mygpt.cpu.decode import layout as at
from mygpt.cpu.decode.attention import attend, prepare_queries, store_keys_values

# Rows per thread from which on threads divide the rows instead of the outputs. With fewer rows many
# tiles would not be full, and every thread would read all weights for a few rows; with more rows
# dividing the outputs would need barriers that are not necessary. Four tiles are an estimate of
# where the two are equal: no measurement is recorded.
_MANY_ROWS = 4 * at.ROWS
# Reads of the barrier's counter (about a nanosecond each) before a waiting thread offers its core
# to others. A thread that is this late has probably lost its core, and the core it needs may be
# ours. Fewer would call the system in ordinary waits; no measurement of the number is recorded.
_SPINS = 2000

sched_yield = types.ExternalFunction("sched_yield", types.int32())


# The barrier is one counter that only grows. Arrivals 0 to n - 1 (n threads) belong to the first
# barrier, n to 2n - 1 to the second, and so on:
#
#     counter   0 ... n-1 | n ... 2n-1 | 2n ...
#     waits for     n     |     2n     |  3n       = (arrival // n + 1) * n
#
# As it is never set back during a run, a fast thread that already waits at the next barrier cannot
# disturb a slow one that has not yet left this one. `Memory.reset_barrier` sets it to 0 between
# runs when n changes. What was written before the barrier is visible after it: see `atomic_add` and
# `atomic_load`.
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
        if spins > _SPINS:
            sched_yield()


@kernel(INTS, INT64)
def _barrier_if(job, parts):
    """A barrier where outputs are divided between threads; none where each has rows of its own."""
    if parts > 1:
        barrier(job)


@kernel(INT64, INT64, INT64, returns=types.UniTuple(INT64, 4))
def _my_rows(rows, thread, threads):
    """This thread's rows, in whole tiles, and of the outputs all (part 0 of 1).

    Returns:
        (first row, last row, part, parts)
    """
    tiles = (rows + at.ROWS - 1) // at.ROWS
    first = part_start(tiles, thread, threads) * at.ROWS
    return first, min(part_start(tiles, thread + 1, threads) * at.ROWS, rows), 0, 1


@kernel(FLOATS, INT64, FLOATS, INT64, INT64, INTS, WORDS, INT64, INT64, INT64)
def _linear(y, y_stride, x, x_stride, rows, matrix, inputs, adding, part, parts):
    """y = x W + b, or y += x W + b, for the outputs of part number `part` of `parts`.

    y is (rows, N padded to whole vectors) and x (rows, C), float32; `matrix` points to a packed
    matrix's description (see `layout`); `inputs` is this thread's buffer for x as weights of
    4 bits are multiplied by it. Each part computes whole panels.
    """
    outputs, depth = matrix[at.OUTPUTS_PADDED], matrix[at.DEPTH]
    panels = (outputs + at.PANEL - 1) // at.PANEL
    first = part_start(panels, part, parts) * at.PANEL
    count = min(part_start(panels, part + 1, parts) * at.PANEL, outputs) - first
    out = skip(y, first)
    if matrix[at.BIAS] != 0:
        set_bias(out, y_stride, rows, skip(floats(matrix[at.BIAS]), first), count, adding)
        adding = 1  # the products are added to the bias
    if matrix[at.FORMAT] == at.IN_INT4:
        groups = (depth + GROUP - 1) // GROUP
        stride = groups * INPUT_WORDS
        pack_inputs(inputs, stride, x, x_stride, rows, depth)
        w = skip(words(matrix[at.DATA]), groups * (GROUP // 8 * first + first // 2))
        multiply_int4(out, y_stride, inputs, stride, rows, w, count, groups, adding)
    elif matrix[at.FORMAT] == at.IN_INT8:
        w, scales = skip(int8s(matrix[at.DATA]), first * depth), floats(matrix[at.SCALES])
        multiply_int8(
            out, y_stride, x, x_stride, rows, w, skip(scales, first), count, depth, adding
        )
    else:
        w = skip(floats(matrix[at.DATA]), first * depth)
        multiply(out, y_stride, x, x_stride, rows, w, out, count, depth, adding)


@kernel(FLOATS, INTS, INT64)
def _copy_row(out, matrix, row):
    """out = the C weights of output number `row`: a token's embedding."""
    # An embedding (V, C) is a packed matrix with V outputs, which a tied head multiplies by. Its
    # row is a column of a panel: every width-th element.
    depth, outputs = matrix[at.DEPTH], matrix[at.OUTPUTS_PADDED]
    panel = row // at.PANEL
    width = min(at.PANEL, outputs - panel * at.PANEL)
    start = panel * at.PANEL * depth + row - panel * at.PANEL
    if matrix[at.FORMAT] == at.IN_INT8:
        data, scale = skip(int8s(matrix[at.DATA]), start), floats(matrix[at.SCALES])[row]
        for k in range(depth):
            out[k] = f32(data[k * width]) * scale
    else:
        values = skip(floats(matrix[at.DATA]), start)
        for k in range(depth):
            out[k] = values[k * width]


@kernel(INTS, FLOATS, INT64, INT64)
def _embed(job, x, first, last):
    """x = the token's embedding, plus the position's where the model has embeddings of those."""
    width, tokens, positions = job[at.WIDTH], ints(job[at.ROW_TOKEN]), ints(job[at.ROW_POSITION])
    for row in range(first, last):
        out = skip(x, row * job[at.WIDTH_STRIDE])
        _copy_row(out, ints(job[at.EMBEDDING]), tokens[row])
        if job[at.POSITIONS] != 0:
            here = skip(floats(job[at.POSITIONS]), positions[row] * width)
            for c in range(width):
                out[c] += here[c]


@kernel(INTS, INT64, returns=FLOATS)
def _my_normed(job, thread):
    """This thread's own buffer of normalised rows, (MAX_ROWS, C)."""
    # With few rows each thread normalises all of them for itself: that is less work than a barrier.
    return skip(floats(job[at.NORMED]), thread * job[at.MAX_ROWS] * job[at.WIDTH_STRIDE])


@kernel(INTS, INT64, returns=WORDS)
def _my_inputs(job, thread):
    """This thread's own buffer of packed inputs, INPUT_WORDS words for each of MAX_ROWS."""
    return skip(words(job[at.INPUTS]), thread * job[at.MAX_ROWS] * job[at.INPUT_WORDS])


@kernel(INTS, INT64, FLOATS, INT64, INT64, INT64, INT64)
def _normalize(job, thread, x, weight, bias, first, last):
    """This thread's normalised rows = LayerNorm or RMSNorm of the rows of x."""
    normed, stride = _my_normed(job, thread), job[at.WIDTH_STRIDE]
    for row in range(first, last):
        normalize(
            skip(normed, row * stride), skip(x, row * stride), job[at.WIDTH], job[at.NORM],
            weight, bias, floats(job[at.REALS])[at.EPS],
        )  # fmt: skip


@kernel(INTS, INT64, INTS, INT64, INT64, INT64, INT64, INT64, INT64, INT64)
def _project(job, thread, layer, matrix, out, out_stride, first, last, part, parts):
    """The buffer `out` = normalised rows times one of the layer's matrices."""
    stride = job[at.WIDTH_STRIDE]
    y = skip(floats(job[out]), first * job[out_stride])
    x = skip(_my_normed(job, thread), first * stride)
    _linear(
        y, job[out_stride], x, stride, last - first, skip(layer, matrix), _my_inputs(job, thread),
        0, part, parts,
    )  # fmt: skip


@kernel(INTS, INT64, INTS, INT64, FLOATS, INT64, INT64, INT64, INT64, INT64, INT64)
def _add_projection(job, thread, layer, matrix, x, source, source_stride, first, last, part, parts):
    """x += rows of the buffer `source` times one of the layer's matrices."""
    stride = job[at.WIDTH_STRIDE]
    rows = skip(floats(job[source]), first * job[source_stride])
    _linear(
        skip(x, first * stride), stride, rows, job[source_stride], last - first,
        skip(layer, matrix), _my_inputs(job, thread), 1, part, parts,
    )  # fmt: skip


@kernel(INTS, INT64, INTS, INT64, FLOATS, INTS, INTS, INT64, INT64, INT64, INT64)
def attention_and_mlp(job, thread, layer, number, x, slots, positions, first, last, part, parts):
    """A block from its queries to its end: x += attention, x += MLP."""
    # A barrier (B) is needed wherever a product reads columns that other threads have written:
    #
    #     own columns of q, k, v (by the caller)                    B
    #     own heads: k and v stored (by the caller), attended       B
    #     own columns: x += W_OUTPUT attended                       B
    #     norm of all of x; own panels of gate and up, activated    B
    #     own columns: x += W_DOWN activated                        B
    #
    # Heads are divided by key/value groups, so that a thread attends to keys it has stored itself.
    heads_a_group = job[at.HEADS] // job[at.GROUPS]
    head = part_start(job[at.GROUPS], part, parts) * heads_a_group
    next_head = part_start(job[at.GROUPS], part + 1, parts) * heads_a_group
    prepare_queries(job, layer, first, last, head, next_head, positions)
    attend(job, thread, number, first, last, head, next_head, slots, positions)
    _barrier_if(job, parts)
    _add_projection(
        job, thread, layer, at.W_OUTPUT, x, at.ATTENDED, at.ATTENDED_STRIDE, first, last, part,
        parts,
    )  # fmt: skip
    _barrier_if(job, parts)
    _normalize(job, thread, x, layer[at.NORM_2], layer[at.NORM_2_BIAS], first, last)
    _project(job, thread, layer, at.W_GATE, at.GATE, at.HIDDEN_STRIDE, first, last, part, parts)
    if job[at.MLP] == at.SWIGLU:
        _project(job, thread, layer, at.W_UP, at.UP, at.HIDDEN_STRIDE, first, last, part, parts)
    panels = (job[at.HIDDEN_STRIDE] + at.PANEL - 1) // at.PANEL
    begin = part_start(panels, part, parts) * at.PANEL
    end = min(part_start(panels, part + 1, parts) * at.PANEL, job[at.HIDDEN_STRIDE])
    gate, up = skip(floats(job[at.GATE]), begin), skip(floats(job[at.UP]), begin)
    # The panels that `_linear` has computed in this thread (it divides them in the same way).
    for row in range(first, last):
        away = row * job[at.HIDDEN_STRIDE]
        own = skip(gate, away)
        activate(own, own, skip(up, away), end - begin, job[at.MLP])
    _barrier_if(job, parts)
    _add_projection(
        job, thread, layer, at.W_DOWN, x, at.GATE, at.HIDDEN_STRIDE, first, last, part, parts
    )
    _barrier_if(job, parts)


@kernel(INTS, INT64, INT64, INTS)
def _predict(job, thread, threads, layer):
    """The last block from its queries on, the last norm and the head, for the outputs alone."""
    # Other rows of the last block are needed only as keys and values. When a cropped window is read
    # again for each token, that saves nearly all of one block. The outputs are few, so here threads
    # always divide the columns.
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
        job, thread, layer, job[at.LAYERS] - 1, last_x, slots, positions, 0, outputs, thread,
        threads,
    )  # fmt: skip
    _normalize(job, thread, last_x, job[at.FINAL_WEIGHT], job[at.FINAL_BIAS], 0, outputs)
    logits = skip(floats(job[at.LOGITS]), job[at.OUTPUTS_BEFORE] * job[at.VOCAB_STRIDE])
    _linear(
        logits, job[at.VOCAB_STRIDE], _my_normed(job, thread), stride, outputs,
        ints(job[at.HEAD_MATRIX]), _my_inputs(job, thread), 0, thread, threads,
    )  # fmt: skip


@kernel(INTS, INT64)
def forward(job, thread):
    """Read the job's rows; logits of its outputs go to LOGITS, from row OUTPUTS_BEFORE on."""
    rows, threads = job[at.NUM_ROWS], job[at.THREADS]
    slots, positions = ints(job[at.ROW_SLOT]), ints(job[at.ROW_POSITION])
    x = floats(job[at.X])
    # What this thread computes: part number `part` of `parts` of the outputs for the rows from
    # `first` to `last`: all rows and a part of the outputs, or some rows and all outputs.
    first, last, part, parts = 0, rows, thread, threads
    if rows >= _MANY_ROWS * threads:
        first, last, part, parts = _my_rows(rows, thread, threads)
    if parts > 1:
        _embed(job, x, part_start(rows, thread, threads), part_start(rows, thread + 1, threads))
        barrier(job)
    else:
        _embed(job, x, first, last)
    group = part_start(job[at.GROUPS], part, parts)
    next_group = part_start(job[at.GROUPS], part + 1, parts)
    for number in range(job[at.LAYERS]):
        layer = skip(ints(job[at.LAYER_TABLE]), number * at.LAYER_SIZE)
        top = number == job[at.LAYERS] - 1
        _normalize(job, thread, x, layer[at.NORM_1], layer[at.NORM_1_BIAS], first, last)
        _project(
            job, thread, layer, at.W_KEY_VALUE, at.KEY_VALUE, at.KEY_VALUE_STRIDE, first, last,
            part, parts,
        )  # fmt: skip
        if not top:
            _project(
                job, thread, layer, at.W_QUERY, at.QUERY, at.QUERY_STRIDE, first, last, part, parts
            )
        _barrier_if(job, parts)
        store_keys_values(job, layer, number, first, last, group, next_group, slots, positions)
        # Rows of other threads: where rows are divided, their keys are attended to; in the last
        # block, `_predict` divides the work differently.
        if top or parts == 1:
            barrier(job)
        if not top:
            attention_and_mlp(
                job, thread, layer, number, x, slots, positions, first, last, part, parts
            )
    if job[at.OUTPUTS] > 0:
        top_layer = skip(ints(job[at.LAYER_TABLE]), (job[at.LAYERS] - 1) * at.LAYER_SIZE)
        _predict(job, thread, threads, top_layer)
