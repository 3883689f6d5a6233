"""From one row of logits to its next token, in NumPy: `mygpt.core.sampling` without torch.

Order: repetition penalty, temperature, top-k, top-p, min-p, then the draw.
Letters: T time, V vocabulary. Logits are (V,) float32; a token that is filtered out has logit
-inf. Nothing is changed in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mygpt.core.config import SamplingConfig
from mygpt.core.random import Stream
from mygpt.errors import broken_model, overflowing_settings

Floats = NDArray[np.float32]
Float = TypeVar("Float", np.float32, np.float64)

_DROPPED = np.float32(-math.inf)


def penalize_repetition(logits: Floats, ids: Sequence[int], penalty: float) -> Floats:
    """Divide the positive and multiply the negative logits of the tokens in `ids`."""
    places = np.asarray(ids, dtype=np.int64)  # (T,)
    seen, factor = logits[places], np.float32(penalty)
    penalized = logits.copy()
    penalized[places] = np.where(seen < 0, seen * factor, seen / factor)
    return penalized


def keep_top_k(logits: Floats, k: int) -> Floats:
    """Keep exactly the k largest logits; of equal ones, those of lower ids."""
    if k >= len(logits):
        return logits
    smallest_kept = np.partition(logits, -k)[-k]
    kept = logits > smallest_kept
    ties = np.flatnonzero(logits == smallest_kept)
    kept[ties[: k - np.count_nonzero(kept)]] = True
    return np.where(kept, logits, _DROPPED)


def keep_top_p(logits: Floats, p: float) -> Floats:
    """Keep the smallest set of likeliest tokens whose probability reaches p (nucleus).

    A token stays when those before it, likeliest first and lower ids before equal ones, have
    not reached p yet; the likeliest always stays.
    """
    order = np.argsort(-logits, kind="stable")
    probs = softmax(logits[order].astype(np.float64))
    dropped = np.cumsum(probs) - probs >= p  # never the first: 0 >= p
    kept = logits.copy()
    kept[order[dropped]] = _DROPPED
    return kept


def keep_min_p(logits: Floats, min_p: float) -> Floats:
    """Keep tokens with at least `min_p` times the probability of the likeliest."""
    least = logits.max() + np.float32(math.log(min_p))
    return np.where(logits < least, _DROPPED, logits)


def filter_logits(logits: Floats, sampling: SamplingConfig, ids: Sequence[int]) -> Floats:
    """Logits (V,) after penalty, temperature and filters; `ids` (T,) is all text so far.

    The temperature must be above 0: argmax has no logits to show (see `SamplingConfig.greedy`).
    """
    logits = _after_penalty(logits, sampling, ids)
    if sampling.temperature != 1.0:
        logits = logits / np.float32(sampling.temperature)
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def probabilities(logits: Floats, sampling: SamplingConfig, ids: Sequence[int]) -> Floats:
    """The distribution (V,) the next token is drawn from; one-hot when the draw is argmax."""
    if not sampling.greedy:
        return softmax(filter_logits(logits, sampling, ids))
    one_hot = np.zeros_like(logits)
    one_hot[argmax(logits, sampling, ids)] = 1.0
    return one_hot


def argmax(logits: Floats, sampling: SamplingConfig, ids: Sequence[int]) -> int:
    """The likeliest token after the penalty; of equals the lowest id."""
    return int(_after_penalty(logits, sampling, ids).argmax())


def _after_penalty(logits: Floats, sampling: SamplingConfig, ids: Sequence[int]) -> Floats:
    penalty = sampling.repetition_penalty
    if penalty is None or penalty == 1.0:
        return logits
    return penalize_repetition(logits, ids, penalty)


def softmax(logits: NDArray[Float]) -> NDArray[Float]:
    """Probabilities of logits (V,), in their own precision."""
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def draw(probs: Floats, uniform: float) -> int:
    """Invert the cumulative distribution at a uniform number in [0, 1).

    Sums are float64 in the order of ids. A token of probability 0 is never drawn: a uniform
    number is at most 1 - 2**-53, whose product with the total rounds to less than the total.
    """
    cumulative = np.cumsum(probs, dtype=np.float64)  # (V,)
    return int(cumulative.searchsorted(uniform * cumulative[-1], side="right"))


def next_id(
    logits: Floats, sampling: SamplingConfig, ids: Sequence[int], stream: Stream, step: int
) -> int:
    """Draw one row's next token.

    Args:
        logits: (V,) float32, the model's prediction after `ids`.
        sampling: how to draw.
        ids: (T,), all text so far.
        stream: the row's random numbers.
        step: how many of its tokens were drawn before.

    Raises:
        InputError: when a broken model predicts no numbers, or the settings overflow.
    """
    if not math.isfinite(logits.max()):
        raise broken_model()
    # An overflow is seen in the sum, below; NumPy's warning says less.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if sampling.greedy:
            return argmax(logits, sampling, ids)
        probs = probabilities(logits, sampling, ids)
    if not math.isfinite(probs.sum()):
        raise overflowing_settings(sampling.temperature, sampling.repetition_penalty)
    return draw(probs, stream.uniform(step))
