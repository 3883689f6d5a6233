"""The rows of n-gram tables that are added to a token's embedding.

Letters: C embedding, N highest order, V vocabulary.
"""

from __future__ import annotations

from mygpt.engines.cpu import layout as at
from mygpt.engines.cpu.simd import FLOATS, INTS, WHOLE, floats, ints, kernel, skip


@kernel(INTS, WHOLE, WHOLE, returns=WHOLE)
def _find(keys, count, key):
    """The place of a key among sorted ones, plus 1; 0 where it is not there."""
    low = 0
    while count > 0:  # all keys before `low` are smaller, all from `low + count` on are not
        half = count // 2
        if keys[low + half] < key:
            low += half + 1
            count -= half + 1
        elif keys[low + half] == key:
            return low + half + 1
        else:
            count = half
    return 0


@kernel(INTS, INTS, WHOLE, WHOLE, returns=WHOLE)
def _row_of(job, text, position, order):
    """The row of the n-gram of this order that ends at a window's position; 0 for none."""
    first = position - order + 1
    if first < 0:
        return 0
    row = text[first]
    for n in range(1, order):
        table = skip(ints(job[at.NGRAM_TABLES]), (n - 1) * at.TABLE_SIZE)
        key = row * job[at.VOCAB] + text[first + n]
        row = _find(ints(table[at.TABLE_KEYS]), table[at.TABLE_COUNT], key)
        if row == 0:
            return 0
    return row


@kernel(INTS, FLOATS, WHOLE, WHOLE)
def add_ngrams(job, out, number, position):
    """out += the rows of the n-grams that end at a position of slot `number`'s window."""
    start = skip(ints(job[at.SLOT_TABLE]), number * at.SLOT_SIZE)[at.START]
    text = skip(ints(job[at.TEXT]), number * job[at.TEXT_STRIDE] + start)
    width = job[at.WIDTH]
    for table_number in range(job[at.NGRAM_ORDERS]):
        table = skip(ints(job[at.NGRAM_TABLES]), table_number * at.TABLE_SIZE)
        row = _row_of(job, text, position, table_number + 2)
        values = skip(floats(table[at.TABLE_DATA]), row * width)
        for c in range(width):
            out[c] += values[c]
