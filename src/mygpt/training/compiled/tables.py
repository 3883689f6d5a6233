"""Updates of the n-gram tables: of the rows that a batch has met, and no others.

A row's step is its gradient over the root of the mean square of its recent ones (RMSProp of
Tieleman & Hinton, 2012, with one number a row, counted in visits): a row that is met for the
first time moves as far as one that is met in every batch.
Letters: B batch, T time, C embedding.
"""

from __future__ import annotations

import math

from mygpt.engines.cpu.arithmetic import f32
from mygpt.engines.cpu.simd import FLOATS, INTS, WHOLE, floats, ints, kernel, skip
from mygpt.training.compiled import layout as at
from mygpt.training.compiled.arithmetic import dot

_ZERO, _ONE, _LEAST = f32(0), f32(1), f32(1e-20)
_BETA = f32(0.95)


@kernel(INTS, FLOATS, INTS, WHOLE, WHOLE, WHOLE, WHOLE, FLOATS, FLOATS)
def _update_table(table, gradients, numbers, count, width, part, parts, reals, total):
    """One table's rows whose number is this part's, in the order in which the batch meets them."""
    rows, memory, chain = floats(table[at.TABLE]), floats(table[at.MEMORY]), ints(table[at.CHAIN])
    follow = skip(chain, table[at.TABLE_ROWS])  # each token's next one of the same row
    for i in range(count - 1, -1, -1):
        row = numbers[i]
        if row > 0 and row % parts == part:
            follow[i] = chain[row]  # 0 ends a chain: places are counted from 1
            chain[row] = i + 1
    for i in range(count):
        row = numbers[i]
        if row == 0 or row % parts != part or chain[row] != i + 1:
            continue
        chain[row] = 0
        for c in range(width):
            total[c] = gradients[i * width + c]
        token = follow[i]
        while token > 0:
            own = skip(gradients, (token - 1) * width)
            for c in range(width):
                total[c] += own[c]
            token = follow[token - 1]
        size = dot(total, total, width) / f32(width)
        if size == _ZERO:  # to autograd, a row that the batch has not met
            continue
        kept = skip(memory, 2 * row)
        kept[0] += _ONE
        kept[1] = _BETA * kept[1] + (_ONE - _BETA) * size
        usual = kept[1] / (_ONE - f32(_BETA ** kept[0]))
        rate = reals[at.TABLE_RATE] / f32(math.sqrt(usual + _LEAST))
        keep = _ONE - reals[at.TABLE_DECAY]
        entry = skip(rows, row * width)
        for c in range(width):
            entry[c] = entry[c] * keep - rate * total[c]


@kernel(WHOLE, WHOLE, returns=WHOLE)
def update_tables(job_address, part):
    """Update this part's rows of every table from the batch's gradients."""
    job = ints(job_address)
    count = job[at.BATCH] * job[at.TIME]
    total = skip(floats(job[at.ROOM]), part * job[at.ROOM_SIZE])  # free between steps
    for order in range(job[at.ORDERS]):
        # Parts write to chains of their own rows; to `follow`, at their own rows' tokens.
        _update_table(
            skip(ints(job[at.TABLES]), order * at.TABLE_SIZE), floats(job[at.EMBEDDED]),
            skip(ints(job[at.NGRAMS]), order * count), count, job[at.WIDTH], part,
            job[at.THREADS], floats(job[at.REALS]), total,
        )  # fmt: skip
    return 0
