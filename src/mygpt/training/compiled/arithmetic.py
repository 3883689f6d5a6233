"""Norms, activations, rotation, dropout and cross-entropy, forward and back, row by row.

Letters: C width of a row, D head size.
"""

from __future__ import annotations

import math

import numpy as np

from mygpt.engines.cpu import layout as kinds
from mygpt.engines.cpu.arithmetic import erf, exp, f32, largest_of, sum_of_squares, total_of
from mygpt.engines.cpu.simd import FLOATS, INTS, REAL, SUMMING, WHOLE, floats, kernel, skip
from mygpt.training.compiled import layout as at

_ZERO, _HALF, _ONE, _TWO, _THREE = f32(0), f32(0.5), f32(1), f32(2), f32(3)
_SQRT_HALF, _DENSITY = f32(math.sqrt(0.5)), f32(1 / math.sqrt(2 * math.pi))
_TANH_GELU, _CUBIC = f32(math.sqrt(2 / math.pi)), f32(0.044715)
_FACTOR_1, _FACTOR_2, _PLACE = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35), np.uint32(0x9E3779B1)
_13, _16 = np.uint32(13), np.uint32(16)


@kernel(FLOATS, FLOATS, WHOLE, returns=REAL, extra=SUMMING)
def dot(x, y, count):
    """The sum of x[i] y[i]."""
    total = _ZERO
    for i in range(count):
        total += x[i] * y[i]
    return total


@kernel(FLOATS, FLOATS, FLOATS, WHOLE, REAL, returns=REAL, extra=SUMMING)
def _dot_centred(g, w, x, count, centre):
    total = _ZERO
    for i in range(count):
        total += g[i] * w[i] * (x[i] - centre)
    return total


@kernel(FLOATS, WHOLE, WHOLE, REAL, FLOATS)
def _moments(x, count, kind, eps, kept):
    """kept = (centre, 1 / spread) of a row: LayerNorm's, or RMSNorm's with centre 0."""
    centre = _ZERO
    if kind != kinds.RMS_NORM:
        centre = total_of(x, count) / f32(count)
    kept[0] = centre
    kept[1] = _ONE / f32(math.sqrt(sum_of_squares(x, count, centre) / f32(count) + eps))


@kernel(FLOATS, FLOATS, WHOLE, WHOLE, WHOLE, INTS, REAL, FLOATS)
def norm_rows(out, x, rows, count, kind, norm, eps, kept):
    """out = the norm of each row of x; `kept` (rows, 2) is what the way back needs."""
    weight = floats(norm[at.SCALE])
    for row in range(rows):
        y, own, moments = skip(out, row * count), skip(x, row * count), skip(kept, 2 * row)
        _moments(own, count, kind, eps, moments)
        centre, factor = moments[0], moments[1]
        if norm[at.SHIFT] != 0:
            bias = floats(norm[at.SHIFT])
            for i in range(count):
                y[i] = (own[i] - centre) * factor * weight[i] + bias[i]
        else:
            for i in range(count):
                y[i] = own[i] * factor * weight[i]


@kernel(FLOATS, FLOATS, FLOATS, WHOLE, WHOLE, WHOLE, INTS, FLOATS, FLOATS)
def norm_rows_back(dx, dy, x, rows, count, kind, norm, kept, gradients):
    """dx += the norm's gradient for each row; adds to its weight's and bias's gradients."""
    weight = floats(norm[at.SCALE])
    weight_gradient = skip(gradients, norm[at.SCALE_GRADIENT])
    for row in range(rows):
        out, g, own = skip(dx, row * count), skip(dy, row * count), skip(x, row * count)
        centre, factor = kept[2 * row], kept[2 * row + 1]
        mean = _ZERO
        if kind != kinds.RMS_NORM:
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


@kernel(FLOATS, FLOATS, WHOLE, INTS, WHOLE, WHOLE, FLOATS, FLOATS, REAL, FLOATS)
def ready_head(out, x, size, norm, normed, turned, cosines, sines, eps, kept):
    """out = one query's or key's head x, normalised and turned where the model does."""
    factor = _ONE
    weight = out  # any address: read only where there is a norm
    if normed:
        factor = _ONE / f32(math.sqrt(sum_of_squares(x, size, _ZERO) / f32(size) + eps))
        weight = floats(norm[at.SCALE])
    kept[0] = factor
    if normed:
        for i in range(size):
            out[i] = x[i] * factor * weight[i]
    else:
        for i in range(size):
            out[i] = x[i]
    if turned:
        half = size // 2
        for i in range(half):
            first, second = out[i], out[i + half]
            out[i] = first * cosines[i] - second * sines[i]
            out[i + half] = second * cosines[i] + first * sines[i]


@kernel(FLOATS, FLOATS, FLOATS, WHOLE, INTS, WHOLE, WHOLE, FLOATS, FLOATS, FLOATS, FLOATS)
def ready_head_back(dx, dy, x, size, norm, normed, turned, cosines, sines, kept, gradients):
    """dx = the gradient of one head before `ready_head`; dy is turned back in place."""
    if turned:
        half = size // 2
        for i in range(half):
            first, second = dy[i], dy[i + half]
            dy[i] = first * cosines[i] + second * sines[i]
            dy[i + half] = second * cosines[i] - first * sines[i]
    if normed:
        weight, own = floats(norm[at.SCALE]), skip(gradients, norm[at.SCALE_GRADIENT])
        factor = kept[0]
        along = _dot_centred(dy, weight, x, size, _ZERO) * factor * factor / f32(size)
        for i in range(size):
            dx[i] = factor * (dy[i] * weight[i] - x[i] * along)
            own[i] += dy[i] * x[i] * factor
    else:
        for i in range(size):
            dx[i] = dy[i]


@kernel(FLOATS, FLOATS, WHOLE, WHOLE, WHOLE)
def activate_rows(out, x, rows, hidden, kind):
    """out (rows, M) = GELU(x), or SiLU(gate) * up with both side by side in x."""
    for row in range(rows):
        y = skip(out, row * hidden)
        if kind == kinds.SWIGLU:
            gate, up = skip(x, 2 * row * hidden), skip(x, (2 * row + 1) * hidden)
            for i in range(hidden):
                y[i] = gate[i] / (_ONE + exp(-gate[i])) * up[i]
        elif kind == kinds.GELU:
            own = skip(x, row * hidden)
            for i in range(hidden):
                y[i] = _HALF * own[i] * (_ONE + erf(own[i] * _SQRT_HALF))
        else:
            own = skip(x, row * hidden)
            for i in range(hidden):
                inner = _TANH_GELU * (own[i] + _CUBIC * own[i] * own[i] * own[i])
                y[i] = own[i] * (_ONE - _ONE / (_ONE + exp(_TWO * inner)))


@kernel(FLOATS, FLOATS, WHOLE, WHOLE, WHOLE)
def activate_rows_back(x, dy, rows, hidden, kind):
    """x = the gradient of what `activate_rows` was given, in its place."""
    for row in range(rows):
        g = skip(dy, row * hidden)
        if kind == kinds.SWIGLU:
            gate, up = skip(x, 2 * row * hidden), skip(x, (2 * row + 1) * hidden)
            for i in range(hidden):
                share = _ONE / (_ONE + exp(-gate[i]))
                value = gate[i] * share
                slope = share + value * (_ONE - share)
                gate[i] = g[i] * up[i] * slope
                up[i] = g[i] * value
        elif kind == kinds.GELU:
            own = skip(x, row * hidden)
            for i in range(hidden):
                below = _HALF * (_ONE + erf(own[i] * _SQRT_HALF))
                own[i] = g[i] * (below + own[i] * _DENSITY * exp(-_HALF * own[i] * own[i]))
        else:
            own = skip(x, row * hidden)
            for i in range(hidden):
                square = own[i] * own[i]
                inner = _TANH_GELU * own[i] * (_ONE + _CUBIC * square)
                share = _ONE - _ONE / (_ONE + exp(_TWO * inner))
                rise = _TWO * _TANH_GELU * (_ONE + _THREE * _CUBIC * square)
                own[i] = g[i] * (share + own[i] * share * (_ONE - share) * rise)


@kernel(WHOLE, WHOLE, returns=WHOLE)
def dropout_key(seed, site):
    """What a site's random numbers begin with: 32 bits."""
    h = np.uint32(np.uint32(seed) ^ np.uint32(np.uint32(site) * _PLACE))
    h = np.uint32(np.uint32(h ^ (h >> _16)) * _FACTOR_1)
    h = np.uint32(np.uint32(h ^ (h >> _13)) * _FACTOR_2)
    return np.int64(np.uint32(h ^ (h >> _16)))


@kernel(FLOATS, WHOLE, WHOLE, WHOLE, REAL)
def drop(x, count, key, first, rate):
    """Drop each of x's numbers with probability `rate`, and make up for it in the others.

    Which go is a function of `key` and of their place, counted from `first`: MurmurHash3's
    last step (Appleby, 2011).
    """
    least = np.uint32(np.int64(np.float64(rate) * 4294967296.0))
    scale = _ONE / (_ONE - rate)
    start, place = np.uint32(key), np.uint32(first)
    for i in range(count):
        h = np.uint32(start ^ np.uint32(np.uint32(place + np.uint32(i)) * _PLACE))
        h = np.uint32(np.uint32(h ^ (h >> _16)) * _FACTOR_1)
        h = np.uint32(np.uint32(h ^ (h >> _13)) * _FACTOR_2)
        h = np.uint32(h ^ (h >> _16))
        x[i] = x[i] * scale if h >= least else _ZERO


@kernel(FLOATS, WHOLE, WHOLE, REAL, returns=REAL, extra=SUMMING)
def cross_entropy_row(logits, count, target, scale):
    """The loss of one row in nats; its logits become the loss's gradient, times `scale`."""
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
