"""Matrix products of bfloat16 on the tile registers of Intel's AMX.

The second file that needs some LLVM: the tile below is for AMX what `make_tile` is for vectors.
Letters: M rows of x, N outputs, K inner dimension.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from mygpt.cpu.common import layout as at
from mygpt.cpu.common.layout import LINES
from mygpt.cpu.common.simd import FLOATS, INT64, WORDS, intrinsic, kernel, skip

# A tile register has LINES = 16 lines of 64 bytes: 16 x 16 float32, or 16 x 32 bfloat16.
# Registers: 4 of sums (2 x 2), 2 of x, 2 of w: all eight.
_SUMS, _X, _W = 0, 4, 6

# The instruction tdpbf16ps S, X, W adds a product of 16 x 32 by 32 x 16 numbers to S. A word is a
# pair of bfloat16 for k and k + 1:
#
#                                 W (16 pairs, 16 outputs), line p:
#                                     | w[2p, n], w[2p+1, n] |  for n = 0 ... 15
#                                                |
#     X (16 rows, 16 pairs), line m:             v
#     | x[m, 2p], x[m, 2p+1] | p = 0..15  ->  S[m, n] += sum over p of x[m, 2p]   w[2p, n]
#                                                                    + x[m, 2p+1] w[2p+1, n]
#
# Two registers of x and two of w give four sums, so each register that is loaded is used twice:
#
#                 W 0    W 1
#         X 0     S 0    S 1
#         X 1     S 2    S 3
#
# The four products take 64 cycles, in which the loads (4 KiB from the first-level cache) are done.
# Measured on one thread of an Intel Xeon: 1,150 to 1,840 GFLOP/s, where the tile of float32 reaches
# 180 to 220 (docs/lab-notes.md).


def _emit(builder: Any, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
    builder.call(function, arguments)


def _register(number: int) -> Any:
    return ir.Constant(ir.IntType(8), number)


def _bytes(builder: Any, pointer: Any, *offsets: Any) -> Any:
    """The address `offsets` elements after a pointer, as AMX takes it."""
    for offset in offsets:
        pointer = builder.gep(pointer, [offset])
    return builder.bitcast(pointer, ir.IntType(8).as_pointer())


def _emit_sums(builder: Any, operands: Any, adding: Any, high: int, wide: int) -> None:
    """high x wide registers of sums: loaded or zeroed, summed over all of K, stored."""
    y, y_stride, x, x_stride, w, w_stride, steps = operands
    size = ir.IntType(64)
    lines, words = size(LINES), size(4)
    y_bytes, x_bytes, w_bytes = (builder.mul(s, words) for s in (y_stride, x_stride, w_stride))
    places = {}
    for m in range(high):
        for n in range(wide):
            place = _bytes(builder, y, builder.mul(y_stride, size(LINES * m)), size(LINES * n))
            places[_SUMS + 2 * m + n] = place
    with builder.if_else(builder.icmp_signed("!=", adding, size(0))) as (then, otherwise):
        with then:
            for number, place in places.items():
                _emit(builder, "tileloadd64", _register(number), place, y_bytes)
        with otherwise:
            for number in places:
                _emit(builder, "tilezero", _register(number))
    with cgutils.for_range(builder, steps, intp=size) as loop:
        pair = builder.mul(loop.index, lines)  # the first of this step's 16 pairs
        for m in range(high):
            place = _bytes(builder, x, builder.mul(x_stride, size(LINES * m)), pair)
            _emit(builder, "tileloadd64", _register(_X + m), place, x_bytes)
        for n in range(wide):
            place = _bytes(builder, w, builder.mul(w_stride, pair), size(LINES * n))
            _emit(builder, "tileloadd64", _register(_W + n), place, w_bytes)
        for m in range(high):
            for n in range(wide):
                numbers = _SUMS + 2 * m + n, _X + m, _W + n
                _emit(builder, "tdpbf16ps", *map(_register, numbers))
    for number, place in places.items():
        _emit(builder, "tilestored64", _register(number), place, y_bytes)


_ARGUMENTS = (FLOATS, INT64, WORDS, INT64, WORDS, INT64, INT64, INT64, INT64, INT64)


@intrinsic
def _sums(
    typingctx: Any, y: Any, y_stride: Any, x: Any, x_stride: Any, w: Any, w_stride: Any,
    steps: Any, high: Any, wide: Any, adding: Any,
) -> Any:  # fmt: skip
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        *operands, high, wide, adding = args
        if at.HAS_TILES:
            done = builder.append_basic_block("done")
            size = ir.IntType(64)
            choice = builder.switch(builder.add(builder.mul(high, size(2)), wide), done)
            for m in (1, 2):
                for n in (1, 2):
                    case = builder.append_basic_block(f"sums_{m}_{n}")
                    choice.add_case(size(2 * m + n), case)
                    with builder.goto_block(case):
                        _emit_sums(builder, operands, adding, m, n)
                        builder.branch(done)
            builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(*_ARGUMENTS), codegen


@kernel(*_ARGUMENTS)
def _tile(y, y_stride, x, x_stride, w, w_stride, steps, high, wide, adding):
    """y (16 high, 16 wide) (+)= x w over 16 `steps` pairs; nothing if `high` is 0."""
    _sums(y, y_stride, x, x_stride, w, w_stride, steps, high, wide, adding)


@kernel(FLOATS, INT64, WORDS, INT64, INT64, WORDS, INT64, INT64, INT64, INT64, FLOATS)
def _rest(y, y_stride, x, x_stride, rows, w, width, pairs, wide, adding, edge):
    """The last rows, fewer than 16, by way of a buffer: registers are stored with all lines."""
    columns = wide * LINES
    if adding:
        for row in range(rows):
            for i in range(columns):
                edge[row * 2 * LINES + i] = y[row * y_stride + i]
    _tile(edge, 2 * LINES, x, x_stride, w, width, pairs // LINES, 1, wide, adding)
    for row in range(rows):
        for i in range(columns):
            y[row * y_stride + i] = edge[row * 2 * LINES + i]


@kernel(FLOATS, INT64, WORDS, INT64, INT64, WORDS, INT64, INT64, INT64, FLOATS)
def _strip(y, y_stride, x, x_stride, rows, panels, outputs, pairs, adding, edge):
    """At most 32 rows of a product: all outputs of these panels."""
    high, rest = rows // LINES, rows % LINES
    last = high * LINES
    for first in range(0, outputs, at.PANEL):
        width = min(at.PANEL, outputs - first)
        for column in range(0, width, 2 * LINES):
            w = skip(panels, first * pairs + column)
            wide = min(2, (width - column) // LINES)
            out = skip(y, first + column)
            _tile(out, y_stride, x, x_stride, w, width, pairs // LINES, high, wide, adding)
            if rest:
                _rest(
                    skip(out, last * y_stride), y_stride, skip(x, last * x_stride), x_stride, rest,
                    w, width, pairs, wide, adding, edge,
                )  # fmt: skip


# The same product as `multiply_pairs`, whose arguments it has. `edge` is a buffer of 16 x 32.
# x has lines for a multiple of 16 rows; what the added ones contain is not used.
#
# Rows are in the outer loop, so that y is written line after line: at this speed the time is that
# of writing y to the memory, where it does not stay in a cache. The panels that all rows pass over
# are at most so many words that they stay in the second-level cache.
_GROUP_WORDS = 2**17  # 512 KiB


@kernel(FLOATS, INT64, WORDS, INT64, INT64, WORDS, INT64, INT64, INT64, FLOATS)
def multiply_tiles(y, y_stride, x, x_stride, rows, panels, outputs, pairs, adding, edge):
    """y (rows, outputs) (+)= x w; LINES divides `outputs` and `pairs`."""
    group = max(1, _GROUP_WORDS // (pairs * at.PANEL)) * at.PANEL
    for first in range(0, outputs, group):
        wide, w = min(group, outputs - first), skip(panels, first * pairs)
        for row in range(0, rows, 2 * LINES):
            out, left = skip(y, row * y_stride + first), skip(x, row * x_stride)
            high = min(2 * LINES, rows - row)
            _strip(out, y_stride, left, x_stride, high, w, wide, pairs, adding, edge)


@intrinsic
def begin_tiles(typingctx: Any, shapes: Any) -> Any:
    """Give this thread's tile registers their shapes (64 bytes, `processor.tile_shapes`)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if at.HAS_TILES:
            _emit(builder, "ldtilecfg", _bytes(builder, args[0]))
        return context.get_dummy_value()

    return types.void(WORDS), codegen


@intrinsic
def end_tiles(typingctx: Any) -> Any:
    """Release the tile registers: the system need not save them any more."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if at.HAS_TILES:
            _emit(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen
