"""Attention over cached keys and values, for rows of any mixture of texts.

Letters: R rows, H heads, G key/value heads, D head size, T time.
"""

from __future__ import annotations

from mygpt.cpu.common.arithmetic import normalize, padded, rotate, softmax
from mygpt.cpu.common.matmul import product
from mygpt.cpu.common.simd import FLOATS, INT64, INTS, floats, kernel, skip
from mygpt.cpu.decode import layout as at

# The caches consist of one piece for each (slot, layer, key/value head), in that order. T is the
# capacity (TIME_STRIDE), W the head size rounded up to whole vectors (HEAD_STRIDE):
#
#     keys, transposed (D, T)              values (T, W)
#           t = 0   1   2  ...  T-1              d = 0  1  ... D-1, zeros to W
#     d = 0   k   k   k                   t = 0    v  v  ...  v   0 0
#     d = 1   k   k   k                   t = 1    v  v  ...  v   0 0
#      ...                                 ...
#
# Each is the second operand of a product whose columns must follow each other in memory, as a
# tile's vectors do: scores = q K^T, (rows, D) (D, T), and attended = weights V, (rows, T) (T, W).
# So both use the same tile as every other product, and a row's sums have one order. The price is
# the store of a new key, whose D numbers go T apart: measured as 4% of a cropped window's time.


@kernel(INTS, INT64, INT64, INT64, returns=INT64)
def _cache_offset(job, slot, layer, group):
    """The number of a piece of the cache, (slots, layers, G) in row-major order."""
    return (slot * job[at.LAYERS] + layer) * job[at.GROUPS] + group


@kernel(FLOATS, INT64, INTS, INT64)
def _prepare_head(x, position, job, norm):
    """Normalise and rotate one query or key head in place, as far as the model does so."""
    size = job[at.HEAD]
    if job[at.QK_NORM]:
        normalize(x, x, size, at.RMS_NORM, norm, 0, floats(job[at.REALS])[at.EPS])
    if job[at.ROTARY]:
        cosines, sines = floats(job[at.COSINES]), floats(job[at.SINES])
        rotate(x, size, skip(cosines, position * size), skip(sines, position * size))


@kernel(INTS, INTS, INT64, INT64, INT64, INT64, INTS)
def prepare_queries(job, layer, first_row, last_row, first_head, last_head, positions):
    """Normalise and rotate the queries of some rows and heads in place."""
    for row in range(first_row, last_row):
        query = skip(floats(job[at.QUERY]), row * job[at.QUERY_STRIDE])
        for head in range(first_head, last_head):
            own = skip(query, head * job[at.HEAD])
            _prepare_head(own, positions[row], job, layer[at.QUERY_NORM])


@kernel(INTS, INTS, INT64, INT64, INT64, INT64, INT64, INTS, INTS)
def store_keys_values(
    job, layer, number, first_row, last_row, first_group, last_group, slots, positions
):
    """Put the keys and values of some rows into the cache, keys normalised and rotated."""
    size, wide, time = job[at.HEAD], job[at.HEAD_STRIDE], job[at.TIME_STRIDE]
    for row in range(first_row, last_row):
        # A row of KEY_VALUE: | key of head 0 | ... | key of head G-1 | value of head 0 | ... |
        pair = skip(floats(job[at.KEY_VALUE]), row * job[at.KEY_VALUE_STRIDE])
        position = positions[row]
        for group in range(first_group, last_group):
            key, value = skip(pair, group * size), skip(pair, (job[at.GROUPS] + group) * size)
            _prepare_head(key, position, job, layer[at.KEY_NORM])
            piece = _cache_offset(job, slots[row], number, group)
            keys = skip(floats(job[at.KEYS]), piece * size * time + position)  # column `position`
            values = skip(floats(job[at.VALUES]), (piece * time + position) * wide)  # a row
            for d in range(size):
                values[d] = value[d]
            for d in range(size):
                keys[d * time] = key[d]


@kernel(INTS, INT64, INT64, INT64, INT64, INT64, INT64, INT64)
def _attend_tile(job, thread, number, row, rows, head, slot, position):
    """One head of `rows` rows of one text, the first of them at `position`."""
    size, wide, time = job[at.HEAD], job[at.HEAD_STRIDE], job[at.TIME_STRIDE]
    # Grouped-query attention (Ainslie et al., 2023): H / G query heads share a key/value head.
    piece = _cache_offset(job, slot, number, head // (job[at.HEADS] // job[at.GROUPS]))
    keys = skip(floats(job[at.KEYS]), piece * size * time)
    values = skip(floats(job[at.VALUES]), piece * time * wide)
    scores = skip(floats(job[at.SCORES]), thread * at.ROWS * time)
    query = skip(floats(job[at.QUERY]), row * job[at.QUERY_STRIDE] + head * size)
    # Scores of 3 rows, the first at position 4 ("." is computed by the tile, then masked):
    #     row 0: s s s s s . . .        seen = 7 positions for the last row,
    #     row 1: s s s s s s . .        columns = 8, whole vectors (here of 4)
    #     row 2: s s s s s s s .
    # Columns past `seen` are inside the cache, whose capacity is a multiple of LANES. Whatever is
    # there, the softmax replaces its scores.
    seen = position + rows
    columns = padded(seen)
    product(scores, time, query, job[at.QUERY_STRIDE], keys, time, rows, size, columns)
    # The causal mask: row r's softmax covers positions 0 to position + r, and sets the rest to 0.
    for r in range(rows):
        own = skip(scores, r * time)
        softmax(own, position + r + 1, columns, floats(job[at.REALS])[at.SCORE_SCALE])
    attended = skip(floats(job[at.ATTENDED]), row * job[at.ATTENDED_STRIDE] + head * wide)
    product(attended, job[at.ATTENDED_STRIDE], scores, time, values, wide, rows, seen, wide)


@kernel(INTS, INT64, INT64, INT64, INT64, INT64, INT64, INTS, INTS)
def attend(job, thread, number, first_row, last_row, first_head, last_head, slots, positions):
    """ATTENDED = softmax(q K^T / sqrt D) V of each row and head, up to the row's own position."""
    row = first_row
    while row < last_row:
        # Consecutive positions of one text (a prompt's rows) go through the tiles together; a row
        # that is alone (one new token of a text) is a tile of height 1.
        rows = 1
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
