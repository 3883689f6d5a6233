"""Operations on vectors of float32, emitted as LLVM code.

For kernels whose loops Numba and LLVM compile for half a register's width, or not for vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from mygpt.cpu.common import arithmetic
from mygpt.cpu.common.layout import LANES

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR, _WORD_VECTOR = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
Vector = Any  # LLVM's value of a vector


class VectorCode:
    """Emits operations on vectors of float32."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self._fma, self._copysign, self._abs = (
            cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(_VECTOR, [_VECTOR] * operands),
                f"llvm.{name}.v{LANES}f32",
            )
            for name, operands in (("fma", 3), ("copysign", 2), ("fabs", 1))
        )

    def number(self, value: Any) -> Vector:
        """A constant in all lanes."""
        return ir.Constant(_VECTOR, [float(value)] * LANES)

    def spread(self, value: Any) -> Vector:
        """One number in all lanes."""
        undefined = ir.Constant(_VECTOR, ir.Undefined)
        one = self.builder.insert_element(undefined, value, _I32(0))
        lanes = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
        return self.builder.shuffle_vector(one, undefined, lanes)

    def fma(self, a: Vector, b: Vector, c: Vector) -> Vector:
        """a b + c, rounded once."""
        return self.builder.call(self._fma, [a, b, c])

    def largest(self, a: Vector, b: Vector) -> Vector:
        """The larger of a and b in each lane."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def load(self, pointer: Any) -> Vector:
        """LANES numbers from a pointer on."""
        vector = self.builder.bitcast(pointer, _VECTOR.as_pointer())
        return self.builder.load(vector, align=4, typ=_VECTOR)

    def store(self, value: Vector, pointer: Any) -> None:
        """Put LANES numbers at a pointer."""
        self.builder.store(value, self.builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)

    def exp(self, x: Vector) -> Vector:
        """`arithmetic.exp` on a vector, and 0 below its range."""
        builder, at = self.builder, arithmetic
        lowest, highest = self.number(at.LOWEST), self.number(at.HIGHEST)
        inside = builder.fcmp_ordered(">", x, lowest)
        x = builder.select(builder.fcmp_ordered("<", x, highest), x, highest)
        shifted = self.fma(x, self.number(at.LOG2E), self.number(at.SHIFT))
        n = builder.fsub(shifted, self.number(at.SHIFT))
        r = self.fma(n, self.number(-at.LN2_HIGH), x)
        r = self.fma(n, self.number(-at.LN2_LOW), r)
        power = self.number(at.EXP_C6)
        for coefficient in (at.EXP_C5, at.EXP_C4, at.EXP_C3, at.EXP_C2, 1.0, 1.0):
            power = self.fma(r, power, self.number(coefficient))
        bits = builder.bitcast(shifted, _WORD_VECTOR)
        bits = builder.shl(bits, ir.Constant(_WORD_VECTOR, [23] * LANES))
        bits = builder.add(bits, ir.Constant(_WORD_VECTOR, [127 << 23] * LANES))
        power = builder.fmul(power, builder.bitcast(bits, _VECTOR))
        return builder.select(inside, power, self.number(0.0))

    def erf(self, x: Vector) -> Vector:
        """`arithmetic.erf` on a vector."""
        builder, at = self.builder, arithmetic
        size = builder.call(self._abs, [x])
        one = self.number(1.0)
        t = builder.fdiv(one, self.fma(size, self.number(at.ERF_P), one))
        series = self.number(at.ERF_A5)
        for coefficient in (at.ERF_A4, at.ERF_A3, at.ERF_A2, at.ERF_A1):
            series = self.fma(t, series, self.number(coefficient))
        power = self.exp(builder.fneg(builder.fmul(size, size)))
        value = self.fma(builder.fneg(builder.fmul(t, series)), power, one)
        return builder.call(self._copysign, [value, x])

    def logistic(self, x: Vector) -> Vector:
        """1 / (1 + e**-x)."""
        one = self.number(1.0)
        below = self.builder.fadd(one, self.exp(self.builder.fneg(x)))
        return self.builder.fdiv(one, below)

    def state(self, first: Vector) -> Any:
        """A variable for a vector; LLVM's pass "mem2reg" makes a register of it."""
        place = cgutils.alloca_once(self.builder, _VECTOR)
        self.builder.store(first, place)
        return place

    def combined(self, values: list[Vector], operation: Callable[[Vector, Vector], Vector]) -> Any:
        """One value of several, by twos."""
        while len(values) > 1:
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [operation(a, b) for a, b in pairs]
        return values[0]

    @contextmanager
    def vectors(self, count: Any) -> Iterator[Any]:
        """A loop over `count` numbers, LANES at a time; it yields the first one's index."""
        steps = self.builder.sdiv(count, _I64(LANES))
        with cgutils.for_range(self.builder, steps, intp=_I64) as loop:
            yield self.builder.mul(loop.index, _I64(LANES))
