"""What each step learns from: its batch, and where in the text that was cut.

Letters: B batch, T time.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.data import ShuffledWindows
from mygpt.training.config import TrainConfig
from mygpt.tutorial import get_batch

_NEXT_SEED = 0x9E3779B97F4A7C15  # the golden ratio's


class Feed:
    """The batches of a run, by stage and number.

    Args:
        tokens: 1-D ids to learn from.
        config: its batch sizes, windows, seed and order of data.
        device: where batches go.
    """

    def __init__(
        self, tokens: NDArray[np.integer], config: TrainConfig, device: torch.device
    ) -> None:
        self.config = config
        self.device = device
        self._tokens = tokens
        self._windows: list[ShuffledWindows] = []
        self._place: tuple[ShuffledWindows, int, int]
        if config.data_order == "tutorial":
            self._all = torch.from_numpy(tokens.astype(np.int64))
            return
        for stage in range(len(config.stages) + 1):
            # Each stage shuffles in its own way; the first as a run without stages does.
            seed = (config.seed + stage * _NEXT_SEED) % 2**64
            self._windows.append(ShuffledWindows(tokens, config.window(stage)[0], seed))

    def batch(self, stage: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, each (B, T) int64, of a stage's step number `number` (from 0).

        The tutorial's order draws them from torch's global generator, whatever the number.
        """
        seq_len, batch_size = self.config.window(stage)
        if not self._windows:
            inputs, targets = get_batch(self._all, batch_size, seq_len)
            return inputs.to(self.device), targets.to(self.device)
        windows = self._windows[stage]
        batch = torch.from_numpy(windows.batch(number, batch_size)).to(self.device)
        self._place = (windows, number, batch_size)
        return batch[:, :-1], batch[:, 1:]

    def first_window(self) -> NDArray[np.integer]:
        """The first T + 1 tokens of the text."""
        return self._tokens[: self.config.seq_len + 1]

    def starts(self) -> list[int]:
        """The first token of each window of the last batch; empty where no record is kept."""
        if not self._windows:
            return []
        windows, number, batch_size = self._place
        return windows.starts(number, batch_size).tolist()
