"""Small functions on float32 numbers and rows of them, shaped so that LLVM vectorises them.

Letters: C width of a row.
"""

from __future__ import annotations

import math

import numpy as np

from mygpt.engines.cpu import layout as at
from mygpt.engines.cpu.simd import (
    COMPARING,
    FLOATS,
    REAL,
    SUMMING,
    WHOLE,
    bits_of_float,
    float_of_bits,
    kernel,
)

f32 = np.float32
_ZERO, _HALF, _ONE, _TWO = f32(0), f32(0.5), f32(1), f32(2)
_LEAST = np.finfo(f32).min
_LOWEST, _HIGHEST = f32(-87.0), f32(88.0)
_LOG2E = f32(1 / math.log(2))
_LN2_HIGH = f32(0.693359375)  # nine bits: its products with whole numbers are exact
_LN2_LOW = f32(math.log(2) - 0.693359375)
_C2, _C3, _C4, _C5, _C6 = (f32(1 / math.factorial(n)) for n in range(2, 7))
_SHIFT = f32(1.5 * 2**23)
_23, _BIAS = np.int32(23), np.int32(127 << 23)  # where a float32 keeps its power of two
_TANH_GELU, _CUBIC = f32(math.sqrt(2 / math.pi)), f32(0.044715)
_SQRT_HALF = f32(math.sqrt(0.5))
# Abramowitz & Stegun, Handbook of Mathematical Functions, 7.1.26
_P, _A1, _A2 = f32(0.3275911), f32(0.254829592), f32(-0.284496736)
_A3, _A4, _A5 = f32(1.421413741), f32(-1.453152027), f32(1.061405429)


@kernel(REAL, returns=REAL)
def exp(x):
    """e**x to about 1e-7 of itself, for x from -87 to 88; beyond, the value at that end."""
    x = min(max(x, _LOWEST), _HIGHEST)
    shifted = x * _LOG2E + _SHIFT  # so large that its last bits are the nearest whole number
    n = shifted - _SHIFT
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW  # |r| <= ln(2) / 2: Taylor's series is enough
    power = _ONE + r * (_ONE + r * (_C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6)))))
    return power * float_of_bits(np.int32((bits_of_float(shifted) << _23) + _BIAS))


@kernel(REAL, returns=REAL)
def erf(x):
    """The error function, to 2e-7."""
    size = abs(x)
    t = _ONE / (_ONE + _P * size)
    series = t * (_A1 + t * (_A2 + t * (_A3 + t * (_A4 + t * _A5))))
    value = _ONE - series * exp(-size * size)
    return value if x >= _ZERO else -value


@kernel(FLOATS, FLOATS, WHOLE, WHOLE)
def activate(gate, up, count, kind):
    """gate[i] = GELU(gate[i]) (exact or tanh), or SiLU(gate[i]) * up[i]."""
    if kind == at.SWIGLU:
        for i in range(count):
            gate[i] = gate[i] / (_ONE + exp(-gate[i])) * up[i]
    elif kind == at.GELU:
        for i in range(count):
            gate[i] = _HALF * gate[i] * (_ONE + erf(gate[i] * _SQRT_HALF))
    else:
        for i in range(count):
            inner = _TANH_GELU * (gate[i] + _CUBIC * gate[i] * gate[i] * gate[i])
            gate[i] = gate[i] * (_ONE - _ONE / (_ONE + exp(_TWO * inner)))


@kernel(FLOATS, WHOLE, returns=REAL, extra=SUMMING)
def total_of(x, count):
    """The sum of some numbers."""
    total = _ZERO
    for i in range(count):
        total += x[i]
    return total


@kernel(FLOATS, WHOLE, REAL, returns=REAL, extra=SUMMING)
def sum_of_squares(x, count, centre):
    """The sum of squares of their distances from `centre`."""
    total = _ZERO
    for i in range(count):
        total += (x[i] - centre) * (x[i] - centre)
    return total


@kernel(FLOATS, FLOATS, WHOLE, WHOLE, FLOATS, FLOATS, REAL)
def normalize(out, x, count, kind, weight, bias, eps):
    """out = LayerNorm or RMSNorm of the row x of C numbers; `out` may be `x`."""
    centre = _ZERO
    if kind != at.RMS_NORM:
        centre = total_of(x, count) / f32(count)
    factor = _ONE / f32(math.sqrt(sum_of_squares(x, count, centre) / f32(count) + eps))
    if kind == at.RMS_NORM:
        for i in range(count):
            out[i] = x[i] * factor * weight[i]
    else:
        for i in range(count):
            out[i] = (x[i] - centre) * factor * weight[i] + bias[i]


@kernel(FLOATS, WHOLE, returns=REAL, extra=COMPARING)
def largest_of(x, count):
    """The largest of some numbers; where one is NaN, any of them."""
    largest = x[0]
    for i in range(1, count):
        largest = max(largest, x[i])
    return largest


@kernel(FLOATS, WHOLE, WHOLE, REAL)
def softmax(x, count, room, scale):
    """x[:count] = softmax(scale * x[:count]) and x[count:room] = 0; all NaN where one is.

    Works on whole vectors, as many as `count` fills: a loop's odd end would be done number
    by number. Both `room` and what lies behind `count` are whole vectors' room.
    """
    whole = (count + at.LANES - 1) // at.LANES * at.LANES
    for i in range(count, whole):
        x[i] = _LEAST
    largest = largest_of(x, whole)
    for i in range(whole):
        x[i] = exp((x[i] - largest) * scale)
    for i in range(count, room):
        x[i] = _ZERO
    factor = _ONE / total_of(x, whole)
    for i in range(whole):
        x[i] *= factor


@kernel(WHOLE, WHOLE, WHOLE, returns=WHOLE)
def share(count, part, parts):
    """Where part number `part` of `count` things begins, when `parts` share them.

    Earlier parts get what is left over: of a text's rows, the later ones look at more.
    """
    return (count * part + parts - 1) // parts
