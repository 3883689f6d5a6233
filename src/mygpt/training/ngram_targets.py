"""Training targets that an n-gram model of the training text smooths.

A target is usually one token, with probability 1. Smoothed, it is a distribution: that token with
probability 1 - s, and with s the prediction of an n-gram model which has not seen this token. So
the network learns from every position which other tokens were likely there, and is not rewarded
for memorising a text that it reads many times. It is label smoothing (Szegedy et al., 2016) with
an n-gram model in the place of the uniform distribution, and the network stays an ordinary one.

The model is Kneser-Ney's, counted as in `mygpt.evaluation.ngram`. "Has not seen this token" is
exact (leave one out): from all counts the one occurrence that is to be predicted is subtracted.
Letters: N tokens of the text, V vocabulary, M positions, h a context (the tokens before).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mygpt.data.token_store import Tokens
from mygpt.errors import InputError
from mygpt.evaluation.ngram import MOST_TEST_TOKENS, discounts_of, grams_of, probabilities_of

ORDER = 6  # a token is predicted from the ORDER - 1 before it
MOST_TOKENS = 2**23  # of the text, so that the counts fit in memory
MOST_VOCABULARY = 512  # of larger ones the distributions would take longer than the network
_PASSAGE, _MOST_COMPARED = 16, 2**20  # tokens
_HASH_BASE = np.uint64(0x9E3779B97F4A7C15)
_ITERATIONS = 30  # of a weight: the error is then far below its sampling error
# Bytes per token of the text, at most: of each order a context and a follower (see `Level`), and
# the index of the text.
BYTES_PER_TOKEN = ORDER * (4 + 4 + 8) + 12


def check_smoothing(tokens: Tokens, vocab_size: int, data_order: str) -> None:
    """Raise `InputError` for a run whose targets cannot be smoothed."""
    why = ""
    if data_order == "tutorial":
        why = "the tutorial's order of data does not say where its windows are in the text"
    elif not isinstance(tokens, np.ndarray):
        why = "a token store is not read into memory"
    elif vocab_size > MOST_VOCABULARY:
        why = (
            f"the vocabulary has {vocab_size:,} tokens, and at most {MOST_VOCABULARY} are possible"
        )
    elif len(tokens) > MOST_TOKENS:
        why = f"the text has {len(tokens):,} tokens, and at most {MOST_TOKENS:,} are possible"
    if why:
        raise InputError(f"ngram_smoothing: {why}; remove it, or choose 0")


@dataclass(frozen=True)
class Level:
    """The n-grams of one order, by their contexts.

    The followers of context c, the tokens that occur after it, are at `starts[c]` to
    `starts[c + 1]` of `tokens` and `counts`:

        contexts  (N,)                      position -> c
        starts    | 0 | ... | c | c+1 | ... |
                            |      |
        tokens    ... | t   t'  t" | ...              each occurs once a context
        counts    ... | n   n'  n" | ...
    """

    contexts: NDArray[np.uint32]  # (N,), the context before each position
    starts: NDArray[np.uint32]  # (contexts + 1,)
    tokens: NDArray[np.uint32]  # (n-grams,)
    # (n-grams,): of the highest order occurrences, of lower ones the number of different tokens
    # that occur before the n-gram
    counts: NDArray[np.uint32]
    discounts: NDArray[np.float32]  # (4,), of counts 0, 1, 2, and 3 or more


class NgramTargets:
    """The predictions of an n-gram model that leaves the predicted token out.

    Args:
        tokens: 1-D ids of the training text.
        vocab_size: V.
        validation: 1-D ids of the validation text.
        order: the n of the model.

    Attributes:
        tokens: the ids, (N,) uint32.
        validated: (M,) float64, the probability of each of the first tokens of the validation text.
        levels: one for each order from 1 up.
        lowest: (N,) uint32, the lowest order at which the token's own occurrence counts. The
            highest order counts occurrences. A lower order counts different n-grams of the next
            order: one occurrence matters to it only if that n-gram occurs nowhere else.
    """

    def __init__(
        self,
        tokens: NDArray[np.integer],
        vocab_size: int,
        *,
        validation: NDArray[np.integer] | None = None,
        order: int = ORDER,
    ) -> None:
        self.vocab_size = vocab_size
        self.tokens = np.ascontiguousarray(tokens, np.uint32)
        validated = tokens[:0] if validation is None else validation[:MOST_TEST_TOKENS]
        grams = grams_of(tokens, validated, vocab_size, order)
        self.validated = probabilities_of(grams, len(tokens), vocab_size, order)
        here = slice(len(tokens))
        self.levels: list[Level] = []
        self.lowest = np.full(len(tokens), order, np.uint32)
        alone = np.ones(len(tokens), bool)  # whether all n-grams above occur only here
        for n in range(order, 0, -1):
            gram = grams[n - 1]
            counted = here if n == order else grams[n].firsts
            counts = np.bincount(gram.ids[counted], minlength=gram.num_ids)
            self.lowest[alone] = n
            alone &= counts[gram.ids[here]] == 1
            contexts = gram.contexts[gram.firsts]  # of each n-gram
            by_context = contexts.argsort(kind="stable")
            starts = np.searchsorted(contexts[by_context], np.arange(gram.num_contexts + 1))
            listed = counts[gram.ids[gram.firsts]][by_context]
            self.levels.append(
                Level(
                    gram.contexts[here].astype(np.uint32),
                    starts.astype(np.uint32),
                    self.tokens[gram.firsts][by_context],
                    listed.astype(np.uint32),
                    discounts_of(listed).astype(np.float32),
                )
            )
        self.levels.reverse()

    def probabilities(self, positions: NDArray[np.integer]) -> NDArray[np.float32]:
        """The prediction of the token at each of `positions` (M,) from those before it: (M, V).

        From order 1 up, with the formula of `mygpt.evaluation.ngram`:

            P(v | h) = (c(hv) - D(c(hv)) + G(h) P(v | h')) / c(h),  G(h) = sum of D(c(hv)) over v
        """
        count = len(positions)
        own = self.tokens[positions]
        probs = np.full((count, self.vocab_size), 1.0 / self.vocab_size, np.float32)
        for n, level in enumerate(self.levels, 1):
            contexts = level.contexts[positions]
            starts = level.starts[contexts].astype(np.int64)
            lengths = level.starts[contexts + 1] - starts
            ends = lengths.cumsum()
            rows = np.repeat(np.arange(count), lengths)  # of each follower of each position
            places = np.arange(len(rows)) + np.repeat(starts - (ends - lengths), lengths)
            tokens, counts = level.tokens[places], level.counts[places].astype(np.int64)
            counts -= (tokens == own[rows]) & (n >= self.lowest[positions])[rows]
            taken = level.discounts[np.minimum(counts, 3)]  # 0 for a count of 0
            total = np.bincount(rows, counts, count)
            known = total > 0  # for other contexts the lower order is used
            scale = np.bincount(rows, taken, count) / np.maximum(total, 1.0)
            probs[known] *= scale[known, None].astype(np.float32)
            # A token is listed once for a context, so no (row, token) occurs twice.
            kept = (counts - taken) / np.maximum(total, 1.0)[rows]
            probs[rows, tokens] += np.where(known[rows], kept, 0.0).astype(np.float32)
        return probs

    def weight_beside(self, losses: NDArray[np.floating]) -> float:
        """The weight w that this model gets in the best mixture with a network, from 0 to 1.

        The mixture w P(ngram) + (1 - w) P(network) that predicts the validation text best, found by
        expectation maximisation (Jelinek & Mercer, 1980). It measures what the n-gram model knows
        of new text that the network does not.

        Args:
            losses: the network's loss of each validation token but the first, in their order.
        """
        count = min(len(losses), len(self.validated) - 1)
        ours = self.validated[1 : count + 1]
        theirs = np.exp(-losses[:count].astype(np.float64))
        weight = 0.5
        for _ in range(_ITERATIONS if count > 0 else 0):
            mixed = weight * ours
            weight = float((mixed / (mixed + (1.0 - weight) * theirs)).mean())
        return weight


def repeated_fraction(train: NDArray[np.integer], validation: NDArray[np.integer]) -> float:
    """The fraction of a validation text that is in passages which the training text has too.

    A passage is `_PASSAGE` tokens or more. Of long texts the last tokens of the first and the first
    ones of the second are compared.
    """
    train, validation = train[-_MOST_COMPARED:], validation[: _MOST_COMPARED // 8]
    if min(len(train), len(validation)) < _PASSAGE:
        return 0.0
    known, wanted = np.sort(_hashes(train)), _hashes(validation)
    places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    again = known[places] == wanted
    # A token is in a passage if one of the last `_PASSAGE` passages that could begin has begun.
    begun = np.append(0, np.cumsum(np.append(again, np.zeros(_PASSAGE - 1, int))))
    earlier = np.maximum(0, np.arange(1, len(validation) + 1) - _PASSAGE)
    return float((begun[1:] > begun[earlier]).mean())


def _hashes(tokens: NDArray[np.integer]) -> NDArray[np.uint64]:
    """A hash of the `_PASSAGE` tokens from each position on: a polynomial modulo 2**64."""
    count = len(tokens) - _PASSAGE + 1
    found = np.zeros(count, np.uint64)
    for place in range(_PASSAGE):
        found = found * _HASH_BASE + tokens[place : place + count].astype(np.uint64) + np.uint64(1)
    return found
