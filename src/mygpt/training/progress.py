"""How far a run has come, what decided the learning rate of each of its steps, and its batches.

In a run by `--minutes` the rate follows the clock, and a run may be lengthened or rolled back:
with the log of its steps it can be replayed exactly.
Letters: B batch, T time.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.core.config import GPTConfig
from mygpt.core.data import Batch, ShuffledWindows, random_batches
from mygpt.data.token_store import Tokens
from mygpt.errors import InputError
from mygpt.training.config import TrainConfig

Arrays = dict[str, NDArray[Any]]

_KEYS = {"skipped": "left_out"}  # where a field has another name in state files


@dataclass
class Progress:
    """How far a run has come; all of it is saved with every state."""

    step: int = 0  # steps made, including those whose update was skipped
    elapsed_s: float = 0.0  # seconds of training in all sessions
    loss: float = math.nan  # of the last reported batch, nats per token
    best_val_loss: float = math.inf  # the lowest validation loss so far
    best_step: int = 0  # where that was
    validated_step: int = 0  # the last step that was validated
    # Steps in a row whose update was skipped, since its loss or norm was not finite.
    skipped: int = 0
    lr_scale: float = 1.0  # factor of the learning rate; each rollback halves it
    tries: int = 0  # rollbacks since the run last passed `trouble_step`
    trouble_step: int = 0  # the step at which the last rollback was necessary
    worse: int = 0  # validations in a row that were far above the best
    usual_loss: float = math.nan  # running mean of the batches' losses; NaN before the first
    usual_spread: float = 0.0  # running mean of their distance from it
    # The weight that the n-gram model would get beside the network at the last validation, and the
    # most of a training target that it predicts until the next one; NaN where it does not.
    ngram_share: float = math.nan
    log_bytes: int = 0  # length of the log when this state was saved

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, without those that are not finite yet."""
        return {_KEYS.get(n, n): value for n, value in vars(self).items() if math.isfinite(value)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """What `to_dict` gave; `InputError` for anything else."""
        known = {_KEYS.get(field.name, field.name): field for field in fields(cls)}
        found: dict[str, Any] = {}
        for key, value in values.items():
            fractional = key in known and known[key].type == "float"
            whole = type(value) is int and 0 <= value < 2**53
            number = type(value) is float and math.isfinite(value)
            if key not in known or not (whole or (number and fractional)):
                raise InputError(f"progress {key}={value!r:.40} is not of this version")
            found[known[key].name] = float(value) if fractional else value
        return cls(**found)


class StepLog:
    """The fraction of the run that was done before each step, and the scale of its rate.

    Args:
        config: the run's length.
        given: (steps, 2) float64, the log of a run that is replayed; None for a new run.
    """

    def __init__(self, config: TrainConfig, given: NDArray[np.float64] | None = None) -> None:
        self.config = config
        self.given = given
        self._entries = array("d")
        self._steps_in = [0] * len(config.windows)

    def done(self, progress: Progress) -> float:
        """The fraction that is done now, in [0, 1]; 1 is the end."""
        if self.given is not None:
            return float(self.given[progress.step, 0]) if progress.step < len(self.given) else 1.0
        return self.config.fraction_done(progress.step, progress.elapsed_s)

    def next_batch(self, done: float) -> tuple[int, int]:
        """The stage of the next step, and the number of steps in that stage before it."""
        stage = self.config.stage(done)
        return stage, self._steps_in[stage]

    def crossed(self, fractions: Sequence[float]) -> bool:
        """Whether the last step is the first at or after one of these fractions of the run."""
        now = self._entries[-2]
        before = self._entries[-4] if len(self._entries) > 2 else -1.0
        return any(before < fraction <= now for fraction in fractions)

    def append(self, done: float, progress: Progress) -> float:
        """Record what decides this step's rate; returns the scale of the rate."""
        self._steps_in[self.config.stage(done)] += 1
        scale = progress.lr_scale if self.given is None else float(self.given[progress.step, 1])
        self._entries.extend((done, scale))
        return scale

    def remaining_s(self, progress: Progress, steps_per_s: float) -> float:
        """Estimated seconds to the end."""
        if self.given is not None:
            return max(0, len(self.given) - progress.step) / steps_per_s
        if self.config.minutes is not None:
            end = 60.0 * self.config.minutes - self.config.reserve_s
            return max(0.0, end - progress.elapsed_s)
        return ((self.config.total_steps or 0) - progress.step) / steps_per_s

    def arrays(self) -> Arrays:
        """The log as a state keeps it."""
        kept: Arrays = {"plan": np.array(self._entries).reshape(-1, 2)}
        return kept if self.given is None else {**kept, "given_plan": self.given}

    def restore(self, arrays: Arrays, step: int) -> None:
        """Take over the log of a state at step `step`."""
        entries = arrays.get("plan", np.empty((0, 2)))
        self._entries = array("d", entries[:step].reshape(-1).tolist())
        self._steps_in = [0] * len(self.config.windows)
        if len(entries) < step:  # written by an old version, without this log and without stages
            self._steps_in[0] = step
        else:
            starts = [start for start, _, _ in self.config.stages]
            stages = np.searchsorted(starts, entries[:step, 0], side="right")
            self._steps_in = np.bincount(stages, minlength=len(starts) + 1).tolist()

    @property
    def window(self) -> int:
        """The longest window of the steps so far; before the first step the first stage's."""
        pairs = zip(self._steps_in, self.config.windows, strict=True)
        return max((t for steps, (t, _) in pairs if steps), default=self.config.seq_len)

    def as_trained(self, shape: GPTConfig) -> GPTConfig:
        """A model's shape with the longest window it has been trained on so far.

        Without stages, or with learned positions, the shape does not change.
        """
        if not self.config.stages or shape.position != "rotary":
            return shape
        return replace(shape, max_seq_len=min(shape.max_seq_len, self.window))

    @property
    def tokens(self) -> int:
        """How many tokens the steps so far were trained on."""
        pairs = zip(self._steps_in, self.config.windows, strict=True)
        return sum(steps * seq_len * batch_size for steps, (seq_len, batch_size) in pairs)


SEEDS_APART = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: multiples of it are far apart


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
        for stage, (seq_len, _) in enumerate(config.windows):
            # Each stage has its own order; the first has that of a run without stages.
            seed = (config.seed + stage * SEEDS_APART) % 2**64
            self._windows.append(ShuffledWindows(tokens, seq_len, seed))

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

    def target_positions(self) -> NDArray[np.int64]:
        """Where the targets of the last batch are in the text, (B, T); of this process's rows."""
        windows, number, batch_size = self._last
        rank, processes = self.share
        first, end = rank * batch_size // processes, (rank + 1) * batch_size // processes
        starts = windows.starts(number, batch_size)[first:end]
        return starts[:, None] + np.arange(1, windows.seq_len + 1)

    def starts(self) -> list[int]:
        """The position of the first token of each window of the last batch, in all processes.

        Empty for the tutorial's order.
        """
        if not self._windows:
            return []
        windows, number, batch_size = self._last
        return windows.starts(number, batch_size).tolist()
