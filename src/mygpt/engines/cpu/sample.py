"""From one slot's logits to its next token: the compiled twin of `mygpt.core.sampling`.

Order: repetition penalty, temperature, top-k, top-p, min-p, then the draw. Nothing is sorted:
cuts are found by halving the range of float32 itself, 32 counts over the vocabulary each.
Letters: V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np

from mygpt.core.random import DRAW_TOKEN
from mygpt.engines.cpu import layout as at
from mygpt.engines.cpu.arithmetic import exp, f32, largest_of
from mygpt.engines.cpu.simd import (
    BYTES,
    DOUBLE,
    FLOATS,
    INTS,
    REAL,
    SUMMING,
    WHOLE,
    WORD,
    bits_of_float,
    kernel,
)

_ZERO, _ONE = f32(0), f32(1)
_OUT = f32(-math.inf)
_DEAD = f32(-87.0)  # e**x below any probability that could be drawn
_SMALLEST, _LARGEST = np.int32(-(2**31)), np.int32(2**31 - 1)

_MASK32 = np.uint64(0xFFFFFFFF)
_MULTIPLY_0, _MULTIPLY_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_32, _5, _6 = np.uint64(32), np.uint64(5), np.uint64(6)


@kernel(WHOLE, WHOLE, WHOLE, returns=DOUBLE)
def uniform(seed, index, step):
    """`Stream(seed, index).uniform(step)`: Philox4x32-10, 53 bits; see `mygpt.core.random`."""
    key = np.uint64(seed)
    key_0, key_1 = key & _MASK32, key >> _32
    x0, x1 = np.uint64(step), np.uint64(index) & _MASK32
    x2, x3 = np.uint64(DRAW_TOKEN), np.uint64(index) >> _32
    for _ in range(10):
        p0, p1 = _MULTIPLY_0 * x0, _MULTIPLY_1 * x2
        x0, x1 = (p1 >> _32) ^ x1 ^ key_0, p1 & _MASK32
        x2, x3 = (p0 >> _32) ^ x3 ^ key_1, p0 & _MASK32
        key_0, key_1 = (key_0 + _WEYL_0) & _MASK32, (key_1 + _WEYL_1) & _MASK32
    high, low = np.float64(x0 >> _5), np.float64(x1 >> _6)
    return (high * 67108864.0 + low) / 9007199254740992.0


@kernel(REAL, returns=WORD)
def _rank(value):
    """A float32's place among all of them as an int32: larger numbers have larger ranks."""
    if value == _ZERO:
        return np.int32(0)  # -0.0 is 0.0
    bits = bits_of_float(value)
    return bits if bits >= np.int32(0) else np.int32(bits ^ _LARGEST)


@kernel(FLOATS, WHOLE, WORD, returns=WHOLE, extra=SUMMING)
def _count_from(z, vocab, rank):
    count = np.int64(0)
    for i in range(vocab):
        count += _rank(z[i]) >= rank
    return count


@kernel(FLOATS, FLOATS, WHOLE, WORD, returns=DOUBLE, extra=SUMMING)
def _mass_above(p, z, vocab, rank):
    mass = 0.0
    for i in range(vocab):
        mass += np.float64(p[i]) if _rank(z[i]) > rank else 0.0
    return mass


@kernel(WORD, WORD, returns=WORD)
def _middle(low, high):
    return np.int32((np.int64(low) + np.int64(high) + np.int64(1)) >> np.int64(1))


@kernel(FLOATS, WHOLE, WHOLE)
def keep_top_k(z, vocab, k):
    """Keep exactly the k largest; of equal ones at the cut, those of lower ids."""
    low, high = _SMALLEST, _LARGEST  # the k-th largest has the highest rank that k tokens reach
    while low < high:
        middle = _middle(low, high)
        if _count_from(z, vocab, middle) >= k:
            low = middle
        else:
            high = np.int32(middle - np.int32(1))
    spare = k - _count_from(z, vocab, np.int32(low + np.int32(1)))
    for i in range(vocab):
        rank = _rank(z[i])
        if rank == low and spare > 0:
            spare -= 1
        elif rank <= low:
            z[i] = _OUT


@kernel(FLOATS, FLOATS, WHOLE, REAL, returns=DOUBLE)
def _weigh(z, p, vocab, largest):
    """p = exp(z - largest), 0 where that is nothing; returns their sum, added in float64."""
    total = 0.0
    for i in range(vocab):
        distance = z[i] - largest
        p[i] = exp(distance) if distance > _DEAD else _ZERO
    for i in range(vocab):
        total += np.float64(p[i])
    return total


@kernel(FLOATS, FLOATS, WHOLE, REAL, REAL)
def keep_top_p(z, p, vocab, largest, top_p):
    """Keep a token when those before it, likeliest first, have not reached `top_p` yet."""
    goal = _weigh(z, p, vocab, largest) * np.float64(top_p)
    low, high = _SMALLEST, _LARGEST  # the lowest rank above which the mass is below the goal
    while low < high:
        middle = np.int32(_middle(low, high) - np.int32(1))
        if _mass_above(p, z, vocab, middle) < goal:
            high = middle
        else:
            low = np.int32(middle + np.int32(1))
    before = _mass_above(p, z, vocab, low)
    for i in range(vocab):
        rank = _rank(z[i])
        if rank == low and before < goal:
            before += np.float64(p[i])
        elif rank <= low:
            z[i] = _OUT


@kernel(FLOATS, WHOLE, returns=WHOLE)
def likeliest(z, vocab):
    """The lowest id of the largest."""
    largest = largest_of(z, vocab)
    for i in range(vocab):
        if z[i] == largest:
            return i
    return 0


@kernel(FLOATS, FLOATS, WHOLE, WHOLE, FLOATS, returns=DOUBLE)
def _filter(z, p, vocab, top_k, settings):
    """Put -inf where a filter cuts, weights into p; returns the weights' sum."""
    largest = largest_of(z, vocab)
    if 0 < top_k < vocab:
        keep_top_k(z, vocab, top_k)
    if settings[at.TOP_P] < _ONE:
        keep_top_p(z, p, vocab, largest, settings[at.TOP_P])
    least = largest + settings[at.LOG_MIN_P]
    for i in range(vocab):
        if z[i] < least:
            z[i] = _OUT
    return _weigh(z, p, vocab, largest)


@kernel(FLOATS, WHOLE, DOUBLE, returns=WHOLE)
def _invert(p, vocab, target):
    """The first token at which the weights' float64 sum passes the target."""
    total, last = 0.0, 0
    for i in range(vocab):
        total += np.float64(p[i])
        if total > target:
            return i
        if p[i] > _ZERO:
            last = i
    return last


@kernel(FLOATS, WHOLE, returns=WHOLE)
def _has_finite_top(z, vocab):
    """Whether there is no NaN and the largest is finite."""
    odd = np.int64(0)
    for i in range(vocab):
        odd += z[i] != z[i]
    return odd == 0 and abs(largest_of(z, vocab)) < f32(math.inf)


@kernel(FLOATS, FLOATS, FLOATS, BYTES, WHOLE, INTS, FLOATS, WHOLE, returns=WHOLE)
def choose(logits, p, z, seen, vocab, slot, settings, drawing):
    """The next token's id, or minus the status that ends the slot.

    Args:
        logits: (V,) the model's; left as they are.
        p: (V,) room; afterwards the weights of the draw (summing to 1 when not drawing).
        z: (V,) room.
        seen: (V,) int8 (see `layout`).
        vocab: V.
        slot: its ints.
        settings: its float32 numbers.
        drawing: whether to draw; else `p` is all that is wanted, and the id means nothing.
    """
    if not _has_finite_top(logits, vocab):
        return -at.BROKEN_MODEL
    penalty, temperature = settings[at.PENALTY], settings[at.TEMPERATURE]
    for i in range(vocab):
        value = logits[i]
        if penalty != _ONE and seen[i] & at.OCCURRED:
            value = value * penalty if value < _ZERO else value / penalty
        z[i] = value
    if slot[at.GREEDY]:
        best = likeliest(z, vocab)
        for i in range(vocab):
            p[i] = _ZERO
        p[best] = _ONE
        return best
    for i in range(vocab):
        z[i] /= temperature
    if not _has_finite_top(z, vocab):
        return -at.WILD_SETTINGS
    total = _filter(z, p, vocab, slot[at.TOP_K], settings)
    if drawing:
        return _invert(p, vocab, uniform(slot[at.SEED], slot[at.INDEX], slot[at.DRAWN]) * total)
    factor = f32(1.0 / total)
    for i in range(vocab):
        p[i] *= factor
    return 0
