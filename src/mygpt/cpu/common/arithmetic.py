"""Elementary functions, norms, activations, rotation and softmax on rows of float32.

The loops are written so that LLVM vectorises them: no calls into the C library, no branches that
depend on the data, and sums that may be reordered (`REASSOCIATE`).
Letters: C width of a row, D head size.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types

from mygpt.cpu.common import layout as at
from mygpt.cpu.common.simd import (
    FLOAT32,
    FLOATS,
    INT64,
    NO_NANS,
    REASSOCIATE,
    UINT32,
    bits_of_float,
    float_of_bits,
    floats,
    kernel,
)

f32 = np.float32
_ZERO, _HALF, _ONE, _TWO = f32(0), f32(0.5), f32(1), f32(2)
_LEAST = np.finfo(f32).min

# --- constants of `exp` ---
# Where 2**n is a normal float32, that is n from -126 to 127:
# -87 / ln 2 = -125.5 and 88 / ln 2 = 126.96, rounded to the nearest whole number.
LOWEST, HIGHEST = f32(-87.0), f32(88.0)
LOG2E = f32(1 / math.log(2))
# ln 2 in two parts (Cody & Waite, Software Manual for the Elementary Functions, 1980). The first
# is 355/512: it has 9 significant bits and |n| at most 7, so n * LN2_HIGH fits into the 24 bits
# of a float32 without rounding. The second part is what is missing.
LN2_HIGH = f32(0.693359375)
LN2_LOW = f32(math.log(2) - 0.693359375)
# Coefficients 1/n! of Taylor's series of e**r.
EXP_C2, EXP_C3, EXP_C4, EXP_C5, EXP_C6 = (f32(1 / math.factorial(n)) for n in range(2, 7))
# From 2**23 to 2**24 neighbouring float32 numbers are 1 apart: adding 1.5 * 2**23 to a small number
# rounds it to a whole one, and leaves that whole number in the lowest bits of the sum.
SHIFT = f32(1.5 * 2**23)
# A float32 is sign (1 bit), exponent + 127 (8 bits), mantissa (23 bits).
_23, _BIAS = np.int32(23), np.int32(127 << 23)

# --- constants of the activations ---
# GELU's approximation by tanh: Hendrycks & Gimpel, "Gaussian error linear units", 2016.
TANH_GELU, CUBIC = f32(math.sqrt(2 / math.pi)), f32(0.044715)
SQRT_HALF = f32(math.sqrt(0.5))
# Abramowitz & Stegun, Handbook of Mathematical Functions, 7.1.26: error at most 1.5e-7.
ERF_P, ERF_A1, ERF_A2 = f32(0.3275911), f32(0.254829592), f32(-0.284496736)
ERF_A3, ERF_A4, ERF_A5 = f32(1.421413741), f32(-1.453152027), f32(1.061405429)


# A hash of 32 bits: the finaliser of MurmurHash3 (Appleby, 2011), with its two factors and its
# shifts of 16, 13 and 16 bits. PLACE is 2**32 / golden ratio, odd: products with 0, 1, 2, ... are
# spread evenly over 32 bits (Knuth, The Art of Computer Programming, volume 3, 6.4).
PLACE = np.uint32(0x9E3779B1)
_FACTOR_1, _FACTOR_2 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_13, _16 = np.uint32(13), np.uint32(16)


@kernel(INT64, returns=INT64)
def padded(count):
    """`count` rounded up to whole vectors."""
    return (count + at.LANES - 1) // at.LANES * at.LANES


@kernel(UINT32, returns=UINT32)
def hash32(word):
    """A hash of one word: each of its bits influences each bit of the result, one to one."""
    h = np.uint32(np.uint32(word ^ (word >> _16)) * _FACTOR_1)
    h = np.uint32(np.uint32(h ^ (h >> _13)) * _FACTOR_2)
    return np.uint32(h ^ (h >> _16))


@kernel(FLOAT32, returns=FLOAT32)
def exp(x):
    """e**x with a relative error of about 1e-7, for x from -87 to 88; x is clipped to that range.

    x = n ln 2 + r with a whole number n, so e**x = 2**n e**r and |r| <= ln(2) / 2 = 0.347.
    """
    x = min(max(x, LOWEST), HIGHEST)
    # shifted = 1.5 * 2**23 + n; the subtraction gives n back as a float. No instruction converts
    # between float and int: that was measured to save a seventh of a cropped window's time.
    shifted = x * LOG2E + SHIFT
    n = shifted - SHIFT
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    # Horner's form of the series; the first term left away is r**7 / 7!, at most 1.2e-7.
    power = _ONE + r * (
        _ONE + r * (EXP_C2 + r * (EXP_C3 + r * (EXP_C4 + r * (EXP_C5 + r * EXP_C6))))
    )
    # The lowest bits of `shifted` hold n (two's complement where it is negative). Shifted left by
    # 23 they are n in the exponent's place, all higher bits fall out, and + 127 makes it 2**n.
    return power * float_of_bits(np.int32((bits_of_float(shifted) << _23) + _BIAS))


@kernel(FLOAT32, returns=FLOAT32)
def erf(x):
    """The error function, with an absolute error of at most 2e-7."""
    # For x >= 0: erf(x) = 1 - (a1 t + ... + a5 t**5) exp(-x**2) with t = 1 / (1 + p x);
    # erf is odd.
    size = abs(x)
    t = _ONE / (_ONE + ERF_P * size)
    series = t * (ERF_A1 + t * (ERF_A2 + t * (ERF_A3 + t * (ERF_A4 + t * ERF_A5))))
    value = _ONE - series * exp(-size * size)
    return value if x >= _ZERO else -value


@kernel(FLOATS, FLOATS, FLOATS, INT64, INT64)
def activate(out, gate, up, count, kind):
    """out = GELU(gate) (exact or tanh), or SiLU(gate) * up (SwiGLU); `out` may be `gate`."""
    # The kind is tested outside of the loops, so that each loop has no branch.
    if kind == at.SWIGLU:
        # SiLU(x) = x / (1 + e**-x); SwiGLU: Shazeer, "GLU variants improve transformer", 2020.
        for i in range(count):
            out[i] = gate[i] / (_ONE + exp(-gate[i])) * up[i]
    elif kind == at.GELU:
        # GELU(x) = x P(Z <= x) of a standard normal Z = x (1 + erf(x / sqrt 2)) / 2
        for i in range(count):
            out[i] = _HALF * gate[i] * (_ONE + erf(gate[i] * SQRT_HALF))
    else:
        # x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x**3). As
        # tanh u = 1 - 2 / (1 + e**2u), that is x (1 - 1 / (1 + e**2u)): one exp is enough.
        for i in range(count):
            inner = TANH_GELU * (gate[i] + CUBIC * gate[i] * gate[i] * gate[i])
            out[i] = gate[i] * (_ONE - _ONE / (_ONE + exp(_TWO * inner)))


@kernel(FLOATS, FLOATS, INT64, returns=FLOAT32, extra=REASSOCIATE)
def dot(x, y, count):
    """The sum of x[i] y[i]."""
    total = _ZERO
    for i in range(count):
        total += x[i] * y[i]
    return total


@kernel(FLOATS, INT64, returns=FLOAT32, extra=REASSOCIATE)
def total_of(x, count):
    """The sum of x[:count]."""
    total = _ZERO
    for i in range(count):
        total += x[i]
    return total


@kernel(FLOATS, INT64, FLOAT32, returns=FLOAT32, extra=REASSOCIATE)
def sum_of_squares(x, count, centre):
    """The sum of (x[i] - centre)**2."""
    total = _ZERO
    for i in range(count):
        total += (x[i] - centre) * (x[i] - centre)
    return total


@kernel(
    FLOATS, FLOATS, INT64, INT64, INT64, INT64, FLOAT32, returns=types.UniTuple(FLOAT32, 2)
)  # fmt: skip
def normalize(out, x, count, kind, weight_address, bias_address, eps):
    """out = LayerNorm or RMSNorm of the row x (C,); `out` may be `x`.

    LayerNorm (Ba et al., 2016): (x - mean) / sqrt(variance + eps) * weight + bias.
    RMSNorm (Zhang & Sennrich, 2019): x / sqrt(mean(x**2) + eps) * weight: mean 0, no bias.

    Returns:
        (mean, factor): `factor` is 1 / sqrt(...).
    """
    # Two passes, the mean first: E[x**2] - E[x]**2 in one pass would cancel in float32.
    centre, weight = _ZERO, floats(weight_address)
    if kind != at.RMS_NORM:
        centre = total_of(x, count) / f32(count)
    factor = _ONE / f32(math.sqrt(sum_of_squares(x, count, centre) / f32(count) + eps))
    if kind == at.RMS_NORM:
        for i in range(count):
            out[i] = x[i] * factor * weight[i]
    else:
        bias = floats(bias_address)
        for i in range(count):
            out[i] = (x[i] - centre) * factor * weight[i] + bias[i]
    return centre, factor


@kernel(FLOATS, INT64, FLOATS, FLOATS)
def rotate(x, size, cosines, sines):
    """Rotary position embedding (Su et al., "RoFormer", 2021) of one head x (D,), in place."""
    # Elements i and i + D/2 are a point of the plane, turned by the angle a = position * frequency:
    #     x[i]       <- x[i] cos a - x[i + D/2] sin a
    #     x[i + D/2] <- x[i + D/2] cos a + x[i] sin a
    # A query at m and a key at n then have a score that depends on m - n alone. The pairs are those
    # of Llama and Qwen in Hugging Face's layout; the paper pairs neighbours 2i and 2i + 1.
    half = size // 2
    for i in range(half):
        first, second = x[i], x[i + half]
        x[i] = first * cosines[i] - second * sines[i]
        x[i + half] = second * cosines[i] + first * sines[i]


@kernel(FLOATS, INT64, returns=FLOAT32, extra=NO_NANS)
def largest_of(x, count):
    """The largest of x[:count]; any of them where one is NaN."""
    # Declared free of NaN, the comparison becomes one vector instruction (`max`).
    largest = x[0]
    for i in range(1, count):
        largest = max(largest, x[i])
    return largest


@kernel(FLOATS, INT64, INT64, FLOAT32)
def softmax(x, count, capacity, scale):
    """x[:count] = softmax(scale * x[:count]) and x[count:capacity] = 0; all NaN where one is.

    `capacity` is a multiple of LANES, and the buffer extends to it.
    """
    # x:  | scores ... | least least | 0 0 ... 0 |
    #     0          count         padded     capacity
    # The loops run over whole vectors: LLVM would compute a rest of fewer than LANES numbers one
    # by one. Measured at the tutorial's size: 5,700 cycles a token for attention, 8,100 before.
    end = padded(count)
    for i in range(count, end):
        x[i] = _LEAST
    # Without the largest subtracted e**x would overflow; it cancels in the quotient.
    largest = largest_of(x, end)
    for i in range(end):
        x[i] = exp((x[i] - largest) * scale)
    for i in range(count, capacity):
        x[i] = _ZERO
    factor = _ONE / total_of(x, end)
    for i in range(end):
        x[i] *= factor


@kernel(INT64, INT64, INT64, returns=INT64)
def part_start(count, part, parts):
    """Where part number `part` of `count` items begins when `parts` divide them: its end is that
    of the next part's beginning.
    """
    # ceil(count * part / parts): sizes differ by one at most, and the larger parts come first.
    # Of the rows of one text the later ones attend to more positions, so the parts' work is
    # closer to equal that way round.
    return (count * part + parts - 1) // parts
