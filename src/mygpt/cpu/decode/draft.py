"""Drafts: a guess at the next tokens of a text, which the model then checks all at once.

A guess needs no pass of the model. It comes from the counts of an n-gram model, and from the text
itself: where its last tokens occurred before, what followed them then may follow again. It is drawn
from the guessed distribution with the filters, the settings and the random number with which the
model's own token will be drawn; so the two are often equal.
The counts are `mygpt.decode.draft_table.DraftTable`, whose `probabilities` computes what `_predict`
does.
Letters: V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np

from mygpt.cpu.common.arithmetic import PLACE, f32, hash32
from mygpt.cpu.common.simd import (
    FLOAT32,
    FLOATS,
    INT64,
    INTS,
    UINT32,
    bits_of_float,
    float_of_bits,
    floats,
    int8s,
    ints,
    kernel,
    skip,
    words,
)
from mygpt.cpu.decode import layout as at
from mygpt.cpu.decode.sample import choose_token

_ZERO, _ONE, _TWO, _LN2 = f32(0), f32(1), f32(2), f32(math.log(2))
_THIRD, _FIFTH, _SEVENTH = f32(1 / 3), f32(1 / 5), f32(1 / 7)
_23, _BIAS = np.int32(23), np.int32(127)
_MANTISSA, _EXPONENT_OF_1 = np.int32((1 << 23) - 1), np.int32(127 << 23)
_NEXT = np.uint32(1)
_8, _255 = np.uint32(8), np.uint32(255)


@kernel(UINT32, INT64, returns=UINT32)
def _key_with(key, token):
    """The key of a context from that of the context without its first token, `token`."""
    return hash32(np.uint32(np.uint32(key * PLACE) + np.uint32(token) + _NEXT))


@kernel(INTS, UINT32, returns=INT64)
def _context_of(table, key):
    """The number of the context with this key; -1 if the table does not have it."""
    # Keys are sorted, and `BUCKETS` says where those begin that have the same upper bits: the
    # hash spreads keys evenly, so there are one or two.
    keys, buckets = words(table[at.KEYS_OF_CONTEXTS]), words(table[at.BUCKETS])
    bucket = np.int64(key) >> table[at.SHIFT]
    for place in range(np.int64(buckets[bucket]), np.int64(buckets[bucket + 1])):
        if keys[place] == key:
            return place
    return -1


@kernel(INTS, INTS, INT64, INT64, FLOATS)
def _predict(table, text, length, vocab, probs):
    """probs (V,) = the n-gram model's prediction after the first `length` tokens of `text`."""
    starts, followers = words(table[at.CONTEXT_STARTS]), words(table[at.FOLLOWERS])
    for token in range(vocab):
        probs[token] = _ONE / f32(vocab)
    key = np.uint32(0)
    for n in range(min(table[at.ORDER], length + 1)):
        if n > 0:
            key = _key_with(key, text[length - n])
        context = _context_of(table, key)
        if context >= 0:
            # A follower is a word: its token, and in the lowest 8 bits its count.
            discounts = skip(floats(table[at.DISCOUNTS]), 4 * n)
            first, end = np.int64(starts[context]), np.int64(starts[context + 1])
            total, taken = np.int64(0), _ZERO
            for place in range(first, end):
                count = np.int64(followers[place] & _255)
                total += count
                taken += discounts[min(count, 3)]
            share = _ONE / f32(total)
            scale = taken * share
            for token in range(vocab):
                probs[token] *= scale
            for place in range(first, end):
                count = np.int64(followers[place] & _255)
                follower = np.int64(followers[place] >> _8)
                probs[follower] += (f32(count) - discounts[min(count, 3)]) * share


@kernel(FLOAT32, returns=FLOAT32)
def _log(x):
    """ln x of a positive normal number, within about 1e-5; of 0 a large negative number."""
    # x = 2**n m with m from 1 to 2, and ln m = 2 artanh((m - 1) / (m + 1)).
    bits = bits_of_float(x)
    exponent = f32((bits >> _23) - _BIAS)
    m = float_of_bits(np.int32((bits & _MANTISSA) | _EXPONENT_OF_1))
    s = (m - _ONE) / (m + _ONE)
    square = s * s
    series = _ONE + square * (_THIRD + square * (_FIFTH + square * _SEVENTH))
    return exponent * _LN2 + _TWO * s * series


@kernel(INTS, INT64, INT64, returns=UINT32)
def _key_of_last(text, end, count):
    """The key of the `count` tokens before `end`."""
    key = np.uint32(0)
    for n in range(1, count + 1):
        key = _key_with(key, text[end - n])
    return key


@kernel(INTS, INT64, INTS, INTS)
def index_text(job, number, slot, text):
    """Note for each new token of a slot's text which tokens are before it."""
    # RECENT[key] is the last place before which the MATCH tokens with this key are; 0 is none. Two
    # keys may share a place, so a match is compared token by token.
    recent = skip(ints(job[at.RECENT]), number * at.RECENT_SIZE)
    for place in range(max(slot[at.INDEXED], job[at.MATCH]), slot[at.LENGTH]):
        key = _key_of_last(text, place, job[at.MATCH])
        recent[np.int64(key) % at.RECENT_SIZE] = place
    slot[at.INDEXED] = slot[at.LENGTH]


@kernel(INTS, INT64, INTS, INT64, returns=INT64)
def _earlier(job, number, text, length):
    """The place where the text's last MATCH tokens occurred before; 0 for none."""
    match = job[at.MATCH]
    if length < match:
        return 0
    recent = skip(ints(job[at.RECENT]), number * at.RECENT_SIZE)
    return recent[np.int64(_key_of_last(text, length, match)) % at.RECENT_SIZE]


@kernel(INTS, INT64, INT64, returns=INT64)
def _common_length(text, one, other):
    """How many tokens before two places are equal, at most LONGEST_MATCH."""
    count = np.int64(0)
    while count < min(one, at.LONGEST_MATCH) and text[one - 1 - count] == text[other - 1 - count]:
        count += 1
    return count


@kernel(INTS, INT64, INTS, INTS, INT64, returns=INT64)
def _guess(job, number, slot, text, ahead):
    """The token after a slot's text and `ahead` drafts that follow it; -1 for no idea."""
    vocab, length = job[at.VOCAB], slot[at.LENGTH] + ahead
    place = _earlier(job, number, text, length)
    matched = _common_length(text, place, length) if place > 0 else 0
    copied = text[place] if matched >= job[at.MATCH] else -1
    if job[at.NGRAMS] == 0:
        return copied
    probs = floats(job[at.GUESS])
    _predict(ints(job[at.NGRAMS]), text, length, vocab, probs)
    if copied >= 0:
        # The longer the match, the likelier the copy: half at HALF_MATCH tokens.
        square = f32(matched * matched)
        share = square / (square + f32(job[at.HALF_MATCH] * job[at.HALF_MATCH]))
        for token in range(vocab):
            probs[token] *= _ONE - share
        probs[copied] += share
    for token in range(vocab):
        probs[token] = _log(probs[token])
    # The random number is that of the step in which the model's own token will be drawn.
    slot[at.DRAWN] += ahead
    token = choose_token(
        probs, skip(floats(job[at.PROBABILITIES]), number * job[at.VOCAB_STRIDE]),
        floats(job[at.SCRATCH]), skip(int8s(job[at.SEEN]), number * vocab), vocab, slot,
        skip(floats(job[at.SETTINGS]), number * at.SETTINGS_SIZE), 1,
    )  # fmt: skip
    slot[at.DRAWN] -= ahead
    return max(token, -1)


@kernel(INTS, INT64, INTS, INTS, INT64, returns=INT64)
def write_drafts(job, number, slot, text, most):
    """Write up to `most` drafts behind a slot's text, and return their number."""
    index_text(job, number, slot, text)
    for ahead in range(most):
        token = _guess(job, number, slot, text, ahead)
        if token < 0:
            return ahead
        text[slot[at.LENGTH] + ahead] = token
    return most
