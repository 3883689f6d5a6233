"""Which windows of the corpus make up each step's batch: a function of (seed, step).

Letters: B batch, T time.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mygpt.core.random import epoch_offset, permute
from mygpt.data.token_store import StoredTokens
from mygpt.errors import InputError

# A row of ids in memory, or in a store on disk, of which a slice is an array.
Tokens: TypeAlias = NDArray[np.integer] | StoredTokens

_BLOCK = 2**14  # windows whose places are reckoned at once


class ShuffledWindows:
    """Every window once an epoch, shuffled anew each time, the cuts moved by a random offset.

    Args:
        tokens: the corpus, 1-D ids in memory or in a store.
        seq_len: T; a window holds T + 1 tokens, and neighbours share one.
        seed: decides the order and the offsets.

    Raises:
        InputError: for a corpus too short for one window.
    """

    def __init__(self, tokens: Tokens, seq_len: int, seed: int) -> None:
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
        self._block = (-1, -1)  # the epoch and the number of the block at hand
        self._places = np.empty(0, np.int64)

    def batch(
        self, step: int, batch_size: int, share: tuple[int, int] = (0, 1)
    ) -> NDArray[np.int64]:
        """The batch of step `step` (from 0): (B, T + 1) int64, inputs and targets together.

        Args:
            step: from 0.
            batch_size: B.
            share: a process's number and how many there are: its rows alone are cut, which are
                those from number * B // all up to where the next one's begin.
        """
        number, processes = share
        first, end = number * batch_size // processes, (number + 1) * batch_size // processes
        return self._cut(self.starts(step, batch_size)[first:end])

    def _cut(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """The windows that begin there: (B, T + 1)."""
        if isinstance(self.tokens, StoredTokens):
            return self.tokens.cut(starts, self.seq_len + 1)
        return self.tokens[starts[:, None] + self._reach].astype(np.int64)

    def starts(self, step: int, batch_size: int) -> NDArray[np.int64]:
        """The first token of each window of that batch: (B,)."""
        numbers = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
        epochs, places = numbers // self.windows, numbers % self.windows
        starts = np.empty(batch_size, np.int64)
        blocks = places // _BLOCK
        for epoch, block in sorted(set(zip(epochs.tolist(), blocks.tolist(), strict=True))):
            here = (epochs == epoch) & (blocks == block)
            window = self._shuffled(epoch, block)[places[here] - block * _BLOCK]
            starts[here] = window * self.seq_len + epoch_offset(self.seed, epoch, self.offsets)
        return starts

    def _shuffled(self, epoch: int, block: int) -> NDArray[np.int64]:
        """The windows that stand in a block's places in an epoch's order."""
        if self._block != (epoch, block):
            places = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, self.windows))
            self._places = permute(places, self.windows, self.seed, epoch)
            self._block = (epoch, block)
        return self._places
