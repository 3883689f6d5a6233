"""Which windows of the corpus make up each step's batch: a function of (seed, step).

Letters: B batch, T time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError
from mygpt.randomness import epoch_offset, permute


class ShuffledWindows:
    """Every window once an epoch, shuffled anew each time, the cuts moved by a random offset.

    Args:
        tokens: the corpus, 1-D ids.
        seq_len: T; a window holds T + 1 tokens, and neighbours share one.
        seed: decides the order and the offsets.

    Raises:
        InputError: for a corpus too short for one window.
    """

    def __init__(self, tokens: NDArray[np.integer], seq_len: int, seed: int) -> None:
        self.tokens = tokens
        self.seq_len = seq_len
        self.seed = seed
        if len(tokens) < seq_len + 1:
            raise InputError(
                f"a corpus of {len(tokens)} tokens is too short for seq_len={seq_len}: "
                f"choose at most {len(tokens) - 1}"
            )
        # One window fewer than fit leaves room for the offset, which reaches the last token.
        self.windows = max(1, (len(tokens) - seq_len) // seq_len)
        self.offsets = len(tokens) - seq_len * self.windows
        self._reach = np.arange(seq_len + 1)

    def batch(self, step: int, batch_size: int) -> NDArray[np.int64]:
        """The batch of step `step` (from 0): (B, T + 1) int64, inputs and targets together."""
        starts = self.starts(step, batch_size)
        return self.tokens[starts[:, None] + self._reach].astype(np.int64)

    def starts(self, step: int, batch_size: int) -> NDArray[np.int64]:
        """The first token of each window of that batch: (B,)."""
        numbers = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
        epochs, places = numbers // self.windows, numbers % self.windows
        starts = np.empty(batch_size, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            window = permute(places[here], self.windows, self.seed, epoch)
            starts[here] = window * self.seq_len + epoch_offset(self.seed, epoch, self.offsets)
        return starts
