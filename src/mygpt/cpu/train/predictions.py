"""The n-gram predictions of a batch's targets, by kernels in threads.

Letters: M positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.cpu.common.build import TRAINING, load_library
from mygpt.cpu.common.workers import run_on_threads
from mygpt.cpu.train import ngram_layout as at


class NgramPredictions:
    """Computes what an n-gram model predicts at some positions of its text.

    Args:
        tokens: the text's ids, (N,) uint32.
        lowest: (N,) uint32, the lowest order at which a token's own occurrence counts.
        levels: of each order from 1 up: contexts, starts, tokens, counts (uint32 each), discounts
            (float32); see `mygpt.training.ngram_targets.Level`.
        vocab_size: V.
        threads: how many divide the positions.
    """

    def __init__(
        self,
        tokens: NDArray[np.uint32],
        lowest: NDArray[np.uint32],
        levels: list[tuple[NDArray[Any], ...]],
        vocab_size: int,
        threads: int,
    ) -> None:
        self._kernel = load_library(TRAINING)["predict_by_ngrams"]
        table = np.array([[array.ctypes.data for array in level] for level in levels], np.int64)
        self._alive = tokens, lowest, levels, table  # the job has their addresses only
        self._vocab_size, self._threads = vocab_size, threads
        self._job = np.zeros(at.JOB_SIZE, np.int64)
        for place, value in (
            (at.TOKENS, tokens.ctypes.data),
            (at.LOWEST, lowest.ctypes.data),
            (at.LEVELS, table.ctypes.data),
            (at.VOCAB, vocab_size),
            (at.ORDER, len(levels)),
            (at.THREADS, threads),
        ):
            self._job[place] = value

    def __call__(self, positions: NDArray[np.int64]) -> torch.Tensor:
        """The predictions of the tokens at `positions` (M,), each from those before it: (M, V)."""
        places = np.ascontiguousarray(positions, np.int64)
        found = torch.empty(len(places), self._vocab_size)
        job = self._job
        job[at.POSITIONS], job[at.OUT] = places.ctypes.data, found.data_ptr()
        job[at.COUNT] = len(places)
        run_on_threads(self._kernel, int(job.ctypes.data), self._threads)
        return found
