"""The batches of a run, by stage and number, and the positions of their windows in the text.

Letters: B batch, T time.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.core.data import Batch, ShuffledWindows, random_batches
from mygpt.data.token_store import Tokens
from mygpt.errors import InputError
from mygpt.training.config import TrainConfig

_NEXT_SEED = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: multiples of it are far apart


class TrainingBatches:
    """The batches of a run, by stage and number.

    Args:
        tokens: 1-D ids to train on, in memory or in a store.
        config: its batch sizes, windows, seed and order of data.
        device: of the batches.
        share: (rank, processes): this process gets its share of the rows of each batch.

    Raises:
        InputError: for the tutorial's order with tokens in a store.
    """

    def __init__(
        self,
        tokens: Tokens,
        config: TrainConfig,
        device: torch.device,
        *,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.config = config
        self.device = device
        self.share = share
        self._tokens = tokens
        self._windows: list[ShuffledWindows] = []
        self._last: tuple[ShuffledWindows, int, int]  # batch: its windows, number and size
        if config.data_order == "tutorial":
            if not isinstance(tokens, np.ndarray):
                raise InputError(
                    "data order 'tutorial' needs all tokens in memory, and a store is on disk: "
                    "choose another preset, --preset nano say, or name the text itself"
                )
            seq_len, batch_size = config.window(0)
            ids = torch.from_numpy(tokens.astype(np.int64))
            self._drawn = random_batches(ids, batch_size, seq_len)
            return
        for stage in range(len(config.stages) + 1):
            # Each stage has its own order; the first has that of a run without stages.
            seed = (config.seed + stage * _NEXT_SEED) % 2**64
            self._windows.append(ShuffledWindows(tokens, config.window(stage)[0], seed))

    def batch(self, stage: int, number: int) -> Batch:
        """Inputs and targets, each (B, T) int64, of a stage's step number `number` (from 0).

        With several processes, B is this one's share: the batch as a whole is the same for
        any number of processes. The tutorial's order draws from torch's global generator and
        ignores the number.
        """
        if not self._windows:
            inputs, targets = next(self._drawn)
            return inputs.to(self.device), targets.to(self.device)
        windows, (_, batch_size) = self._windows[stage], self.config.window(stage)
        batch = torch.from_numpy(windows.batch(number, batch_size, self.share)).to(self.device)
        self._last = (windows, number, batch_size)
        return batch[:, :-1], batch[:, 1:]

    def first_window(self) -> NDArray[np.integer]:
        """The first T + 1 tokens of the text."""
        return self._tokens[: self.config.seq_len + 1]

    def starts(self) -> list[int]:
        """The position of the first token of each window of the last batch, in all processes.

        Empty for the tutorial's order.
        """
        if not self._windows:
            return []
        windows, number, batch_size = self._last
        return windows.starts(number, batch_size).tolist()
