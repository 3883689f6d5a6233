"""The tile: the one kernel that all matrix products on vectors consist of, as LLVM code.

Letters: R rows of x in a tile, N vectors of `LANES` outputs in a tile, K the inner dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils

from mygpt.cpu.common.layout import (
    BYTES_AHEAD,
    KEEPS_X,
    LANES,
    ROWS,
    TALL_ROWS,
    TURN,
    VECTORS,
)
from mygpt.cpu.common.simd import (
    BYTES,
    FLOATS,
    INT64,
    WORDS,
    add_pairs,
    ask_for,
    fma,
    intrinsic,
    kernel,
    load_vector,
    spread,
)

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)
_BYTE_VECTOR = ir.VectorType(ir.IntType(8), LANES)
_WORD_VECTOR = ir.VectorType(_I32, LANES)

# A tile of a product y = x w. R rows by N vectors of sums stay in registers while k runs; each step
# loads N vectors of row k of w, and multiplies each of them by one number of each row of x:
#
#                        w (K, N * LANES), row k:  | vector 0 | vector 1 | ... | vector N-1 |
#                                                       |          |                |
#     x (R, K), column k:  x[0, k], in all lanes  ->  sum 0,0    sum 0,1   ...   sum 0,N-1
#                          x[1, k], in all lanes  ->  sum 1,0    sum 1,1   ...   sum 1,N-1
#                             ...                                  ...
#                          x[R-1, k]              ->  sum R-1,0             ...   sum R-1,N-1
#
# With AVX-512 these are 6 x 4 = 24 sums, 4 vectors of w and 1 of x: 29 of 32 registers. So a step
# does 24 multiply-adds for 4 vector loads and 6 scalar ones; and as no sum depends on another, a
# multiply-add need not wait for the one before it. Measured (docs/lab-notes.md): 107 to
# 112 GFLOP/s on one thread, where MKL's product of 1024-cubes reaches 80 to 98.
#
# With 16 registers (KEEPS_X) there are 3 x 4 = 12 sums, the numbers of x for all 3 rows, and one
# vector of w at a time, which all rows use before the next one is loaded. The other order needs 4
# vectors of w at once: LLVM then stores sums on the stack in every step, and the product has 53
# instead of 90 GFLOP/s on a Zen 3 core.
#
# A tall tile has more rows than the registers have space for, in groups that take turns:
#
#     k =   0 ... 63               64 ... 127            ...
#          | group 0 | group 1 |  | group 0 | group 1 |
#
# The first group reads 8 KB of w (TURN rows of one full tile) from memory, the others find them in
# the first-level cache; meanwhile each step asks for the row of w that is TURN rows later, so
# that memory is not idle. This is for weights that are read for a few rows only: products of 6
# rows take 1.2 times as long as of one on a Zen 3, with two tiles 1.45 times (docs/lab-notes.md).


def make_tile(
    *, quantized: bool = False, transposed: bool = False, pairs: bool = False, tall: bool = False
) -> Any:
    """The kernel y[r, n] (+)= sum over k of x[r, k] w[k, n], for R rows and N vectors of outputs.

    Called as tile(y, y_stride, x, x_stride, w, w_stride, depth, scales, rows, vectors,
    adding): pointers, with strides in elements; rows from 1 to ROWS; vectors from 1 to VECTORS,
    or, of a tall one, rows to TALL_ROWS of VECTORS; whether to add to y or to replace it. Every
    sum runs over k in order, one fused multiply-add a step, so a row's result is the same in a
    tile of any height.
    Quantized: w is int8, and output n's sum is multiplied by scales[n] before it is added.
    Transposed: x is stored as (depth, rows), x_stride from one k to the next.
    Pairs: x and w are words of two bfloat16 for neighbouring k, and depth counts words.
    """
    kind = _Kind(quantized, transposed, pairs)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")  # up to 24 loops: one copy of them is enough
        *operands, rows, vectors, adding = args
        done = builder.append_basic_block("done")
        # The sums are registers only if their number is known when compiling: so there is a loop
        # for each height and width, and a jump table (switch) on rows * VECTORS + vectors.
        choice = builder.switch(builder.add(builder.mul(rows, _I64(VECTORS)), vectors), done)
        sizes = [(r, n) for r in range(1, ROWS + 1) for n in range(1, VECTORS + 1)]
        if tall:
            sizes += [(r, VECTORS) for r in range(ROWS + 1, TALL_ROWS + 1)]
        for r, n in sizes:
            case = builder.append_basic_block(f"tile_{r}_{n}")
            choice.add_case(_I64(r * VECTORS + n), case)
            with builder.goto_block(case):
                _emit_tile(builder, operands, adding, r, n, kind)
                builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    @intrinsic
    def tiles(
        typingctx: Any, y: Any, y_stride: Any, x: Any, x_stride: Any, w: Any, w_stride: Any,
        depth: Any, scales: Any, rows: Any, vectors: Any, adding: Any,
    ) -> Any:  # fmt: skip
        return types.void(*arguments), codegen

    left = WORDS if pairs else FLOATS
    right = WORDS if pairs else BYTES if quantized else FLOATS
    arguments = (FLOATS, INT64, left, INT64, right, INT64, INT64, FLOATS, INT64, INT64, INT64)

    @kernel(*arguments)
    def tile(y, y_stride, x, x_stride, w, w_stride, depth, scales, rows, vectors, adding):
        tiles(y, y_stride, x, x_stride, w, w_stride, depth, scales, rows, vectors, adding)

    return tile


class _Kind(NamedTuple):
    """What a tile's operands are, see `make_tile`."""

    quantized: bool
    transposed: bool
    pairs: bool


def _emit_tile(
    builder: Any, operands: Any, adding: Any, rows: int, vectors: int, kind: _Kind
) -> None:
    """One tile of fixed height and width: sums in registers, a loop over k, one store."""
    depth, zero = operands[6], ir.Constant(_VECTOR, [0.0] * LANES)
    # As variables of the stack; LLVM's pass "mem2reg" turns each into a register.
    sums = {}
    for place in ((r, n) for r in range(rows) for n in range(vectors)):
        sums[place] = cgutils.alloca_once(builder, _VECTOR)
        builder.store(zero, sums[place])
    if rows <= ROWS:
        _emit_steps(builder, operands, _I64(0), depth, range(rows), sums, kind)
    else:
        count = -(-rows // ROWS)
        groups = [range(g * rows // count, (g + 1) * rows // count) for g in range(count)]
        with cgutils.for_range_slice(builder, _I64(0), depth, _I64(TURN), intp=_I64) as (k, _):
            end = builder.add(k, _I64(TURN))
            end = builder.select(builder.icmp_signed("<", end, depth), end, depth)
            for group in groups:
                _emit_steps(builder, operands, k, end, group, sums, kind, ahead=TURN)
    _emit_stores(builder, operands, adding, sums, kind)


def _emit_steps(
    builder: Any, operands: Any, first: Any, last: Any, rows: range, sums: Any, kind: _Kind,
    *, ahead: int = 0,
) -> None:  # fmt: skip
    """The steps k from `first` to `last` for some rows of a tile.

    Each asks for the weights of the step that is so many `ahead`, if not 0.
    """
    _, _, x, x_stride, w, w_stride, _, _ = operands
    vectors = 1 + max(n for _, n in sums)
    row_step, depth_step = (_I64(1), x_stride) if kind.transposed else (x_stride, _I64(1))
    x_rows = {r: builder.gep(x, [builder.mul(row_step, _I64(r))]) for r in rows}
    with cgutils.for_range(builder, last, start=first, intp=_I64) as loop:
        start = builder.mul(loop.index, w_stride)
        along = builder.mul(loop.index, depth_step)

        def x_value(r: int) -> Any:
            number = _I32 if kind.pairs else _F32
            return spread(builder, builder.load(builder.gep(x_rows[r], [along]), typ=number))

        def w_vector(n: int) -> Any:
            return _load_weights(builder, w, builder.add(start, _I64(n * LANES)), kind)

        def add(r: int, n: int, value: Any, weights: Any) -> None:
            before = builder.load(sums[r, n])
            if kind.pairs:
                total = add_pairs(builder, before, value, weights)
            else:
                # An explicit fma: "contract" alone would leave it to LLVM, loop by loop,
                # whether product and sum round once or twice.
                total = builder.call(fma(builder), [value, weights, before])
            builder.store(total, sums[r, n])

        if ahead:
            # Every group asks: measured to be faster than asking once (docs/lab-notes.md).
            later = builder.gep(w, [builder.add(start, builder.mul(w_stride, _I64(ahead)))])
            for offset in range(0, 4 * vectors * LANES, 64):
                ask_for(builder, later, offset)
        elif kind.quantized and BYTES_AHEAD:
            ask_for(builder, builder.gep(w, [start]), BYTES_AHEAD)
        if KEEPS_X:
            values = {r: x_value(r) for r in rows}
            for n in range(vectors):
                weights = w_vector(n)
                for r in rows:
                    add(r, n, values[r], weights)
        else:
            panel = [w_vector(n) for n in range(vectors)]
            for r in rows:
                value = x_value(r)
                for n in range(vectors):
                    add(r, n, value, panel[n])


def _emit_stores(builder: Any, operands: Any, adding: Any, sums: Any, kind: _Kind) -> None:
    """Replace a tile of y by the sums, or add them to it."""
    y, y_stride, _, _, _, _, _, scales = operands
    zero = ir.Constant(_VECTOR, [0.0] * LANES)
    is_adding = builder.icmp_signed("!=", adding, _I64(0))
    for (r, n), place in sums.items():
        offset = builder.add(builder.mul(y_stride, _I64(r)), _I64(n * LANES))
        # y is read even where it is replaced: `select` needs no branch. So it must be readable
        # for whole vectors; the value read, even a NaN, is then not used.
        held, total = load_vector(builder, y, offset, _VECTOR, 4), builder.load(place)
        before = builder.select(is_adding, held, zero)
        if kind.quantized:
            # sum over k of x[k] (q[k, n] scale[n]) = scale[n] * sum over k of x[k] q[k, n]
            scale = load_vector(builder, scales, _I64(n * LANES), _VECTOR, 4)
            total = builder.call(fma(builder), [total, scale, before])
        else:
            total = builder.fadd(total, before)
        at = builder.bitcast(builder.gep(y, [offset]), _VECTOR.as_pointer())
        builder.store(total, at, align=4)


def _load_weights(builder: Any, w: Any, offset: Any, kind: _Kind) -> Any:
    """A vector of one line of w."""
    if kind.pairs:
        return load_vector(builder, w, offset, _WORD_VECTOR, 4)
    if kind.quantized:
        # int8 is widened to float32 in registers: memory delivers a quarter of the bytes.
        return builder.sitofp(load_vector(builder, w, offset, _BYTE_VECTOR, 1), _VECTOR)
    return load_vector(builder, w, offset, _VECTOR, 4)
