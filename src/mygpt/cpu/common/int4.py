"""Products with weights of 4 bits (see `int4_format`).

A weight is read from memory as 4 bits and unpacked in registers: as a bfloat16, as the inputs are,
two of each a word, which vdpbf16ps multiplies; or, on processors without it, as an integer of 16
bits. A group's inputs are then integers of 16 bits too, times a scale, and their products are added
exactly. Sums are of a group first, then of all groups in order, in float32: the same for one row
and for many.
Letters: C inputs, G groups, N outputs, R rows, W width of a panel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from mygpt.cpu.common.arithmetic import padded
from mygpt.cpu.common.int4_format import FACTORS, GROUP, INPUT_WORDS, LINES, VALUES
from mygpt.cpu.common.layout import BYTES_AHEAD, HAS_PAIRS, HAS_SHUFFLE, LANES, PANEL, VECTORS
from mygpt.cpu.common.simd import (
    FLOAT32,
    FLOATS,
    INT64,
    UINT32,
    WORDS,
    add_pairs,
    as_halves,
    ask_for,
    bits_of_float,
    fma,
    intrinsic,
    kernel,
    load_vector,
    skip,
    spread,
)

# Rows of a tile. Of pairs, each output has two sums, of the group and of all groups, in registers.
TILE_ROWS = 3 if HAS_PAIRS else 4

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_HALVES = ir.VectorType(_I16, 2 * LANES)
_WORDS = ir.VectorType(_I32, LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)


def _constant(kind: Any, value: Any, count: int) -> Any:
    return ir.Constant(ir.VectorType(kind, count), [value] * count)


def _looked_up_pair(builder: Any, word: Any, pair: int) -> Any:
    """The pair of bfloat16 for weights number 2 `pair` and the next, in each lane."""
    halves = builder.bitcast(word, _HALVES)
    if pair:
        halves = builder.lshr(halves, _constant(_I16, 4 * pair, 2 * LANES))
    bits = (VALUES.view(np.uint32) >> 16).tolist()
    table = ir.Constant(_HALVES, (bits * 2)[: 2 * LANES])
    kind = ir.FunctionType(_HALVES, [_HALVES, _HALVES])
    name = "llvm.x86.avx512.permvar.hi.512"
    look_up = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.bitcast(builder.call(look_up, [table, halves]), _WORDS)


def _integers_of_a_word(builder: Any, word: Any) -> list[Any]:
    """The four pairs of `VALUES` for the 8 weights of each lane, as integers of 16 bits."""
    if not HAS_SHUFFLE:
        pairs = [(4 * pair, 4 * pair + 16) for pair in range(4)]  # shifts of a pair's weights
        return [
            builder.or_(
                builder.and_(_computed(builder, word, first), _constant(_I32, 0xFFFF, LANES)),
                builder.shl(_computed(builder, word, second), _constant(_I32, 16, LANES)),
            )
            for first, second in pairs
        ]
    found = []
    eight = _constant(_I16, 8, 2 * LANES)
    for pair in range(4):
        # Bytes from the lowest on: of the pairs 0 and 2, or 1 and 3, the first weight of one, that
        # of the other, then the second weights.
        four_bits = builder.lshr(word, _constant(_I32, 4, LANES)) if pair % 2 else word
        halves = builder.bitcast(_looked_up_bytes(builder, four_bits), _HALVES)
        if pair < 2:
            halves = builder.shl(halves, eight)
        found.append(builder.bitcast(builder.ashr(halves, eight), _WORDS))
    return found


def _add_integer_pairs(builder: Any, total: Any, x: Any, w: Any) -> Any:
    """total + x[0] w[0] + x[1] w[1] in each lane of 32 bits, for words of two integers of 16."""
    if HAS_SHUFFLE:  # vpmaddwd
        name = "llvm.x86.avx512.pmaddw.d.512" if LANES == 16 else "llvm.x86.avx2.pmadd.wd"
        kind = ir.FunctionType(_WORDS, [_HALVES, _HALVES])
        pair_sum = cgutils.get_or_insert_function(builder.module, kind, name)
        halves = builder.bitcast(x, _HALVES), builder.bitcast(w, _HALVES)
        return builder.add(total, builder.call(pair_sum, halves))
    sixteen = _constant(_I32, 16, LANES)
    for shift in (True, False):
        factors = [builder.shl(word, sixteen) if shift else word for word in (x, w)]
        factors = [builder.ashr(word, sixteen) for word in factors]
        total = builder.add(total, builder.mul(*factors))
    return total


def _looked_up_bytes(builder: Any, word: Any) -> Any:
    """For each byte, the number of `VALUES` for its lower 4 bits, as a signed byte."""
    kind = ir.VectorType(ir.IntType(8), 4 * LANES)
    fours = builder.and_(word, _constant(_I32, 0x0F0F0F0F, LANES))
    table = ir.Constant(kind, VALUES.astype(np.int8).tolist() * (LANES // 4))
    name = "llvm.x86.avx512.pshuf.b.512" if LANES == 16 else "llvm.x86.avx2.pshuf.b"
    function = ir.FunctionType(kind, [kind, kind])
    look_up = cgutils.get_or_insert_function(builder.module, function, name)
    return builder.bitcast(builder.call(look_up, [table, builder.bitcast(fours, kind)]), _WORDS)


def _computed(builder: Any, word: Any, shift: int) -> Any:
    """The number of `VALUES` for the 4 bits from `shift` on, an integer: its formula, rounded."""
    four = builder.and_(
        builder.lshr(word, _constant(_I32, shift, LANES)), _constant(_I32, 15, LANES)
    )
    flt = ir.FloatType()
    cubic, linear = (_constant(flt, float(np.float32(factor)), LANES) for factor in FACTORS)
    u = builder.fadd(builder.sitofp(four, _FLOATS), _constant(flt, -7.5, LANES))
    factor = builder.call(fma(builder), [builder.fmul(u, u), cubic, linear])
    kind = ir.FunctionType(_FLOATS, [_FLOATS])
    rint = cgutils.get_or_insert_function(builder.module, kind, f"llvm.rint.v{LANES}f32")
    return builder.fptosi(builder.call(rint, [builder.fmul(u, factor)]), _WORDS)


def _emit(builder: Any, operands: Any, adding: Any, rows: int, vectors: int) -> None:
    """One tile of fixed height and width."""
    y, y_stride, x, x_stride, w, width, groups = operands
    zero = ir.Constant(_FLOATS, [0.0] * LANES)
    places = [(r, n) for r in range(rows) for n in range(vectors)]
    totals = {place: cgutils.alloca_once(builder, _FLOATS) for place in places}
    for place in places:
        builder.store(zero, totals[place])
    stride = builder.add(
        builder.mul(width, _I64(LINES)), builder.lshr(width, _I64(1))
    )  # words of a group
    add_group = _add_pairs_of_group if HAS_PAIRS else _add_integers_of_group
    with cgutils.for_range(builder, groups, intp=_I64) as loop:
        start, inputs = builder.mul(loop.index, stride), builder.mul(loop.index, _I64(INPUT_WORDS))
        rows_at = [
            builder.gep(x, [builder.add(builder.mul(x_stride, _I64(r)), inputs)])
            for r in range(rows)
        ]
        group = builder.gep(w, [start])
        group_bytes = 4 * LINES * vectors * LANES + 2 * vectors * LANES  # weights and scales
        for offset in range(0, group_bytes if BYTES_AHEAD else 0, 64):
            ask_for(builder, group, BYTES_AHEAD + offset)
        sums = add_group(builder, rows_at, group, width, vectors)
        scales_at = builder.add(start, builder.mul(width, _I64(LINES)))
        halves = builder.bitcast(builder.gep(w, [scales_at]), _I16.as_pointer())
        for n in range(vectors):
            kind = ir.VectorType(_I16, LANES)
            scale = load_vector(builder, halves, _I64(n * LANES), kind, 2)
            scale = builder.shl(builder.zext(scale, _WORDS), _constant(_I32, 16, LANES))
            scale = builder.bitcast(scale, _FLOATS)
            for r in range(rows):
                total = builder.load(totals[r, n])
                builder.store(builder.call(fma(builder), [sums[r, n], scale, total]), totals[r, n])
    is_adding = builder.icmp_signed("!=", adding, _I64(0))
    for r, n in places:
        offset = builder.add(builder.mul(y_stride, _I64(r)), _I64(n * LANES))
        before = builder.select(is_adding, load_vector(builder, y, offset, _FLOATS, 4), zero)
        total = builder.fadd(builder.load(totals[r, n]), before)
        out = builder.bitcast(builder.gep(y, [offset]), _FLOATS.as_pointer())
        builder.store(total, out, align=4)


def _add_pairs_of_group(builder: Any, x: Any, w: Any, width: Any, vectors: int) -> Any:
    """The sums of one group by row and vector, of pairs of bfloat16."""
    zero = ir.Constant(_FLOATS, [0.0] * LANES)
    sums = {(r, n): zero for r in range(len(x)) for n in range(vectors)}
    for line in range(LINES):
        here = builder.mul(width, _I64(line))
        read = [
            load_vector(builder, w, builder.add(here, _I64(n * LANES)), _WORDS, 4)
            for n in range(vectors)
        ]
        for pair in range(4):
            weights = [_looked_up_pair(builder, word, pair) for word in read]
            for r, row in enumerate(x):
                value = builder.load(builder.gep(row, [_I64(4 * line + pair)]), typ=_I32)
                value = spread(builder, value)
                for n in range(vectors):
                    sums[r, n] = add_pairs(builder, sums[r, n], value, weights[n])
    return sums


# With integers q of x and w, and the scale s of this group's inputs x:
#
#     sum over k of x[k] w[k] = s * sum over k of q_x[k] q_w[k]
#
# |q_x| <= 32,767 and |q_w| <= 127, so a sum of 32 products is below 2**31.
def _add_integers_of_group(builder: Any, x: Any, w: Any, width: Any, vectors: int) -> Any:
    """The same from integers: with several rows one vector of outputs after another."""
    places = [(line, n) for n in range(vectors) for line in range(LINES)]
    if len(x) == 1:
        places.sort()  # the sums of all vectors fit into the registers: memory is read in order
    sums = {(r, n): _constant(_I32, 0, LANES) for r in range(len(x)) for n in range(vectors)}
    for line, n in places:
        here = builder.add(builder.mul(width, _I64(line)), _I64(n * LANES))
        word = load_vector(builder, w, here, _WORDS, 4)
        for pair, weights in enumerate(_integers_of_a_word(builder, word)):
            for r, row in enumerate(x):
                value = builder.load(builder.gep(row, [_I64(4 * line + pair)]), typ=_I32)
                sums[r, n] = _add_integer_pairs(
                    builder, sums[r, n], spread(builder, value), weights
                )
    for r, row in enumerate(x):
        scale = builder.load(builder.gep(row, [_I64(GROUP // 2)]), typ=_I32)
        scale = builder.bitcast(spread(builder, scale), _FLOATS)
        for n in range(vectors):
            sums[r, n] = builder.fmul(builder.sitofp(sums[r, n], _FLOATS), scale)
    return sums


@intrinsic
def _tiles(
    typingctx: Any, y: Any, y_stride: Any, x: Any, x_stride: Any, w: Any, width: Any, groups: Any,
    rows: Any, vectors: Any, adding: Any,
) -> Any:  # fmt: skip
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        *operands, rows, vectors, adding = args
        done = builder.append_basic_block("done")
        choice = builder.switch(builder.add(builder.mul(rows, _I64(VECTORS)), vectors), done)
        for r in range(1, TILE_ROWS + 1):
            for n in range(1, VECTORS + 1):
                case = builder.append_basic_block(f"tile_{r}_{n}")
                choice.add_case(_I64(r * VECTORS + n), case)
                with builder.goto_block(case):
                    _emit(builder, operands, adding, r, n)
                    builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(*_ARGUMENTS), codegen


_ARGUMENTS = (FLOATS, INT64, WORDS, INT64, WORDS, INT64, INT64, INT64, INT64, INT64)


@kernel(*_ARGUMENTS)
def _tile(y, y_stride, x, x_stride, w, width, groups, rows, vectors, adding):
    """y (rows, vectors * LANES) (+)= x times the panel at w, of `width` outputs."""
    _tiles(y, y_stride, x, x_stride, w, width, groups, rows, vectors, adding)


_HALF, _ONE, _16 = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
# The largest input of a group is 32,767 steps. A group with a smaller step than the least counts as
# zeros: the reciprocal of its step may not be a float32.
_PER_STEP, _ONE_FLOAT, _LEAST_SCALE = np.float32(1 / 32767), np.float32(1), np.float32(1e-38)


@kernel(FLOAT32, returns=UINT32)
def _rounded(number):
    """The bits of a number rounded to bfloat16, of two equally near ones to the even one."""
    bits = np.uint32(bits_of_float(number))
    odd = np.uint32(np.uint32(bits >> _16) & _ONE)
    return np.uint32(np.uint32(bits + np.uint32(_HALF + odd)) >> _16)


@kernel(WORDS, FLOATS, INT64)
def _pack_integers(out, x, count):
    """out (INPUT_WORDS,) = a group's `count` inputs as integers of 16 bits, zeros, their scale."""
    largest, total = np.float32(0), np.float32(0)
    for i in range(count):
        largest = max(largest, abs(x[i]))
        total += x[i]
    scale = largest * _PER_STEP
    factor = _ONE_FLOAT / scale if scale > _LEAST_SCALE else np.float32(0)
    halves = as_halves(out)
    for i in range(count):
        halves[i] = np.uint16(np.int32(np.rint(x[i] * factor)))
    for i in range(count, GROUP):
        halves[i] = np.uint16(0)
    # Where an input is not finite, the scale is NaN, and so are all sums with it.
    out[GROUP // 2] = np.uint32(bits_of_float(scale + (total - total)))


@kernel(WORDS, INT64, FLOATS, INT64, INT64, INT64)
def pack_inputs(out, out_stride, x, x_stride, rows, depth):
    """out (rows, words of whole groups) = x (rows, depth) as the products read it, then zeros."""
    for row in range(rows):
        own, line = skip(x, row * x_stride), skip(out, row * out_stride)
        if HAS_PAIRS:
            for i in range(depth // 2):
                upper = np.uint32(_rounded(own[2 * i + 1]) << _16)
                line[i] = np.uint32(_rounded(own[2 * i]) | upper)
            for i in range(depth // 2, out_stride):
                line[i] = np.uint32(0)
            if depth % 2:
                line[depth // 2] = _rounded(own[depth - 1])
        else:
            for first in range(0, depth, GROUP):
                _pack_integers(
                    skip(line, first // GROUP * INPUT_WORDS), skip(own, first),
                    min(GROUP, depth - first),
                )  # fmt: skip


@kernel(FLOATS, INT64, WORDS, INT64, INT64, WORDS, INT64, INT64, INT64)
def multiply_int4(y, y_stride, x, x_stride, rows, panels, outputs, groups, adding):
    """y (rows, N padded to whole vectors) = x w, or y += x w; x as `pack_inputs` leaves it."""
    end = padded(outputs)
    for first in range(0, end, PANEL):
        width = min(PANEL, end - first)
        w = skip(panels, groups * (LINES * first + first // 2))
        for row in range(0, rows, TILE_ROWS):
            _tile(
                skip(y, row * y_stride + first), y_stride, skip(x, row * x_stride), x_stride, w,
                width, groups, min(TILE_ROWS, rows - row), width // LANES, adding,
            )  # fmt: skip
