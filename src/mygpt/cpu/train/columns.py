"""Softmax and its gradient down the columns of a matrix, in vectors that stay in registers.

Written in LLVM code, as `tile` is: Numba's loops over 32 columns are too short for what
LLVM puts before them (whether the arrays overlap), and are compiled for half a register's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from mygpt.cpu.common.layout import LANES
from mygpt.cpu.common.simd import FLOAT32, FLOATS, INT64, intrinsic, kernel
from mygpt.cpu.train.layout import ACROSS
from mygpt.cpu.train.vectors import VectorCode

_I64 = ir.IntType(64)
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
@contextmanager
def _lines(
    code: VectorCode, matrices: Sequence[Any], lines: Any
) -> Iterator[Callable[[int], list[Any]]]:
    """A loop over `lines`, _UNROLLED at a time; what it yields gives the places of line j."""
    builder = code.builder
    count = builder.sdiv(lines, _I64(_UNROLLED))
    with cgutils.for_range(builder, count, intp=_I64) as loop:
        start = builder.mul(loop.index, _I64(_UNROLLED * ACROSS))
        yield lambda j: [
            builder.gep(matrix, [builder.add(start, _I64(j * ACROSS))]) for matrix in matrices
        ]


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
            emit(VectorCode(builder), *own)
        return context.get_dummy_value()

    return codegen


def _emit_softmax(
    code: VectorCode, scores: Any, lines: Any, scale: Any, largest: Any, total: Any
) -> None:
    factor = code.spread(scale)
    top = code.state(code.load(scores))
    with _lines(code, [scores], lines) as places:
        found = [code.load(places(j)[0]) for j in range(_UNROLLED)]
        best = code.combined(found, code.largest)
        code.builder.store(code.largest(code.builder.load(top), best), top)
    most = code.builder.load(top)
    code.store(most, largest)
    # exp(scale (x - largest)) = exp(scale x - scale largest), one multiply-add
    shift = code.builder.fneg(code.builder.fmul(most, factor))
    sum_of = code.state(code.number(0.0))
    with _lines(code, [scores], lines) as places:
        powers = []
        for j in range(_UNROLLED):
            (place,) = places(j)
            powers.append(code.exp(code.fma(code.load(place), factor, shift)))
            code.store(powers[-1], place)
        more = code.combined(powers, code.builder.fadd)
        code.builder.store(code.builder.fadd(code.builder.load(sum_of), more), sum_of)
    code.store(code.builder.load(sum_of), total)


def _emit_weights(code: VectorCode, scores: Any, lines: Any, scale: Any, logs: Any) -> None:
    factor, shift = code.spread(scale), code.builder.fneg(code.load(logs))
    with _lines(code, [scores], lines) as places:
        for j in range(_UNROLLED):
            (place,) = places(j)
            code.store(code.exp(code.fma(code.load(place), factor, shift)), place)


def _emit_gradients(code: VectorCode, slopes: Any, weights: Any, lines: Any, scale: Any) -> None:
    builder, delta = code.builder, code.state(code.number(0.0))
    with _lines(code, [slopes, weights], lines) as places:
        parts = []
        for j in range(_UNROLLED):
            slope, own = map(code.load, places(j))
            parts.append(builder.fmul(slope, own))
        more = code.combined(parts, builder.fadd)
        builder.store(builder.fadd(builder.load(delta), more), delta)
    factor, found = code.spread(scale), builder.load(delta)
    with _lines(code, [slopes, weights], lines) as places:
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
