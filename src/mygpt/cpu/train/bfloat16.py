"""Products of the training step with operands rounded to bfloat16 and sums in float32.

Letters: I inputs, O outputs, R rows, L = LANES, P = PANEL.
"""

from __future__ import annotations

import numpy as np

from mygpt.cpu.common.arithmetic import padded
from mygpt.cpu.common.simd import (
    FLOAT32,
    FLOATS,
    INT64,
    INTS,
    UINT32,
    WORDS,
    as_halves,
    as_words,
    bits_of_float,
    floats,
    kernel,
    skip,
    transpose_words,
    words,
)
from mygpt.cpu.common.tile import make_tile
from mygpt.cpu.train import layout as at
from mygpt.cpu.train.amx import multiply_tiles
from mygpt.cpu.train.packing import pack_column_block, pack_row_block, pair_lines, pair_row

_tile = make_tile(pairs=True)
_ZERO, _ONE, _16 = np.uint32(0), np.uint32(1), np.uint32(16)
_HALF, _UPPER = np.uint32(0x7FFF), np.uint32(0xFFFF0000)

# A bfloat16 is the upper half of a float32: sign, 8 bits of exponent, 7 of mantissa. A product
# y[m, n] = sum over k of x[m, k] w[k, n] has its operands as words of two numbers, k in the lower
# half and k + 1 in the upper one, so that one instruction multiplies and adds both:
#
#     x  (M rows, K / 2 words)         w  (K / 2 lines, N words), in panels of P columns
#
#           k = 0, 1   k = 2, 3                    n = 0      n = 1      ...  P - 1
#     m=0  | x00 x01 | x02 x03 | ...     k = 0, 1 | w00 w10 | w01 w11 | ...
#     m=1  | x10 x11 | x12 x13 | ...     k = 2, 3 | w20 w30 | w21 w31 | ...
#
# K / 2 is rounded up to a multiple of PAIRS (16 words are a line of a tile register) by zeros.
# vdpbf16ps and AMX read the same layout. Each product of a linear layer packs its own operands:
#
#     product                            k           x packed by           w packed by
#     y (R, O) = x (R, I) W^T            inputs      pack_rows(x)          pack_lines_transposed(W)
#     dL/dx (R, I) = dL/dy (R, O) W      outputs     pack_rows(dL/dy)      pack_lines(W)
#     dL/dW (O, I) += dL/dy^T x          rows        pack_columns(dL/dy)   pack_lines(x)
#
# In a matrix as it is in memory, a row's numbers follow each other. So pack_rows only rounds, and
# pack_lines puts numbers of two rows into each word; the other two transpose as well.


@kernel(FLOAT32, returns=UINT32)
def _rounded(x):
    """`packing._rounded` of one number, for what is left beside whole vectors."""
    bits = np.uint32(bits_of_float(x))
    odd = np.uint32(np.uint32(bits >> _16) & _ONE)
    return np.uint32(bits + np.uint32(_HALF + odd))


@kernel(FLOAT32, FLOAT32, returns=UINT32)
def _pair(lower, upper):
    """Two numbers in a word."""
    return np.uint32(np.uint32(_rounded(lower) >> _16) | np.uint32(_rounded(upper) & _UPPER))


@kernel(INT64, returns=INT64)
def pairs_of(depth):
    """Words for `depth` numbers."""
    return (depth + 2 * at.PAIRS - 1) // (2 * at.PAIRS) * at.PAIRS


@kernel(WORDS, INT64, FLOATS, INT64, INT64, INT64)
def pack_rows(out, pairs, x, x_stride, rows, depth):
    """out (rows, pairs words) = x (rows, depth)."""
    whole = depth // (2 * at.LANES) * at.LANES  # words in whole vectors
    for row in range(rows):
        own, line = skip(x, row * x_stride), as_halves(skip(out, row * pairs))
        pair_row(skip(out, row * pairs), own, whole)
        for k in range(2 * whole, depth):
            line[k] = np.uint16(np.uint32(_rounded(own[k]) >> _16))
        for k in range(depth, 2 * pairs):
            line[k] = 0


@kernel(WORDS, INT64, FLOATS, INT64, INT64, INT64, INT64)
def pack_pairs(out, out_stride, x, x_stride, rows, columns, pairs):
    """out (pairs, columns words): a line of two rows of x (rows, columns), then lines of zeros."""
    whole = columns // at.LANES * at.LANES
    for pair in range(rows // 2):
        lower, upper = skip(x, 2 * pair * x_stride), skip(x, (2 * pair + 1) * x_stride)
        line = skip(out, pair * out_stride)
        pair_lines(line, lower, upper, whole)
        for i in range(whole, columns):
            line[i] = _pair(lower[i], upper[i])
    if rows % 2:
        lower, line = skip(x, (rows - 1) * x_stride), skip(out, rows // 2 * out_stride)
        for i in range(columns):
            line[i] = np.uint32(_rounded(lower[i]) >> _16)
    for pair in range((rows + 1) // 2, pairs):
        line = skip(out, pair * out_stride)
        for i in range(columns):
            line[i] = _ZERO


@kernel(WORDS, FLOATS, INT64, INT64, INT64, INT64)
def pack_lines(panels, x, x_stride, rows, columns, pairs):
    """The panels of x (rows, columns), whose rows are the inner dimension; L divides columns."""
    for first in range(0, columns, at.PANEL):
        width = min(at.PANEL, columns - first)
        panel = skip(panels, first * pairs)
        pack_pairs(panel, width, skip(x, first), x_stride, rows, width, pairs)


# Block by block of L x L words, which are 2 L rows and L columns of x:
#
#     x (R, O)         o = 0  1  2                     out (O, pairs)
#           r = 0, 1 | word | word | ...   transposed  o = 0 | word of r = 0, 1 | r = 2, 3 | ...
#           r = 2, 3 | word | word | ...               o = 1 | word of r = 0, 1 | ...
@kernel(WORDS, INT64, FLOATS, INT64, INT64, INT64, WORDS)
def pack_columns(out, pairs, x, x_stride, rows, columns, block):
    """out (columns, pairs words) = x (rows, columns) transposed; whole blocks are written."""
    for column in range(0, columns, at.LANES):
        wide = min(at.LANES, columns - column)
        for row in range(0, 2 * pairs, 2 * at.LANES):
            here = max(0, min(2 * at.LANES, rows - row))
            source = skip(x, row * x_stride + column)
            to = skip(out, column * pairs + row // 2)
            if here == 2 * at.LANES and wide == at.LANES:
                pack_column_block(to, pairs, source, x_stride)
            else:
                pack_pairs(block, at.LANES, source, x_stride, here, wide, at.LANES)
                transpose_words(to, pairs, block, at.LANES)


@kernel(WORDS, FLOATS, INT64, INT64, INT64, INT64, WORDS)
def pack_lines_transposed(panels, x, x_stride, rows, depth, outputs, block):
    """The panels of x^T (depth, rows) from x (rows, depth), and zeros up to `outputs` columns."""
    # Block by block of L rows and 2 L numbers of each: rounded, these are L x L words.
    pairs = pairs_of(depth)
    for first in range(0, outputs, at.PANEL):
        width = min(at.PANEL, outputs - first)
        panel = skip(panels, first * pairs)
        for column in range(0, width, at.LANES):
            row = first + column
            count = max(0, min(at.LANES, rows - row))
            for pair in range(0, pairs, at.LANES):
                here = max(0, min(2 * at.LANES, depth - 2 * pair))
                source = skip(x, row * x_stride + 2 * pair)
                to = skip(panel, pair * width + column)
                if count == at.LANES and here == 2 * at.LANES:
                    pack_row_block(to, width, source, x_stride)
                    continue
                pack_rows(block, at.LANES, source, x_stride, count, here)
                for i in range(count * at.LANES, at.LANES * at.LANES):
                    block[i] = _ZERO
                transpose_words(to, width, block, at.LANES)


@kernel(FLOATS, INT64, WORDS, INT64, INT64, WORDS, INT64, INT64, INT64)
def multiply_pairs(y, y_stride, x, x_stride, rows, panels, outputs, pairs, adding):
    """y (rows, outputs) (+)= x w, for packed x and w; L divides `outputs`."""
    for first in range(0, outputs, at.PANEL):
        width = min(at.PANEL, outputs - first)
        for row in range(0, rows, at.ROWS):
            _tile(
                skip(y, row * y_stride + first), y_stride, skip(x, row * x_stride), x_stride,
                skip(panels, first * pairs), width, pairs, y, min(at.ROWS, rows - row),
                width // at.LANES, adding,
            )  # fmt: skip


@kernel(INT64, FLOATS, INT64, WORDS, INT64, INT64, WORDS, INT64, INT64, INT64, FLOATS)
def multiply_bfloat16(
    products, y, y_stride, x, x_stride, rows, panels, outputs, pairs, adding, edge
):
    """The same by the instructions that `products` names."""
    if products == at.TILES:
        multiply_tiles(y, y_stride, x, x_stride, rows, panels, outputs, pairs, adding, edge)
    else:
        multiply_pairs(y, y_stride, x, x_stride, rows, panels, outputs, pairs, adding)


# Buffers of a thread, fields of its workspace: LEFT and RIGHT for the packed x and w of the picture
# above, BLOCK for a block that is transposed, or for the last rows of a product.
@kernel(INT64, FLOATS, INT64, FLOATS, INT64, INT64, INTS, INT64, FLOATS, FLOATS)
def forward_bfloat16(products, y, y_stride, x, x_stride, rows, matrix, adding, left, block):
    """y (+)= x W^T."""
    outputs, inputs = matrix[at.OUTPUTS], matrix[at.INPUTS]
    pairs = pairs_of(inputs)
    pack_rows(as_words(left), pairs, x, x_stride, rows, inputs)
    multiply_bfloat16(
        products, y, y_stride, as_words(left), pairs, rows, words(matrix[at.FORWARD_PAIRS]),
        padded(outputs), pairs, adding, block,
    )  # fmt: skip


@kernel(
    INT64, FLOATS, INT64, FLOATS, INT64, FLOATS, INT64, INT64, INTS, FLOATS, FLOATS, FLOATS, FLOATS
)
def backward_bfloat16(
    products, dx, dx_stride, dy, dy_stride, x, x_stride, rows, matrix, dw, left, right, block
):
    """dx = dy W and dw += dy^T x."""
    outputs, inputs = matrix[at.OUTPUTS], matrix[at.INPUTS]
    a, b = as_words(left), as_words(right)
    pairs = pairs_of(outputs)
    pack_rows(a, pairs, dy, dy_stride, rows, outputs)
    w = words(matrix[at.BACKWARD_PAIRS])
    multiply_bfloat16(products, dx, dx_stride, a, pairs, rows, w, inputs, pairs, 0, block)
    pairs = pairs_of(rows)
    pack_columns(a, pairs, dy, dy_stride, rows, outputs, as_words(block))
    pack_lines(b, x, x_stride, rows, inputs, pairs)
    multiply_bfloat16(products, dw, inputs, a, pairs, outputs, b, inputs, pairs, 1, block)


@kernel(INTS, FLOATS)
def pack_matrix_bfloat16(matrix, block):
    """Pack a weight for the forward and the backward pass."""
    rows, outputs, inputs = floats(matrix[at.WEIGHT]), matrix[at.OUTPUTS], matrix[at.INPUTS]
    panels = words(matrix[at.FORWARD_PAIRS])
    pack_lines_transposed(panels, rows, inputs, outputs, inputs, padded(outputs), as_words(block))
    panels = words(matrix[at.BACKWARD_PAIRS])
    pack_lines(panels, rows, inputs, outputs, inputs, pairs_of(outputs))
