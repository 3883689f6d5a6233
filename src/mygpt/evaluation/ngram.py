"""Losses of n-gram models, which predict a token from the n - 1 tokens before it.

The model is interpolated modified Kneser-Ney (Chen & Goodman, "An empirical study of smoothing
techniques for language modeling", 1998). Every n-gram gets an id, so that the pair of an n-gram's
id and the next token fits 64 bits for any vocabulary; one sort per order counts all n-grams.

Losses are nats per token. Letters: V vocabulary, N tokens of both texts, M tokens of the test text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError

# Longer texts are cut, so that the baselines take at most about 2 seconds and 250 MB.
MOST_TRAIN_TOKENS = 2**21  # the last tokens of the training text
MOST_TEST_TOKENS = 2**17  # the first tokens of the test text
_PIECE = 2**20  # tokens that are counted at once
_LEAST_DISCOUNT, _MOST_DISCOUNT = 0.05, 0.95  # per unit of the count; see `discounts_of`

Ints = NDArray[np.integer]
Floats = NDArray[np.float64]


def uniform_loss(vocab_size: int) -> float:
    """The loss of predicting every token with probability 1/V."""
    return math.log(vocab_size)


def unigram_loss(train: Ints, test: Ints, vocab_size: int) -> float:
    """The loss on `test` of the token frequencies of `train`, with add-one smoothing."""
    counts = _counts(train, vocab_size) + 1.0
    logprobs = np.log(counts / counts.sum())  # (V,)
    return float(-(logprobs @ _counts(test, vocab_size)) / len(test))


def _counts(tokens: Ints, vocab_size: int) -> NDArray[np.int64]:
    """How often each token occurs: (V,)."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), _PIECE):  # bincount makes an int64 copy of its input
        counts += np.bincount(tokens[start : start + _PIECE], minlength=vocab_size)
    return counts


def ngram_losses(train: Ints, test: Ints, vocab_size: int, orders: Sequence[int]) -> list[float]:
    """The losses on `test` of the n-gram models of `train`; that of order 1 is `unigram_loss`.

    Only the last `MOST_TRAIN_TOKENS` of `train` are used, and only the first `MOST_TEST_TOKENS` of
    `test` are predicted. The first tokens of `test` have the last ones of `train` as their context.

    Args:
        train: 1-D ids of the training text.
        test: 1-D ids of the test text, at least one.
        vocab_size: V.
        orders: each n, at least 1; a token is predicted from the n - 1 before it.

    Raises:
        InputError: for an empty test text, or an order below 1.
    """
    train, test = train[max(0, len(train) - MOST_TRAIN_TOKENS) :], test[:MOST_TEST_TOKENS]
    if not len(test) or min(orders) < 1:
        raise InputError(
            f"n-gram models of orders {list(orders)} on {len(test)} tokens: "
            "give orders of at least 1 and at least one token to predict"
        )
    grams = grams_of(train, test, vocab_size, max(orders)) if max(orders) > 1 else []
    return [
        unigram_loss(train, test, vocab_size)
        if order == 1
        else float(-np.log(probabilities_of(grams, len(train), vocab_size, order)).mean())
        for order in orders
    ]


@dataclass(frozen=True)
class _Grams:
    """The n-grams of one order in a sequence of N tokens."""

    ids: NDArray[np.int32]  # (N,), of the n-gram that ends at each position
    num_ids: int  # how many different n-grams there are
    contexts: NDArray[np.int32]  # (N,), the id of the (n-1)-gram before each position
    num_contexts: int  # how many different contexts there are
    firsts: NDArray[np.int32]  # where in the training text each of its n-grams first ends


def grams_of(train: Ints, test: Ints, vocab_size: int, order: int) -> list[_Grams]:
    """The n-grams of orders 1 to `order` of the training text followed by the test text."""
    tokens = np.concatenate([train, test]).astype(np.int64)  # (N,)
    found: list[_Grams] = []
    contexts, num_contexts = np.zeros(len(tokens), np.int32), 1
    for _ in range(order):
        ids, num_ids, firsts = _unique_ids(contexts * np.int64(vocab_size) + tokens)
        found.append(_Grams(ids, num_ids, contexts, num_contexts, firsts[firsts < len(train)]))
        # The first position of the text, with nothing before it, gets a context id of its own.
        contexts, num_contexts = np.append(np.int32(num_ids), ids[:-1]), num_ids + 1
    return found


def _unique_ids(keys: NDArray[np.int64]) -> tuple[NDArray[np.int32], int, NDArray[np.int32]]:
    """Each key's rank among the different keys, how many these are, and each one's first index.

    As `np.unique` with `return_inverse` and `return_index`, but faster.
    """
    bits = len(keys).bit_length()
    if int(keys.max()).bit_length() + bits <= 63:  # key and index in one word sort much faster
        words = (keys << bits) | np.arange(len(keys))
        words.sort()
        order = (words & ((1 << bits) - 1)).astype(np.int32)
        words >>= bits
    else:
        order = keys.argsort(kind="stable").astype(np.int32)
        words = keys[order]
    new = np.append(True, words[1:] != words[:-1])
    ids = np.empty(len(keys), np.int32)
    ids[order] = np.cumsum(new, dtype=np.int32) - 1
    firsts = order[new]
    return ids, len(firsts), firsts


def probabilities_of(grams: list[_Grams], train_tokens: int, vocab_size: int, order: int) -> Floats:
    """The probability of each token after the first `train_tokens` by the model of `order`, (M,).

    From order 1 up, with w the token, h its context and h' the context without its first token:

        P(w | h) = (c(hw) - D(c(hw)) + G(h) P(w | h')) / c(h),  G(h) = sum of D(c(hv)) over v

    so that what the discounts D take off the counts, G(h) in all, goes to the lower order. Counts
    c of the highest order are occurrences; those of lower orders are continuation counts: the
    number of different tokens after which the n-gram occurs.
    """
    probs = np.full(len(grams[0].ids) - train_tokens, 1.0 / vocab_size)
    for n in range(1, order + 1):
        level = grams[n - 1]
        counted = slice(0, train_tokens) if n == order else grams[n].firsts
        counts = np.bincount(level.ids[counted], minlength=level.num_ids)  # c(hw)
        totals = np.bincount(level.contexts[counted], minlength=level.num_contexts)  # c(h)
        discounts = discounts_of(counts[level.ids[level.firsts]])  # (4,)
        discounted = np.bincount(  # G(h)
            level.contexts[level.firsts],
            discounts[np.minimum(counts[level.ids[level.firsts]], 3)],
            minlength=level.num_contexts,
        )
        count, context = counts[level.ids[train_tokens:]], level.contexts[train_tokens:]  # (M,)
        total = totals[context]
        kept = count - discounts[np.minimum(count, 3)]
        smoothed = (kept + discounted[context] * probs) / np.maximum(total, 1)
        # For a context that does not occur in the training text, the lower order is used.
        probs = np.where(total > 0, smoothed, probs)
    return probs


def discounts_of(counts: NDArray[np.int64]) -> Floats:
    """The discounts D of counts 0, 1, 2 and 3 or more: (4,).

    D_i = i - (i + 1) Y n_{i+1} / n_i with Y = n_1 / (n_1 + 2 n_2), where n_i is how many n-grams
    have count i (Chen & Goodman, equation 26). Clipped away from 0, where a token that does not
    occur in the training text would have probability 0, and from i.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(float)
    discounts = np.array([0.0, 0.5, 0.5, 0.5])
    if n[1] and n[2]:
        y = n[1] / (n[1] + 2 * n[2])
        for i in (1, 2, 3):
            if n[i]:
                discounts[i] = i - (i + 1) * y * n[i + 1] / n[i]
    count = np.arange(4)
    return np.clip(discounts, _LEAST_DISCOUNT * count, _MOST_DISCOUNT * count)
