"""How much of a run is done at each step, and the record of it.

In a run by `--minutes` the learning rate follows the clock, and a run may be lengthened or go
back. What decided each step's rate is kept, so that the run can be made again exactly.
"""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from mygpt.training.config import TrainConfig
from mygpt.training.schedule import progress
from mygpt.training.state import Arrays, Course


class Plan:
    """The share of the run that is done, by step.

    Args:
        config: the run's length.
        given: (steps, 2) float64, the plan of a run that is made again; None for a new one.
    """

    def __init__(self, config: TrainConfig, given: NDArray[np.float64] | None = None) -> None:
        self.config = config
        self.given = given
        self._noted = array("d")

    def done(self, course: Course) -> float:
        """The share that is done now, in [0, 1]; 1 is the end."""
        if self.given is not None:
            return float(self.given[course.step, 0]) if course.step < len(self.given) else 1.0
        return progress(self.config, course.step, course.elapsed_s)

    def note(self, done: float, course: Course) -> float:
        """Keep what decides this step's rate; return the scale of the rate."""
        scale = course.lr_scale if self.given is None else float(self.given[course.step, 1])
        self._noted.extend((done, scale))
        return scale

    def remaining_s(self, course: Course, steps_a_second: float) -> float:
        """Seconds to the end."""
        if self.given is not None:
            return max(0, len(self.given) - course.step) / steps_a_second
        if self.config.minutes is not None:
            return max(0.0, 60.0 * self.config.minutes - course.elapsed_s)
        return ((self.config.total_steps or 0) - course.step) / steps_a_second

    def arrays(self) -> Arrays:
        """What a state keeps of it."""
        kept: Arrays = {"plan": np.array(self._noted).reshape(-1, 2)}
        return kept if self.given is None else {**kept, "given_plan": self.given}

    def restore(self, arrays: Arrays, step: int) -> None:
        """Go back to what a state kept, at step `step`."""
        noted = arrays.get("plan", np.empty((0, 2)))
        self._noted = array("d", noted[:step].reshape(-1).tolist())
