"""What simpler models reach on the same text: a loss means little without them.

Losses are nats per token. Letters: V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def uniform_loss(vocab_size: int) -> float:
    """The loss of guessing every token with probability 1/V."""
    return math.log(vocab_size)


def unigram_loss(train: NDArray[np.integer], test: NDArray[np.integer], vocab_size: int) -> float:
    """The loss on `test` of each token's frequency in `train`, one added to every count."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    logprobs = np.log(counts / counts.sum())  # (V,)
    return float(-logprobs[test].mean())
