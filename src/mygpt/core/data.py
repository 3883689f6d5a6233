"""Training data: the split for validation, and batches as a function of (seed, step).

A batch is some windows of the text: T tokens to read, and the same one position later to predict.
Letters: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mygpt.core.random import epoch_offset, permute
from mygpt.core.tutorial import get_batch
from mygpt.errors import InputError

_BLOCK = 2**14  # windows whose shuffled order is computed at once

Batch = tuple[Tensor, Tensor]  # inputs and targets, both (B, T) int64


class TokenRow(Protocol):
    """Token ids that need not be in memory: a store on disk, say."""

    def __len__(self) -> int: ...

    def cut(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Windows of `length` ids from each of `starts` (B,): (B, length) int64."""
        ...


def split_point(length: int, val_fraction: float) -> int:
    """Where a text of this length is cut in two: the last `val_fraction` of it is for validation.

    Training never sees that part, so its loss says how well the model does on new text.
    """
    return int(length * (1.0 - val_fraction))


def random_batches(data: Tensor, batch_size: int, seq_len: int) -> Iterator[Batch]:
    """The tutorial's batches of `data`, 1-D int64 ids: windows drawn by torch's generator."""
    while True:
        yield get_batch(data, batch_size, seq_len)


class ShuffledWindows:
    """Each epoch visits every window once, in a new order, with boundaries at a random offset.

    The batch of a step depends on the seed and the step alone: a resumed run continues with the
    batches that it would have had. A window is T + 1 tokens of the 1-D ids `tokens`, and
    neighbours share one. `InputError` for a corpus too short for one window.
    """

    def __init__(self, tokens: NDArray[np.integer] | TokenRow, seq_len: int, seed: int) -> None:
        self.tokens = tokens
        self.seq_len = seq_len
        self.seed = seed
        if len(tokens) < seq_len + 1:
            raise InputError(
                f"a corpus of {len(tokens)} tokens is too short for seq_len={seq_len}: "
                f"choose at most {len(tokens) - 1}"
            )
        # One window fewer than fit, so that the offset can reach the last token.
        self.windows = max(1, (len(tokens) - seq_len) // seq_len)
        self.offsets = len(tokens) - seq_len * self.windows
        self._reach = np.arange(seq_len + 1)
        self._block = (-1, -1)  # epoch and number of the block in `_order`
        self._order = np.empty(0, np.int64)

    def batch(
        self, step: int, batch_size: int, share: tuple[int, int] = (0, 1)
    ) -> NDArray[np.int64]:
        """The batch of step `step` (from 0): (B, T + 1) int64, inputs and targets together.

        With `share` (rank, processes), of its rows those of one process.
        """
        rank, processes = share
        first, end = rank * batch_size // processes, (rank + 1) * batch_size // processes
        return self._cut(self.starts(step, batch_size)[first:end])

    def _cut(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """The windows that begin there: (B, T + 1)."""
        if isinstance(self.tokens, np.ndarray):
            return self.tokens[starts[:, None] + self._reach].astype(np.int64)
        return self.tokens.cut(starts, self.seq_len + 1)

    def starts(self, step: int, batch_size: int) -> NDArray[np.int64]:
        """The position of the first token of each window of that batch: (B,)."""
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
        """The numbers of the windows at a block's places in an epoch's order."""
        if self._block != (epoch, block):
            places = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, self.windows))
            self._order = permute(places, self.windows, self.seed, epoch)
            self._block = (epoch, block)
        return self._order


def shuffled_batches(
    windows: ShuffledWindows, batch_size: int, first_step: int = 0
) -> Iterator[Batch]:
    """The batches of a run from step `first_step` (from 0) on, without end."""
    step = first_step
    while True:
        batch = torch.from_numpy(windows.batch(step, batch_size))  # (B, T + 1)
        yield batch[:, :-1], batch[:, 1:]
        step += 1
