"""Norms, activations, rotation, dropout and cross-entropy, forward and backward, row by row.

In all formulas dX is the gradient of the loss with respect to X. "+=" says that a function adds to
a gradient: a weight's is summed over rows, a residual stream's over its branches.
Letters: C width of a row, D head size, M MLP width.
"""

from __future__ import annotations

import math

import numpy as np

from mygpt.cpu.common.arithmetic import (
    CUBIC,
    PLACE,
    SQRT_HALF,
    TANH_GELU,
    activate,
    dot,
    erf,
    exp,
    f32,
    hash32,
    largest_of,
    normalize,
    rotate,
)
from mygpt.cpu.common.simd import FLOAT32, FLOATS, INT64, INTS, REASSOCIATE, floats, kernel, skip
from mygpt.cpu.train import layout as at

_ZERO, _HALF, _ONE, _TWO, _THREE = f32(0), f32(0.5), f32(1), f32(2), f32(3)
DENSITY = f32(1 / math.sqrt(2 * math.pi))  # the standard normal density at 0


@kernel(FLOATS, FLOATS, FLOATS, INT64, FLOAT32, returns=FLOAT32, extra=REASSOCIATE)
def _dot_centred(g, w, x, count, centre):
    """The sum of g[i] w[i] (x[i] - centre)."""
    total = _ZERO
    for i in range(count):
        total += g[i] * w[i] * (x[i] - centre)
    return total


@kernel(FLOATS, FLOATS, INT64, INT64, INT64, INTS, FLOAT32, FLOATS)
def norm_rows(out, x, rows, count, kind, norm, eps, saved):
    """out = LayerNorm or RMSNorm of each row of x.

    `saved` (rows, 2) is for the backward pass: of each row the mean m (RMSNorm: 0) and the factor
    f = 1 / sqrt(mean((x - m)**2) + eps).
    """
    for row in range(rows):
        y, own = skip(out, row * count), skip(x, row * count)
        saved[2 * row], saved[2 * row + 1] = normalize(
            y, own, count, kind, norm[at.SCALE], norm[at.SHIFT], eps
        )


# The backward pass of a norm. With n = (x - m) f, y = n w + b, and a = dy w = dn:
#
#     dL/dw = sum over rows of dy n            dL/db = sum over rows of dy
#     dL/dx = f (a - mean(a) - n mean(a n))    LayerNorm
#     dL/dx = f (a - n mean(a n))              RMSNorm
#
# Derivation. dL/dx_j = sum_i a_i dn_i/dx_j, where
#     dn_i/dx_j = f ((i == j) - dm/dx_j) + (x_i - m) df/dx_j,
#     dm/dx_j = 1 / C   (RMSNorm: m is the constant 0, so this term and mean(a) are not there),
#     df/dx_j = -1/2 f**3 d(variance)/dx_j = -f**3 (x_j - m) / C = -f**2 n_j / C
# (the mean's own change drops out of the variance's, since sum_i (x_i - m) = 0). Together
#     dL/dx_j = f a_j - f mean(a) - n_j f (1/C) sum_i a_i (x_i - m) f
#             = f (a_j - mean(a) - n_j mean(a n)).
# The code has `far` = x - m and `along` = mean(a far) f**2, so that far * along = n mean(a n).
@kernel(FLOATS, FLOATS, FLOATS, INT64, INT64, INT64, INTS, FLOATS, FLOATS)
def norm_rows_backward(dx, dy, x, rows, count, kind, norm, saved, gradients):
    """dx += the gradient of each row of x; adds to the gradients of weight and bias."""
    weight = floats(norm[at.SCALE])
    weight_gradient = skip(gradients, norm[at.SCALE_GRADIENT])
    for row in range(rows):
        out, g, own = skip(dx, row * count), skip(dy, row * count), skip(x, row * count)
        centre, factor = saved[2 * row], saved[2 * row + 1]
        mean = _ZERO
        if kind != at.RMS_NORM:
            mean = dot(g, weight, count) / f32(count)
        along = _dot_centred(g, weight, own, count, centre) * factor * factor / f32(count)
        for i in range(count):
            far = own[i] - centre
            out[i] += factor * (g[i] * weight[i] - mean - far * along)
            weight_gradient[i] += g[i] * far * factor
        if norm[at.SHIFT] != 0:
            bias_gradient = skip(gradients, norm[at.SHIFT_GRADIENT])
            for i in range(count):
                bias_gradient[i] += g[i]


@kernel(FLOATS, FLOATS, INT64, INTS, INT64, INT64, FLOATS, FLOATS, FLOAT32, FLOATS)
def prepare_head(out, x, size, norm, has_norm, rotary, cosines, sines, eps, saved):
    """out = one query or key head x (D,), normalised and rotated as far as the model does so."""
    saved[0] = _ONE
    if has_norm:
        _, saved[0] = normalize(out, x, size, at.RMS_NORM, norm[at.SCALE], 0, eps)
    else:
        for i in range(size):
            out[i] = x[i]
    if rotary:
        rotate(out, size, cosines, sines)


# y = R n, n = norm(x). A rotation R is orthogonal, so its transpose is the rotation by the negative
# angle, and
#
#     dL/dn = R^T dy:   dn[i]       =  dy[i] cos a + dy[i + D/2] sin a
#                       dn[i + D/2] =  dy[i + D/2] cos a - dy[i] sin a
#     dL/dx = f (dn w - n mean(dn w n))   RMSNorm, see `norm_rows_backward`
#     dL/dw = dn n, summed over rows and heads, which share one weight (D,)
@kernel(FLOATS, FLOATS, FLOATS, INT64, INTS, INT64, INT64, FLOATS, FLOATS, FLOATS, FLOATS)
def prepare_head_backward(
    dx, dy, x, size, norm, has_norm, rotary, cosines, sines, saved, gradients
):
    """dx = the gradient of a head before `prepare_head`; dy becomes dn in place."""
    if rotary:
        half = size // 2
        for i in range(half):
            first, second = dy[i], dy[i + half]
            dy[i] = first * cosines[i] + second * sines[i]
            dy[i + half] = second * cosines[i] - first * sines[i]
    if has_norm:
        weight, own = floats(norm[at.SCALE]), skip(gradients, norm[at.SCALE_GRADIENT])
        factor = saved[0]
        along = _dot_centred(dy, weight, x, size, _ZERO) * factor * factor / f32(size)
        for i in range(size):
            dx[i] = factor * (dy[i] * weight[i] - x[i] * along)
            own[i] += dy[i] * x[i] * factor
    else:
        for i in range(size):
            dx[i] = dy[i]


@kernel(FLOATS, FLOATS, INT64, INT64, INT64)
def activate_rows(out, x, rows, hidden, kind):
    """out (rows, M) = GELU(x) of x (rows, M), or SiLU(gate) * up of rows | gate (M) | up (M) |."""
    # x is kept for the backward pass.
    wide = 2 * hidden if kind == at.SWIGLU else hidden
    for row in range(rows):
        gate = skip(x, row * wide)
        activate(skip(out, row * hidden), gate, skip(gate, hidden), hidden, kind)


# With s(x) = 1 / (1 + e**-x), the logistic function, s' = s (1 - s):
#
#     SwiGLU  y = g s(g) u      dL/dg = dy u (s + g s (1 - s)),  dL/du = dy g s
#     GELU    y = x P(x)        dL/dx = dy (P(x) + x p(x))
#             P the standard normal distribution (1 + erf(x / sqrt 2)) / 2, and
#             p = P' its density e**(-x**2 / 2) / sqrt(2 pi)
#     tanh    y = x s(2 u)      dL/dx = dy (s + x s (1 - s) 2 u'),  as (1 + tanh u) / 2 = s(2 u)
#             u = sqrt(2 / pi) (x + 0.044715 x**3),  u' = sqrt(2 / pi) (1 + 3 * 0.044715 x**2)
@kernel(FLOATS, FLOATS, INT64, INT64, INT64)
def activate_rows_backward(x, dy, rows, hidden, kind):
    """x, the input of `activate_rows`, is replaced by its gradient."""
    for row in range(rows):
        g = skip(dy, row * hidden)
        if kind == at.SWIGLU:
            gate, up = skip(x, 2 * row * hidden), skip(x, (2 * row + 1) * hidden)
            for i in range(hidden):
                logistic = _ONE / (_ONE + exp(-gate[i]))
                value = gate[i] * logistic
                slope = logistic + value * (_ONE - logistic)
                gate[i] = g[i] * up[i] * slope
                up[i] = g[i] * value
        elif kind == at.GELU:
            own = skip(x, row * hidden)
            for i in range(hidden):
                below = _HALF * (_ONE + erf(own[i] * SQRT_HALF))
                own[i] = g[i] * (below + own[i] * DENSITY * exp(-_HALF * own[i] * own[i]))
        else:
            own = skip(x, row * hidden)
            for i in range(hidden):
                square = own[i] * own[i]
                inner = TANH_GELU * own[i] * (_ONE + CUBIC * square)
                logistic = _ONE - _ONE / (_ONE + exp(_TWO * inner))
                rise = _TWO * TANH_GELU * (_ONE + _THREE * CUBIC * square)
                own[i] = g[i] * (logistic + own[i] * logistic * (_ONE - logistic) * rise)


# Dropout (Srivastava et al., 2014), scaled in training: y = x m / (1 - p), where m is 0 with
# probability p and else 1. So dL/dx = dy m / (1 - p): `drop` with the same key and positions is its
# own backward pass. No mask is stored: m is a hash of seed, site (which dropout of the model) and
# position, so it is the same in both passes, for any number of threads and any chunks.
@kernel(INT64, INT64, returns=INT64)
def dropout_key(seed, site):
    """32 bits from which all random numbers of one site (a dropout of the model) derive."""
    return np.int64(hash32(np.uint32(np.uint32(seed) ^ np.uint32(np.uint32(site) * PLACE))))


@kernel(FLOATS, INT64, INT64, INT64, FLOAT32)
def drop(x, count, key, first, rate):
    """Set each of x's numbers to 0 with probability `rate`, and divide the others by 1 - rate.

    The choice is a function of `key` and the position, counted from `first`.
    """
    # A hash is uniform over 0 to 2**32 - 1, so it is below rate * 2**32 with probability `rate`.
    least = np.uint32(np.int64(np.float64(rate) * 4294967296.0))
    scale = _ONE / (_ONE - rate)
    start, place = np.uint32(key), np.uint32(first)
    for i in range(count):
        h = hash32(np.uint32(start ^ np.uint32(np.uint32(place + np.uint32(i)) * PLACE)))
        x[i] = x[i] * scale if h >= least else _ZERO


@kernel(FLOATS, INT64, INT64, INT64, INT64, FLOAT32)
def drop_every(x, count, key, first, step, rate):
    """`drop` for numbers whose positions are `step` apart, as in a column of a matrix."""
    least = np.uint32(np.int64(np.float64(rate) * 4294967296.0))
    scale = _ONE / (_ONE - rate)
    start, place, apart = np.uint32(key), np.uint32(first), np.uint32(step)
    for i in range(count):
        position = np.uint32(place + np.uint32(np.uint32(i) * apart))
        h = hash32(np.uint32(start ^ np.uint32(position * PLACE)))
        x[i] = x[i] * scale if h >= least else _ZERO


# Loss of one row: L = -log softmax(z)[target] = log(sum_i e**z_i) - z_target, so
#
#     dL/dz_i = e**z_i / sum_j e**z_j - (i == target) = softmax(z)_i - (i == target)
#
# times `scale`, 1 / (rows of the batch) for a mean. Both are computed with the largest logit
# subtracted, which changes neither and keeps e**z from overflowing.
@kernel(FLOATS, INT64, INT64, FLOAT32, returns=FLOAT32, extra=REASSOCIATE)
def cross_entropy_row(logits, count, target, scale):
    """The loss of one row in nats; its logits are replaced by scale * dL/dz."""
    largest = largest_of(logits, count)
    chosen = logits[target] - largest
    total = _ZERO
    for i in range(count):
        logits[i] = exp(logits[i] - largest)
        total += logits[i]
    factor = scale / total
    for i in range(count):
        logits[i] *= factor
    logits[target] -= scale
    return f32(math.log(total)) - chosen


# With the target (1 - s) onehot(target) + s q instead of onehot(target), for a distribution q,
#
#     L = -sum_i ((1 - s) (i == target) + s q_i) log softmax(z)_i
#     dL/dz_i = softmax(z)_i - (1 - s) (i == target) - s q_i
#
# which is that of `cross_entropy_row` plus s ((i == target) - q_i).
@kernel(FLOATS, INT64, INT64, FLOATS, FLOAT32)
def smooth_row(gradient, count, target, q, scale):
    """Add scale * ((i == target) - q[i]) to the gradient of a row's logits."""
    for i in range(count):
        gradient[i] -= scale * q[i]
    gradient[target] += scale
