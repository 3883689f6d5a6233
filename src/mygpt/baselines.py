"""What simpler models reach on the same text: a loss means little without them.

Losses are nats per token. Letters: V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_PIECE = 2**20


def uniform_loss(vocab_size: int) -> float:
    """The loss of guessing every token with probability 1/V."""
    return math.log(vocab_size)


def unigram_loss(train: NDArray[np.integer], test: NDArray[np.integer], vocab_size: int) -> float:
    """The loss on `test` of each token's frequency in `train`, one added to every count."""
    counts = token_counts(train, vocab_size) + 1.0
    logprobs = np.log(counts / counts.sum())  # (V,)
    return float(-(logprobs @ token_counts(test, vocab_size)) / len(test))


def token_counts(tokens: NDArray[np.integer], vocab_size: int) -> NDArray[np.int64]:
    """How often each token occurs: (V,)."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), _PIECE):  # NumPy makes a wide copy of what it counts
        counts += np.bincount(tokens[start : start + _PIECE], minlength=vocab_size)
    return counts
