"""Activations and their backward pass in vectors; the formulas are in `arithmetic`.

Letters: M MLP width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from mygpt.cpu.common.arithmetic import CUBIC, SQRT_HALF, TANH_GELU
from mygpt.cpu.common.simd import FLOATS, INT64, intrinsic, kernel, skip
from mygpt.cpu.train import layout as at
from mygpt.cpu.train.arithmetic import DENSITY
from mygpt.cpu.train.vectors import Vector, VectorCode

# Each function below computes one vector: `forward` from gate and up (None without a gate),
# `backward` the gradients of the two from those and dy.


def _swiglu(code: VectorCode, gate: Vector, up: Vector) -> Vector:
    return code.builder.fmul(code.builder.fmul(gate, code.logistic(gate)), up)


def _swiglu_backward(
    code: VectorCode, gate: Vector, up: Vector, dy: Vector
) -> tuple[Vector, Vector]:
    builder, one = code.builder, code.number(1.0)
    logistic = code.logistic(gate)
    value = builder.fmul(gate, logistic)
    slope = code.fma(value, builder.fsub(one, logistic), logistic)
    return builder.fmul(builder.fmul(dy, up), slope), builder.fmul(dy, value)


def _below(code: VectorCode, x: Vector) -> Vector:
    """The standard normal distribution, (1 + erf(x / sqrt 2)) / 2."""
    half = code.number(0.5)
    return code.fma(half, code.erf(code.builder.fmul(x, code.number(SQRT_HALF))), half)


def _gelu(code: VectorCode, x: Vector, _: Vector) -> Vector:
    return code.builder.fmul(x, _below(code, x))


def _gelu_backward(code: VectorCode, x: Vector, _: Vector, dy: Vector) -> tuple[Vector, Vector]:
    builder = code.builder
    power = code.exp(builder.fmul(builder.fmul(x, x), code.number(-0.5)))
    density = builder.fmul(power, code.number(DENSITY))
    return builder.fmul(dy, code.fma(x, density, _below(code, x))), dy


def _twice_inner(code: VectorCode, x: Vector) -> tuple[Vector, Vector]:
    """2 u with u = sqrt(2 / pi) (x + 0.044715 x**3), and x**2."""
    square = code.builder.fmul(x, x)
    inner = code.fma(square, code.number(CUBIC), code.number(1.0))
    return code.builder.fmul(code.builder.fmul(x, inner), code.number(2 * TANH_GELU)), square


def _gelu_tanh(code: VectorCode, x: Vector, _: Vector) -> Vector:
    return code.builder.fmul(x, code.logistic(_twice_inner(code, x)[0]))


def _gelu_tanh_backward(
    code: VectorCode, x: Vector, _: Vector, dy: Vector
) -> tuple[Vector, Vector]:
    builder, one = code.builder, code.number(1.0)
    twice, square = _twice_inner(code, x)
    logistic = code.logistic(twice)
    rise = builder.fmul(code.number(2 * TANH_GELU), code.fma(square, code.number(3 * CUBIC), one))
    change = builder.fmul(builder.fmul(x, logistic), builder.fsub(one, logistic))
    return builder.fmul(dy, code.fma(change, rise, logistic)), dy


_FORWARD = (FLOATS, FLOATS, FLOATS, INT64)
_BACKWARD = (FLOATS, FLOATS, FLOATS, INT64)


def _forward(one: Callable[..., Vector]) -> Any:
    def make(typingctx: Any, out: Any, gate: Any, up: Any, count: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            out, gate, up, count = args
            code = VectorCode(builder)
            with code.vectors(count) as i:
                parts = [code.load(builder.gep(x, [i])) for x in (gate, up)]
                code.store(one(code, *parts), builder.gep(out, [i]))
            return context.get_dummy_value()

        return types.void(*_FORWARD), codegen

    return intrinsic(make)


def _backward(one: Callable[..., tuple[Vector, Vector]], gated: bool) -> Any:
    def make(typingctx: Any, gate: Any, up: Any, dy: Any, count: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            *sources, dy, count = args
            code = VectorCode(builder)
            with code.vectors(count) as i:
                places = [builder.gep(x, [i]) for x in sources]
                found = one(code, *map(code.load, places), code.load(builder.gep(dy, [i])))
                for value, place in list(zip(found, places, strict=True))[: 1 + gated]:
                    code.store(value, place)
            return context.get_dummy_value()

        return types.void(*_BACKWARD), codegen

    return intrinsic(make)


_swiglu_vectors, _swiglu_backward_vectors = _forward(_swiglu), _backward(_swiglu_backward, True)
_gelu_vectors, _gelu_backward_vectors = _forward(_gelu), _backward(_gelu_backward, False)
_tanh_vectors = _forward(_gelu_tanh)
_tanh_backward_vectors = _backward(_gelu_tanh_backward, False)


@kernel(FLOATS, FLOATS, INT64, INT64, INT64)
def activate_vectors(out, x, rows, hidden, kind):
    """As `activate_rows`; LANES divides M."""
    wide = 2 * hidden if kind == at.SWIGLU else hidden
    for row in range(rows):
        own, gate = skip(out, row * hidden), skip(x, row * wide)
        if kind == at.SWIGLU:
            _swiglu_vectors(own, gate, skip(gate, hidden), hidden)
        elif kind == at.GELU:
            _gelu_vectors(own, gate, gate, hidden)
        else:
            _tanh_vectors(own, gate, gate, hidden)


@kernel(FLOATS, FLOATS, INT64, INT64, INT64)
def activate_vectors_backward(x, dy, rows, hidden, kind):
    """As `activate_rows_backward`: x is replaced by its gradient."""
    wide = 2 * hidden if kind == at.SWIGLU else hidden
    for row in range(rows):
        gate, own = skip(x, row * wide), skip(dy, row * hidden)
        if kind == at.SWIGLU:
            _swiglu_backward_vectors(gate, skip(gate, hidden), own, hidden)
        elif kind == at.GELU:
            _gelu_backward_vectors(gate, gate, own, hidden)
        else:
            _tanh_backward_vectors(gate, gate, own, hidden)
