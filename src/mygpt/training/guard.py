"""What stands between a bad step and the weights: updates left out, jumps of the loss noticed.

A step whose loss or gradient is no finite number is not applied. Where several follow each
other, the weights themselves are at fault: the trainer then goes back to the last good state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from mygpt.training.optimizer import Optimizer
from mygpt.training.state import Course

LEFT_OUT_BEFORE_GOING_BACK = 5
TRIES = 3  # times to go back to before the same place of trouble

# A loss is a spike when it lies this many times the usual distance above the usual loss, and
# at least this share of it. Batches of text differ by 3% or so; both were set on real runs.
_SPREADS, _SHARE = 8.0, 0.15
_MEMORY = 0.98  # the running means look back over about 50 steps
READ_EVERY = 16  # steps between looks at a device that would have to be waited for


class BlowUp(Exception):
    """Training that does not go on from here; the message says why."""


class Guard:
    """Applies updates, or leaves them out.

    Args:
        optimizer: whose updates they are.
        device: where; what it computes is read after each step on a CPU only.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        self.reads_every_step = device.type != "cuda"
        self._in_a_row = torch.zeros((), device=device)
        self._since_read = torch.zeros((), device=device)

    def apply(self, course: Course, loss: torch.Tensor, norm: torch.Tensor) -> float | None:
        """Update the weights if `loss` and the gradient's `norm` (scalars) are finite.

        Returns the loss, as far as it is known: NaN or infinite where the step was left out,
        None where the device was not waited for (`read` does).
        """
        if not self.reads_every_step:
            bad = (~torch.isfinite(loss + norm)).float()
            self.optimizer.found_inf = bad
            self.optimizer.step()
            self._in_a_row = (self._in_a_row + bad) * bad
            self._since_read = self._since_read + bad
            return None
        value, size = loss.item(), norm.item()
        if math.isfinite(value) and math.isfinite(size):
            self.optimizer.step()
            course.left_out = 0
            return value
        course.left_out += 1
        return value if not math.isfinite(value) else size

    def read(self, course: Course) -> int:
        """Wait for the device, where that was not done; how many steps it has left out."""
        if self.reads_every_step:
            return 0
        course.left_out = int(self._in_a_row.item())
        since = int(self._since_read.item())
        self._since_read.zero_()
        return since

    def reset(self, course: Course) -> None:
        """Go back to what a state knew."""
        self._in_a_row.fill_(course.left_out)
        self._since_read.zero_()

    @staticmethod
    def spikes(course: Course, loss: float) -> bool:
        """Whether `loss` jumps out of the usual; it becomes part of what is usual."""
        if not math.isfinite(course.usual_loss):
            course.usual_loss, course.usual_spread = loss, loss  # nothing is a spike at first
            return False
        usual, spread = course.usual_loss, course.usual_spread
        limit = usual + max(_SPREADS * spread, _SHARE * usual)
        known = min(loss, limit)  # one spike does not make the next one usual
        course.usual_loss = _MEMORY * usual + (1.0 - _MEMORY) * known
        course.usual_spread = _MEMORY * spread + (1.0 - _MEMORY) * abs(known - usual)
        return loss > limit


def largest(arrays: Iterable[torch.Tensor]) -> float:
    """The largest magnitude in all of them; NaN where one is none."""
    sizes = [array.detach().abs().max() for array in arrays if array.numel()]
    return float(torch.stack(sizes).max().item()) if sizes else 0.0
