"""The n-gram model's predictions that smooth a batch's targets, as machine code.

It computes what `mygpt.training.ngram_targets.NgramTargets.probabilities` computes, which is its
reference; the formulas and the arrays are explained there.
Letters: M positions, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from mygpt.cpu.common.arithmetic import f32, part_start
from mygpt.cpu.common.simd import FLOATS, INT64, INTS, floats, ints, kernel, skip, words
from mygpt.cpu.train import ngram_layout as at

_ZERO, _ONE = f32(0), f32(1)


@kernel(INTS, FLOATS, INT64, INT64, INT64, INT64)
def _next_order(level, probs, vocab, context, own, less):
    """probs (V,), the prediction of the order below, becomes that of this level.

    `less` is 1 where one occurrence of the token `own` is to be left out, else 0.
    """
    tokens, counts = words(level[at.FOLLOWERS]), words(level[at.COUNTS])
    discounts, starts = floats(level[at.DISCOUNTS]), words(level[at.STARTS])
    first, end = np.int64(starts[context]), np.int64(starts[context + 1])
    total, taken = np.int64(0), _ZERO
    for place in range(first, end):
        count = np.int64(counts[place]) - less * (np.int64(tokens[place]) == own)
        total += count
        taken += discounts[min(count, 3)]
    if total == 0:  # the context occurs nowhere else
        return
    share = _ONE / f32(total)
    scale = taken * share
    for token in range(vocab):
        probs[token] *= scale
    for place in range(first, end):
        follower = np.int64(tokens[place])
        count = np.int64(counts[place]) - less * (follower == own)
        probs[follower] += (f32(count) - discounts[min(count, 3)]) * share


@kernel(INT64, INT64, returns=INT64)
def predict_by_ngrams(job_address, part):
    """The rows of this part of OUT: the predictions of the tokens at POSITIONS."""
    job = ints(job_address)
    count, vocab, parts = job[at.COUNT], job[at.VOCAB], job[at.THREADS]
    positions, tokens, lowest = (
        ints(job[at.POSITIONS]),
        words(job[at.TOKENS]),
        words(job[at.LOWEST]),
    )
    uniform = _ONE / f32(vocab)
    for row in range(part_start(count, part, parts), part_start(count, part + 1, parts)):
        position, probs = positions[row], skip(floats(job[at.OUT]), row * vocab)
        for token in range(vocab):
            probs[token] = uniform
        for n in range(job[at.ORDER]):
            level = skip(ints(job[at.LEVELS]), n * at.LEVEL_SIZE)
            context = np.int64(words(level[at.CONTEXTS])[position])
            less = 1 if n + 1 >= np.int64(lowest[position]) else 0
            _next_order(level, probs, vocab, context, np.int64(tokens[position]), less)
    return 0
