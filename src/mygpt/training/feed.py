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


class Feed:
    """The batches of a run, by step.

    Args:
        tokens: 1-D ids to learn from.
        config: its batch size, window, seed and order of data.
        device: where batches go.
    """

    def __init__(
        self, tokens: NDArray[np.integer], config: TrainConfig, device: torch.device
    ) -> None:
        self.config = config
        self.device = device
        self._windows: ShuffledWindows | None = None
        self._tokens = tokens
        if config.data_order == "tutorial":
            self._all = torch.from_numpy(tokens.astype(np.int64))
        else:
            self._windows = ShuffledWindows(tokens, config.seq_len, config.seed)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, each (B, T) int64, of step number `step` (from 0).

        The tutorial's order draws them from torch's global generator, whatever the number.
        """
        batch_size, seq_len = self.config.batch_size, self.config.seq_len
        if self._windows is None:
            inputs, targets = get_batch(self._all, batch_size, seq_len)
            return inputs.to(self.device), targets.to(self.device)
        batch = torch.from_numpy(self._windows.batch(step, batch_size)).to(self.device)
        return batch[:, :-1], batch[:, 1:]

    def first_window(self) -> NDArray[np.integer]:
        """The first T + 1 tokens of the text."""
        return self._tokens[: self.config.seq_len + 1]

    def starts(self, step: int) -> list[int]:
        """The first token of each of its windows; empty where the order keeps no record."""
        if self._windows is None:
            return []
        return self._windows.starts(step, self.config.batch_size).tolist()
