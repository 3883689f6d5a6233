"""From one slot's logits to its next token: `mygpt.core.sampling` as machine code.

Order: repetition penalty, temperature, top-k, top-p, min-p, then the draw. Nothing is sorted: the
cut of top-k and of top-p is found by bisection over all float32 numbers in their order, which takes
32 passes over the vocabulary, whatever the logits are.
Letters: V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np

from mygpt.core.random import DRAW_TOKEN
from mygpt.cpu.common.arithmetic import exp, f32, largest_of
from mygpt.cpu.common.simd import (
    BYTES,
    FLOAT32,
    FLOAT64,
    FLOATS,
    INT32,
    INT64,
    INTS,
    REASSOCIATE,
    bits_of_float,
    kernel,
)
from mygpt.cpu.decode import layout as at

_ZERO, _ONE = f32(0), f32(1)
_EXCLUDED = f32(-math.inf)  # the logit of a token that a filter has removed
# `exp` clips at -87 (e**-87 = 1.6e-38); a token further below the largest gets probability 0.
_NEGLIGIBLE = f32(-87.0)
_SMALLEST, _LARGEST = np.int32(-(2**31)), np.int32(2**31 - 1)

# Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011, with the
# paper's two multipliers and two Weyl constants (the key's increments).
_MASK32 = np.uint64(0xFFFFFFFF)
_MULTIPLY_0, _MULTIPLY_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_32, _5, _6 = np.uint64(32), np.uint64(5), np.uint64(6)


@kernel(INT64, INT64, INT64, returns=FLOAT64)
def uniform(seed, index, step):
    """`Stream(seed, index).uniform(step)`, from 0 to below 1; see `mygpt.core.random`."""
    # The key is the seed; the counter's four words are step, index (low), purpose, index (high).
    key = np.uint64(seed)
    key_0, key_1 = key & _MASK32, key >> _32
    x0, x1 = np.uint64(step), np.uint64(index) & _MASK32
    x2, x3 = np.uint64(DRAW_TOKEN), np.uint64(index) >> _32
    for _ in range(10):
        # A round: two 32 x 32 -> 64 bit products, whose high halves are mixed with key and words.
        p0, p1 = _MULTIPLY_0 * x0, _MULTIPLY_1 * x2
        x0, x1 = (p1 >> _32) ^ x1 ^ key_0, p1 & _MASK32
        x2, x3 = (p0 >> _32) ^ x3 ^ key_1, p0 & _MASK32
        key_0, key_1 = (key_0 + _WEYL_0) & _MASK32, (key_1 + _WEYL_1) & _MASK32
    # 27 + 26 = 53 bits, a float64's precision: (high * 2**26 + low) / 2**53.
    high, low = np.float64(x0 >> _5), np.float64(x1 >> _6)
    return (high * 67108864.0 + low) / 9007199254740992.0


@kernel(FLOAT32, returns=INT32)
def _rank(value):
    """An int32 for each float32 such that larger numbers have larger ranks."""
    # The bits of positive floats, read as integers, are already in the floats' order; those of
    # negative ones have the sign bit and then run backwards, so all bits but the sign are inverted.
    if value == _ZERO:
        return np.int32(0)  # -0.0 and 0.0 are equal, so their ranks are
    bits = bits_of_float(value)
    return bits if bits >= np.int32(0) else np.int32(bits ^ _LARGEST)


@kernel(FLOATS, INT64, INT32, returns=INT64, extra=REASSOCIATE)
def _count_from(z, vocab, rank):
    """How many logits have at least this rank."""
    count = np.int64(0)
    for i in range(vocab):
        count += _rank(z[i]) >= rank
    return count


@kernel(FLOATS, FLOATS, INT64, INT32, returns=FLOAT64, extra=REASSOCIATE)
def _mass_above(p, z, vocab, rank):
    """The sum of the weights of all tokens with a higher rank, in float64."""
    mass = 0.0
    for i in range(vocab):
        mass += np.float64(p[i]) if _rank(z[i]) > rank else 0.0
    return mass


@kernel(INT32, INT32, returns=INT32)
def _middle(low, high):
    """ceil((low + high) / 2), added in 64 bits, where it cannot overflow."""
    return np.int32((np.int64(low) + np.int64(high) + np.int64(1)) >> np.int64(1))


@kernel(FLOATS, INT64, INT64)
def keep_top_k(z, vocab, k):
    """Keep exactly the k largest; of equal ones at the cut, those of lower ids."""
    # `_count_from` falls as the rank rises. The k-th largest logit has the highest rank with a
    # count of at least k. Invariant: count(low) >= k > count(high + 1).
    low, high = _SMALLEST, _LARGEST
    while low < high:
        middle = _middle(low, high)  # above low, so that each turn makes the range smaller
        if _count_from(z, vocab, middle) >= k:
            low = middle
        else:
            high = np.int32(middle - np.int32(1))
    # All above the cut stay, and of those at the cut as many as are missing to k.
    spare = k - _count_from(z, vocab, np.int32(low + np.int32(1)))
    for i in range(vocab):
        rank = _rank(z[i])
        if rank == low and spare > 0:
            spare -= 1
        elif rank <= low:
            z[i] = _EXCLUDED


@kernel(FLOATS, FLOATS, INT64, FLOAT32, returns=FLOAT64)
def _exponentiate(z, p, vocab, largest):
    """p = exp(z - largest), 0 where that is negligible; returns the sum of p in float64."""
    # p are weights: the probabilities times their sum. The sum runs in the order of ids, without
    # REASSOCIATE: a draw compares it with partial sums in the same order.
    total = 0.0
    for i in range(vocab):
        distance = z[i] - largest
        p[i] = exp(distance) if distance > _NEGLIGIBLE else _ZERO
    for i in range(vocab):
        total += np.float64(p[i])
    return total


@kernel(FLOATS, FLOATS, INT64, FLOAT32, FLOAT32)
def keep_top_p(z, p, vocab, largest, top_p):
    """Keep a token when the more probable ones before it sum to less than `top_p`."""
    # Nucleus sampling: Holtzman et al., "The curious case of neural text degeneration", 2019.
    goal = _exponentiate(z, p, vocab, largest) * np.float64(top_p)
    # The mass above a rank falls as the rank rises: find the lowest rank above which it is below
    # the goal. Tokens of a higher rank than that are kept, those of a lower one are not.
    low, high = _SMALLEST, _LARGEST
    while low < high:
        middle = np.int32(_middle(low, high) - np.int32(1))  # rounded down: below high
        if _mass_above(p, z, vocab, middle) < goal:
            high = middle
        else:
            low = np.int32(middle + np.int32(1))
    # Tokens at the cut are taken in the order of their ids, until their mass reaches the goal.
    before = _mass_above(p, z, vocab, low)
    for i in range(vocab):
        rank = _rank(z[i])
        if rank == low and before < goal:
            before += np.float64(p[i])
        elif rank <= low:
            z[i] = _EXCLUDED


@kernel(FLOATS, INT64, returns=INT64)
def argmax(z, vocab):
    """The id of the largest; the lowest id of several."""
    largest = largest_of(z, vocab)
    for i in range(vocab):
        if z[i] == largest:
            return i
    return 0


@kernel(FLOATS, FLOATS, INT64, INT64, FLOATS, returns=FLOAT64)
def _filter(z, p, vocab, top_k, settings):
    """Set logits that a filter removes to -inf, p to the weights; returns the sum of p."""
    largest = largest_of(z, vocab)
    if 0 < top_k < vocab:
        keep_top_k(z, vocab, top_k)
    if settings[at.TOP_P] < _ONE:
        keep_top_p(z, p, vocab, largest, settings[at.TOP_P])
    # min-p keeps p[i] >= min_p * max(p); in logits: z[i] >= max(z) + log(min_p).
    least = largest + settings[at.LOG_MIN_P]
    for i in range(vocab):
        if z[i] < least:
            z[i] = _EXCLUDED
    return _exponentiate(z, p, vocab, largest)


@kernel(FLOATS, INT64, FLOAT64, returns=INT64)
def _invert(p, vocab, target):
    """The first token at which the float64 sum of the weights exceeds `target`."""
    # Inverse transform sampling: with a uniform number u below 1 and target = u * (sum of p), token
    # i is drawn with probability p[i] / (sum of p).
    total, last = 0.0, 0
    for i in range(vocab):
        total += np.float64(p[i])
        if total > target:
            return i
        if p[i] > _ZERO:
            last = i
    # u * sum can round up to the sum itself: then it is the last token with any weight.
    return last


@kernel(FLOATS, INT64, returns=INT64)
def _has_finite_top(z, vocab):
    """Whether no logit is NaN and the largest is finite."""
    odd = np.int64(0)
    for i in range(vocab):
        odd += z[i] != z[i]  # true of NaN alone
    return odd == 0 and abs(largest_of(z, vocab)) < f32(math.inf)


@kernel(FLOATS, FLOATS, FLOATS, BYTES, INT64, INTS, FLOATS, INT64, returns=INT64)
def choose_token(logits, p, z, seen, vocab, slot, settings, drawing):
    """The next token's id, or minus the status that ends the slot.

    Args:
        logits: (V,) the model's; not changed.
        p: (V,) a buffer; afterwards the weights of the draw (summing to 1 when not drawing).
        z: (V,) a buffer.
        seen: (V,) int8 (see `layout`).
        vocab: V.
        slot: its int64 fields.
        settings: its float32 fields.
        drawing: whether to draw; else only `p` is wanted, and the returned id means nothing.
    """
    # NaN, or no finite logit at all: weights that are not finite. (-inf alone is a probability of
    # 0.)
    if not _has_finite_top(logits, vocab):
        return -at.BROKEN_MODEL
    penalty, temperature = settings[at.PENALTY], settings[at.TEMPERATURE]
    # Repetition penalty (Keskar et al., "CTRL", 2019): a token that occurred becomes less probable,
    # so a positive logit is divided and a negative one multiplied.
    for i in range(vocab):
        value = logits[i]
        if penalty != _ONE and seen[i] & at.OCCURRED:
            value = value * penalty if value < _ZERO else value / penalty
        z[i] = value
    if slot[at.GREEDY]:
        best = argmax(z, vocab)
        for i in range(vocab):
            p[i] = _ZERO
        p[best] = _ONE
        return best
    for i in range(vocab):
        z[i] /= temperature
    # The logits were finite: here it is temperature or penalty that made them overflow.
    if not _has_finite_top(z, vocab):
        return -at.OVERFLOWING_SETTINGS
    total = _filter(z, p, vocab, slot[at.TOP_K], settings)
    if drawing:
        return _invert(p, vocab, uniform(slot[at.SEED], slot[at.INDEX], slot[at.DRAWN]) * total)
    # The caller draws: give it probabilities.
    factor = f32(1.0 / total)
    for i in range(vocab):
        p[i] *= factor
    return 0
