"""Softmax and its gradient down the columns of a matrix, in vectors that stay in registers.

Written in LLVM code, as the tile in `simd` is: Numba's loops over 32 columns are too short for what
LLVM puts before them (whether the arrays overlap), and are compiled for half a register's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from mygpt.cpu.common import arithmetic
from mygpt.cpu.common.layout import LANES
from mygpt.cpu.common.simd import FLOAT32, FLOATS, INT64, intrinsic, kernel
from mygpt.cpu.train.layout import ACROSS

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR, _WORD_VECTOR = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_VECTORS = ACROSS // LANES  # vectors of a line
_UNROLLED = 4  # lines of an iteration; their sum or maximum is formed before the column's changes

# A matrix x (lines, ACROSS), line after line. `largest` and `total` are vectors for all columns:
#
#                 vector 0       vector 1
#     line 0    | x x ... x    | x x ... x    |
#     line 1    | x x ... x    | x x ... x    |      one iteration: four lines, from each of which
#     line 2    | x x ... x    | x x ... x    |      a vector is loaded at a time
#     line 3    | x x ... x    | x x ... x    |
#        v            v              v
#     state     largest 0, total 0 ...  in registers while the loop runs over all lines
Vector = Any  # LLVM's value of a vector


class _Code:
    """Emits operations on vectors of float32."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        name = f"llvm.fma.v{LANES}f32"
        self._fma = cgutils.get_or_insert_function(builder.module, kind, name)

    def number(self, value: Any) -> Vector:
        return ir.Constant(_VECTOR, [float(value)] * LANES)

    def spread(self, value: Any) -> Vector:
        """One number in all lanes."""
        undefined = ir.Constant(_VECTOR, ir.Undefined)
        one = self.builder.insert_element(undefined, value, _I32(0))
        lanes = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
        return self.builder.shuffle_vector(one, undefined, lanes)

    def fma(self, a: Vector, b: Vector, c: Vector) -> Vector:
        return self.builder.call(self._fma, [a, b, c])

    def largest(self, a: Vector, b: Vector) -> Vector:
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def load(self, pointer: Any) -> Vector:
        vector = self.builder.bitcast(pointer, _VECTOR.as_pointer())
        return self.builder.load(vector, align=4, typ=_VECTOR)

    def store(self, value: Vector, pointer: Any) -> None:
        self.builder.store(value, self.builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)

    def exp(self, x: Vector) -> Vector:
        """`arithmetic.exp` on a vector, and 0 below its range."""
        builder, at = self.builder, arithmetic
        lowest, highest = self.number(at._LOWEST), self.number(at._HIGHEST)
        inside = builder.fcmp_ordered(">", x, lowest)
        x = builder.select(builder.fcmp_ordered("<", x, highest), x, highest)
        shifted = self.fma(x, self.number(at._LOG2E), self.number(at._SHIFT))
        n = builder.fsub(shifted, self.number(at._SHIFT))
        r = self.fma(n, self.number(-at._LN2_HIGH), x)
        r = self.fma(n, self.number(-at._LN2_LOW), r)
        power = self.number(at._C6)
        for coefficient in (at._C5, at._C4, at._C3, at._C2, 1.0, 1.0):
            power = self.fma(r, power, self.number(coefficient))
        bits = builder.bitcast(shifted, _WORD_VECTOR)
        bits = builder.shl(bits, ir.Constant(_WORD_VECTOR, [23] * LANES))
        bits = builder.add(bits, ir.Constant(_WORD_VECTOR, [127 << 23] * LANES))
        power = builder.fmul(power, builder.bitcast(bits, _VECTOR))
        return builder.select(inside, power, self.number(0.0))

    def state(self, first: Vector) -> Any:
        """A variable for a vector; LLVM's pass "mem2reg" makes a register of it."""
        place = cgutils.alloca_once(self.builder, _VECTOR)
        self.builder.store(first, place)
        return place

    @contextmanager
    def lines(self, matrices: Sequence[Any], lines: Any) -> Iterator[Callable[[int], list[Any]]]:
        """A loop over `lines`, _UNROLLED at a time; what it yields gives the places of line j."""
        builder = self.builder
        count = builder.sdiv(lines, _I64(_UNROLLED))
        with cgutils.for_range(builder, count, intp=_I64) as loop:
            start = builder.mul(loop.index, _I64(_UNROLLED * ACROSS))
            yield lambda j: [
                builder.gep(matrix, [builder.add(start, _I64(j * ACROSS))]) for matrix in matrices
            ]

    def combined(self, values: list[Vector], operation: Callable[[Vector, Vector], Vector]) -> Any:
        """One value of several, by twos."""
        while len(values) > 1:
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [operation(a, b) for a, b in pairs]
        return values[0]


def _column_kernel(emit: Callable[..., None], *arguments: Any) -> Any:
    """A kernel of these arguments; `emit` is called for each vector of columns with their values.

    Pointers are those of the vector's columns.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for vector in range(_VECTORS):
            own = [
                builder.gep(value, [_I64(vector * LANES)]) if kind is FLOATS else value
                for kind, value in zip(arguments, args, strict=True)
            ]
            emit(_Code(builder), *own)
        return context.get_dummy_value()

    return codegen


def _emit_softmax(
    code: _Code, scores: Any, lines: Any, scale: Any, largest: Any, total: Any
) -> None:
    factor = code.spread(scale)
    top = code.state(code.load(scores))
    with code.lines([scores], lines) as places:
        found = [code.load(places(j)[0]) for j in range(_UNROLLED)]
        best = code.combined(found, code.largest)
        code.builder.store(code.largest(code.builder.load(top), best), top)
    most = code.builder.load(top)
    code.store(most, largest)
    # exp(scale (x - largest)) = exp(scale x - scale largest), one multiply-add
    shift = code.builder.fneg(code.builder.fmul(most, factor))
    sum_of = code.state(code.number(0.0))
    with code.lines([scores], lines) as places:
        powers = []
        for j in range(_UNROLLED):
            (place,) = places(j)
            powers.append(code.exp(code.fma(code.load(place), factor, shift)))
            code.store(powers[-1], place)
        more = code.combined(powers, code.builder.fadd)
        code.builder.store(code.builder.fadd(code.builder.load(sum_of), more), sum_of)
    code.store(code.builder.load(sum_of), total)


def _emit_weights(code: _Code, scores: Any, lines: Any, scale: Any, logs: Any) -> None:
    factor, shift = code.spread(scale), code.builder.fneg(code.load(logs))
    with code.lines([scores], lines) as places:
        for j in range(_UNROLLED):
            (place,) = places(j)
            code.store(code.exp(code.fma(code.load(place), factor, shift)), place)


def _emit_gradients(code: _Code, slopes: Any, weights: Any, lines: Any, scale: Any) -> None:
    builder, delta = code.builder, code.state(code.number(0.0))
    with code.lines([slopes, weights], lines) as places:
        parts = []
        for j in range(_UNROLLED):
            slope, own = map(code.load, places(j))
            parts.append(builder.fmul(slope, own))
        more = code.combined(parts, builder.fadd)
        builder.store(builder.fadd(builder.load(delta), more), delta)
    factor, found = code.spread(scale), builder.load(delta)
    with code.lines([slopes, weights], lines) as places:
        for j in range(_UNROLLED):
            slope, own = map(code.load, places(j))
            change = builder.fmul(builder.fsub(slope, found), factor)
            code.store(builder.fmul(change, own), places(j)[0])


_SOFTMAX = (FLOATS, INT64, FLOAT32, FLOATS, FLOATS)
_WEIGHTS = (FLOATS, INT64, FLOAT32, FLOATS)
_GRADIENTS = (FLOATS, FLOATS, INT64, FLOAT32)


@intrinsic
def _softmax(typingctx: Any, scores: Any, lines: Any, scale: Any, largest: Any, total: Any) -> Any:
    return types.void(*_SOFTMAX), _column_kernel(_emit_softmax, *_SOFTMAX)


@intrinsic
def _weights(typingctx: Any, scores: Any, lines: Any, scale: Any, logs: Any) -> Any:
    return types.void(*_WEIGHTS), _column_kernel(_emit_weights, *_WEIGHTS)


@intrinsic
def _gradients(typingctx: Any, slopes: Any, weights: Any, lines: Any, scale: Any) -> Any:
    return types.void(*_GRADIENTS), _column_kernel(_emit_gradients, *_GRADIENTS)


@kernel(*_SOFTMAX)
def softmax_columns(scores, lines, scale, largest, total):
    """scores = exp(scale (score - largest of its column)), whose sums are `total`.

    _UNROLLED divides `lines`; so it does below.
    """
    _softmax(scores, lines, scale, largest, total)


@kernel(*_WEIGHTS)
def weight_columns(scores, lines, scale, logs):
    """scores = exp(scale score - log of its column)."""
    _weights(scores, lines, scale, logs)


@kernel(*_GRADIENTS)
def gradient_columns(slopes, weights, lines, scale):
    """slopes = scale weight (slope - delta), with delta = sum over the column of weight slope."""
    _gradients(slopes, weights, lines, scale)
