"""How much of a run is done at each step, and the record of it.

In a run by `--minutes` the learning rate follows the clock, and a run may be lengthened or go
back. What decided each step's rate is kept, so that the run can be made again exactly.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mygpt.core.config import GPTConfig
from mygpt.training.config import TrainConfig
from mygpt.training.state import Arrays, Progress


class StepLog:
    """The share of the run that is done, by step.

    Args:
        config: the run's length.
        given: (steps, 2) float64, the plan of a run that is made again; None for a new one.
    """

    def __init__(self, config: TrainConfig, given: NDArray[np.float64] | None = None) -> None:
        self.config = config
        self.given = given
        self._noted = array("d")
        self._steps_in = [0] * (len(config.stages) + 1)

    def done(self, progress: Progress) -> float:
        """The share that is done now, in [0, 1]; 1 is the end."""
        if self.given is not None:
            return float(self.given[progress.step, 0]) if progress.step < len(self.given) else 1.0
        return self.config.fraction_done(progress.step, progress.elapsed_s)

    def next_batch(self, done: float) -> tuple[int, int]:
        """The stage of the next step, and how many steps that stage has had."""
        stage = self.config.stage(done)
        return stage, self._steps_in[stage]

    def crossed(self, shares: Sequence[float]) -> bool:
        """Whether the last step is the first at or past one of these shares of the run."""
        now = self._noted[-2]
        before = self._noted[-4] if len(self._noted) > 2 else -1.0
        return any(before < share <= now for share in shares)

    def note(self, done: float, progress: Progress) -> float:
        """Keep what decides this step's rate; return the scale of the rate."""
        self._steps_in[self.config.stage(done)] += 1
        scale = progress.lr_scale if self.given is None else float(self.given[progress.step, 1])
        self._noted.extend((done, scale))
        return scale

    def remaining_s(self, progress: Progress, steps_a_second: float) -> float:
        """Seconds to the end."""
        if self.given is not None:
            return max(0, len(self.given) - progress.step) / steps_a_second
        if self.config.minutes is not None:
            end = 60.0 * self.config.minutes - self.config.reserve_s
            return max(0.0, end - progress.elapsed_s)
        return ((self.config.total_steps or 0) - progress.step) / steps_a_second

    def arrays(self) -> Arrays:
        """What a state keeps of it."""
        kept: Arrays = {"plan": np.array(self._noted).reshape(-1, 2)}
        return kept if self.given is None else {**kept, "given_plan": self.given}

    def restore(self, arrays: Arrays, step: int) -> None:
        """Go back to what a state kept, at step `step`."""
        noted = arrays.get("plan", np.empty((0, 2)))
        self._noted = array("d", noted[:step].reshape(-1).tolist())
        self._steps_in = [0] * (len(self.config.stages) + 1)
        if len(noted) < step:  # a file of a version that kept no plan, and had no stages
            self._steps_in[0] = step
        else:
            shares = [share for share, _, _ in self.config.stages]
            stages = np.searchsorted(shares, noted[:step, 0], side="right")
            self._steps_in = np.bincount(stages, minlength=len(shares) + 1).tolist()

    @property
    def window(self) -> int:
        """The longest window that steps so far were made on; the first stage's before any."""
        stages = [stage for stage, steps in enumerate(self._steps_in) if steps]
        return max((self.config.window(stage)[0] for stage in stages), default=self.config.seq_len)

    def as_trained(self, shape: GPTConfig) -> GPTConfig:
        """A model's shape with the window of the stages so far: it cannot look further back yet.

        Without stages, or where positions are weights, that is the shape as it is.
        """
        if not self.config.stages or shape.position != "rotary":
            return shape
        return replace(shape, max_seq_len=min(shape.max_seq_len, self.window))

    @property
    def tokens(self) -> int:
        """How many tokens the steps so far have read."""
        windows = [self.config.window(stage) for stage in range(len(self._steps_in))]
        return sum(n * t * b for n, (t, b) in zip(self._steps_in, windows, strict=True))
