"""Rounding to bfloat16 and packing, block by block, in vectors that stay in registers.

A bfloat16 is the upper half of a float32: sign, 8 bits of exponent, 7 of mantissa. A word holds
two of them, the first in its lower half.
Letters: L = LANES.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from mygpt.cpu.common.layout import LANES
from mygpt.cpu.common.simd import FLOATS, INT64, WORDS, intrinsic, kernel, store_transposed

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_WORDS, _HALVES = ir.VectorType(_I32, LANES), ir.VectorType(ir.IntType(16), LANES)


def _constant(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * LANES)


def _rounded(builder: Any, x: Any, offset: Any) -> Any:
    """L numbers, each as a word with the nearest bfloat16 in its upper half (ties to even)."""
    # Half a unit of the upper half is added, less one bit where the upper half is even, and what
    # carries into it rounds up. An infinity stays; a NaN does too, unless all of its bits are 1,
    # and no operation makes such a one.
    place = builder.bitcast(builder.gep(x, [offset]), _WORDS.as_pointer())
    bits = builder.load(place, align=4, typ=_WORDS)
    odd = builder.and_(builder.lshr(bits, _constant(16)), _constant(1))
    return builder.add(bits, builder.add(odd, _constant(0x7FFF)))


def _pair(builder: Any, lower: Any, upper: Any) -> Any:
    """Words of two vectors: number i of both in word i."""
    upper = builder.and_(upper, _constant(-(1 << 16)))
    return builder.or_(builder.lshr(lower, _constant(16)), upper)


def _row_pairs(builder: Any, first: Any, second: Any) -> Any:
    """Words of 2 L numbers that follow each other: numbers 2 i and 2 i + 1 in word i."""
    halves = [builder.trunc(builder.lshr(bits, _constant(16)), _HALVES) for bits in (first, second)]
    lanes = ir.Constant(ir.VectorType(_I32, 2 * LANES), list(range(2 * LANES)))
    return builder.bitcast(builder.shuffle_vector(*halves, lanes), _WORDS)


_BLOCK = (WORDS, INT64, FLOATS, INT64)
_LINE = (WORDS, FLOATS, FLOATS, INT64)
_ROW = (WORDS, FLOATS, INT64)


#     x      | a0 a1 a2 ...          row 0, 1: words | a0 b0 | a1 b1 | ...     out | a0 b0 | c0 d0 |
#            | b0 b1 b2 ...   -->                                       -->        | a1 b1 | c1 d1 |
#            | c0 c1 c2 ...          row 2, 3: words | c0 d0 | c1 d1 | ...
#            | d0 d1 d2 ...                                             transposed
@intrinsic
def _column_block(typingctx: Any, out: Any, out_stride: Any, x: Any, x_stride: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, out_stride, x, x_stride = args
        lines = []
        for i in range(LANES):
            pair = [
                _rounded(builder, x, builder.mul(x_stride, _I64(row))) for row in (2 * i, 2 * i + 1)
            ]
            lines.append(_pair(builder, *pair))
        store_transposed(builder, out, out_stride, lines)
        return context.get_dummy_value()

    return types.void(*_BLOCK), codegen


#     x      | a0 a1 a2 a3 ...       words | a0 a1 | a2 a3 | ...     out | a0 a1 | b0 b1 | ...
#            | b0 b1 b2 b3 ...  -->        | b0 b1 | b2 b3 | ...  -->    | a2 a3 | b2 b3 | ...
@intrinsic
def _row_block(typingctx: Any, out: Any, out_stride: Any, x: Any, x_stride: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, out_stride, x, x_stride = args
        lines = []
        for i in range(LANES):
            start = builder.mul(x_stride, _I64(i))
            parts = [
                _rounded(builder, x, builder.add(start, _I64(skipped))) for skipped in (0, LANES)
            ]
            lines.append(_row_pairs(builder, *parts))
        store_transposed(builder, out, out_stride, lines)
        return context.get_dummy_value()

    return types.void(*_BLOCK), codegen


def _store(builder: Any, value: Any, out: Any, offset: Any) -> None:
    place = builder.bitcast(builder.gep(out, [offset]), _WORDS.as_pointer())
    builder.store(value, place, align=4)


@intrinsic
def _pair_vectors(typingctx: Any, out: Any, lower: Any, upper: Any, start: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, lower, upper, start = args
        pair = [_rounded(builder, x, start) for x in (lower, upper)]
        _store(builder, _pair(builder, *pair), out, start)
        return context.get_dummy_value()

    return types.void(*_LINE), codegen


@intrinsic
def _row_vectors(typingctx: Any, out: Any, x: Any, start: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, x, start = args
        first = builder.mul(start, _I64(2))
        parts = [_rounded(builder, x, builder.add(first, _I64(skipped))) for skipped in (0, LANES)]
        _store(builder, _row_pairs(builder, *parts), out, start)
        return context.get_dummy_value()

    return types.void(*_ROW), codegen


@kernel(*_BLOCK)
def pack_column_block(out, out_stride, x, x_stride):
    """out (L, L words) = x (2 L, L) transposed: word i of line c has rows 2 i and 2 i + 1."""
    _column_block(out, out_stride, x, x_stride)


@kernel(*_BLOCK)
def pack_row_block(out, out_stride, x, x_stride):
    """out (L, L words): word r of line i has numbers 2 i and 2 i + 1 of row r of x (L, 2 L)."""
    _row_block(out, out_stride, x, x_stride)


@kernel(WORDS, FLOATS, FLOATS, INT64)
def pair_lines(out, lower, upper, columns):
    """out[i] = the word of lower[i] and upper[i]; L divides `columns`."""
    for start in range(0, columns, LANES):
        _pair_vectors(out, lower, upper, start)


@kernel(WORDS, FLOATS, INT64)
def pair_row(out, x, words):
    """out[i] = the word of x[2 i] and x[2 i + 1]; L divides `words`."""
    for start in range(0, words, LANES):
        _row_vectors(out, x, start)
