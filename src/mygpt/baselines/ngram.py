"""What n-gram models reach on a text: the next token from the one to four before it.

The model is modified Kneser-Ney, interpolated (Chen & Goodman, "An empirical study of smoothing
techniques for language modeling", 1998). Every n-gram gets a number (its rank), so that any
vocabulary packs into 64 bits; one sort a level counts them all.

Losses are nats per token. Letters: V vocabulary, N tokens learned and scored, M tokens scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError

# Longer texts are cut to these: a second or two, and some 250 MB, are what a baseline may cost.
MOST_LEARNED = 2**21  # tokens, the last of the text learned from
MOST_SCORED = 2**17  # tokens, the first of the text scored
_PIECE = 2**20
_LEAST_DISCOUNT, _MOST_DISCOUNT = 0.05, 0.95  # shares of a count; see `_discounts`

Ints = NDArray[np.integer]
Floats = NDArray[np.float64]


def uniform_loss(vocab_size: int) -> float:
    """The loss of guessing every token with probability 1/V."""
    return math.log(vocab_size)


def unigram_loss(train: Ints, test: Ints, vocab_size: int) -> float:
    """The loss on `test` of each token's frequency in `train`, one added to every count."""
    counts = token_counts(train, vocab_size) + 1.0
    logprobs = np.log(counts / counts.sum())  # (V,)
    return float(-(logprobs @ token_counts(test, vocab_size)) / len(test))


def token_counts(tokens: Ints, vocab_size: int) -> NDArray[np.int64]:
    """How often each token occurs: (V,)."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), _PIECE):  # NumPy makes a wide copy of what it counts
        counts += np.bincount(tokens[start : start + _PIECE], minlength=vocab_size)
    return counts


def ngram_loss(
    train: Ints,
    test: Ints,
    vocab_size: int,
    order: int,
    *,
    most_learned: int = MOST_LEARNED,
    most_scored: int = MOST_SCORED,
) -> float:
    """The loss on `test` of the n-gram model of `train`; of order 1 it is `unigram_loss`.

    Args:
        train: 1-D ids to learn from; of more than `most_learned` tokens the last ones count.
        test: 1-D ids to score, at least one; of more than `most_scored` the first ones count.
        vocab_size: V.
        order: n, at least 1; a token is predicted from the n - 1 before it.
        most_learned: tokens.
        most_scored: tokens.

    Raises:
        InputError: for no token to score, or an order below 1.
    """
    return ngram_losses(
        train, test, vocab_size, [order], most_learned=most_learned, most_scored=most_scored
    )[0]


def ngram_losses(
    train: Ints,
    test: Ints,
    vocab_size: int,
    orders: Sequence[int],
    *,
    most_learned: int = MOST_LEARNED,
    most_scored: int = MOST_SCORED,
) -> list[float]:
    """`ngram_loss` for each of `orders`, with the counting done once."""
    train = train[max(0, len(train) - most_learned) :]
    test = test[:most_scored]
    if not len(test) or min(orders) < 1:
        raise InputError(
            f"n-gram models of orders {list(orders)} on {len(test)} tokens: "
            "give orders from 1 and at least one token to score"
        )
    grams = _grams(train, test, vocab_size, max(orders)) if max(orders) > 1 else []
    return [
        unigram_loss(train, test, vocab_size)
        if order == 1
        else float(-np.log(_probabilities(grams, len(train), vocab_size, order)).mean())
        for order in orders
    ]


def ngram_probabilities(train: Ints, test: Ints, vocab_size: int, order: int) -> Floats:
    """The probability of each token of `test`, (M,): `train` and the tokens before it known.

    The test text is taken to go on where the training text ends.
    """
    grams = _grams(train, test, vocab_size, order)
    return _probabilities(grams, len(train), vocab_size, order)


@dataclass(frozen=True)
class _Grams:
    """The n-grams of one length in a row of tokens, numbered.

    Attributes:
        rank: (N,), the number of the n-gram that ends at each place.
        kinds: how many there are.
        context: (N,), the number of the (n-1)-gram before each place's token.
        contexts: how many there are.
        firsts: where each kind that was learned ends for the first time.
    """

    rank: NDArray[np.int32]
    kinds: int
    context: NDArray[np.int32]
    contexts: int
    firsts: NDArray[np.int32]


def _grams(train: Ints, test: Ints, vocab_size: int, order: int) -> list[_Grams]:
    """The n-grams of lengths 1 to `order` of both texts in a row."""
    row = np.concatenate([train, test]).astype(np.int64)  # (N,)
    found: list[_Grams] = []
    context, contexts = np.zeros(len(row), np.int32), 1
    for _ in range(order):
        rank, kinds, firsts = _number(context * np.int64(vocab_size) + row)
        found.append(_Grams(rank, kinds, context, contexts, firsts[firsts < len(train)]))
        # A number of its own for the text's beginning, where there is less before a token.
        context, contexts = np.append(np.int32(kinds), rank[:-1]), kinds + 1
    return found


def _number(keys: NDArray[np.int64]) -> tuple[NDArray[np.int32], int, NDArray[np.int32]]:
    """Number equal keys alike: each one's number, how many kinds, each kind's first place."""
    bits = len(keys).bit_length()
    if int(keys.max()).bit_length() + bits <= 63:  # key and place in one word sort much faster
        words = (keys << bits) | np.arange(len(keys))
        words.sort()
        places = (words & ((1 << bits) - 1)).astype(np.int32)
        words >>= bits
    else:
        places = keys.argsort(kind="stable").astype(np.int32)
        words = keys[places]
    new = np.append(True, words[1:] != words[:-1])
    numbers = np.empty(len(keys), np.int32)
    numbers[places] = np.cumsum(new, dtype=np.int32) - 1
    firsts = places[new]
    return numbers, len(firsts), firsts


def _probabilities(grams: list[_Grams], learned: int, vocab_size: int, order: int) -> Floats:
    """What the model of `order` gives each token after the first `learned`: (M,).

    From the bottom up: P(w | h) = (c(hw) - D(c)) / c(h) + the mass so freed * P(w | shorter h).
    The longest n-grams count how often they occur, the others after how many different tokens.
    """
    probs = np.full(len(grams[0].rank) - learned, 1.0 / vocab_size)
    for n in range(1, order + 1):
        here = grams[n - 1]
        seen = slice(0, learned) if n == order else grams[n].firsts
        counts = np.bincount(here.rank[seen], minlength=here.kinds)
        totals = np.bincount(here.context[seen], minlength=here.contexts)
        discounts = _discounts(counts[here.rank[here.firsts]])  # (4,)
        freed = np.bincount(
            here.context[here.firsts],
            discounts[np.minimum(counts[here.rank[here.firsts]], 3)],
            minlength=here.contexts,
        )
        count, context = counts[here.rank[learned:]], here.context[learned:]  # (M,)
        total = totals[context]
        kept = count - discounts[np.minimum(count, 3)]
        # A context that was never seen says nothing: the shorter one's word holds.
        probs = np.where(total > 0, (kept + freed[context] * probs) / np.maximum(total, 1), probs)
    return probs


def _discounts(counts: NDArray[np.int64]) -> Floats:
    """What is taken off a count of 0, 1, 2 and 3 or more: (4,).

    From how many n-grams have counts 1 to 4 (Chen & Goodman, equation 26), kept off the ends:
    with nothing taken off, a token never seen would be impossible.
    """
    kinds = np.bincount(np.minimum(counts, 5), minlength=6).astype(float)
    discounts = np.array([0.0, 0.5, 0.5, 0.5])
    if kinds[1] and kinds[2]:
        share = kinds[1] / (kinds[1] + 2 * kinds[2])
        for n in (1, 2, 3):
            if kinds[n]:
                discounts[n] = n - (n + 1) * share * kinds[n + 1] / kinds[n]
    size = np.arange(4)
    return np.clip(discounts, _LEAST_DISCOUNT * size, _MOST_DISCOUNT * size)
