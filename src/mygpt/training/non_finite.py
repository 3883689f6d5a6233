"""The guard against losses and gradients that are NaN or infinite; and the detection of spikes.

A step whose loss or gradient norm is not finite is not applied. Where several such steps follow
each other, the weights themselves are the cause: the trainer then returns to the last good state.
"""

from __future__ import annotations

import math

import torch

from mygpt.core.training import Gradients
from mygpt.training.optimizer import Optimizer
from mygpt.training.progress import Progress

SKIPS_BEFORE_ROLLBACK = 5
MOST_ROLLBACKS = 3  # to an earlier state, on account of the same step

# A loss is a spike when it is this many times the usual deviation above the usual loss, and at
# least this fraction of it. The losses of batches differ by about 3%; both were set on real runs.
_SPREADS, _SHARE = 8.0, 0.15
_MEMORY = 0.98  # the running means cover about 50 steps
READ_EVERY = 16  # steps between synchronisations with a device that runs asynchronously


class Diverging(Exception):
    """Training cannot continue from these weights; the message says why."""


class NonFiniteGuard:
    """Gradients and optimizer of `train_steps` in one: updates that are not finite are skipped.

    Args:
        gradients: computes losses and gradients.
        optimizer: makes the updates.
        device: of the model. CUDA runs asynchronously: there the update kernel itself skips what
            is not finite, and `read` fetches how many updates it skipped.
        progress: of the run; steps are counted in it, and how many in a row were skipped.

    Attributes:
        value: the last step's loss, or NaN or infinity where it was skipped; None where it has
            not been read from the device.
    """

    def __init__(
        self, gradients: Gradients, optimizer: Optimizer, device: torch.device, progress: Progress
    ) -> None:
        self.gradients = gradients
        self.optimizer = optimizer
        self.progress = progress
        self.value: float | None = None
        self.reads_every_step = device.type != "cuda"
        self._loss = self._norm = torch.zeros(())
        self._in_a_row = torch.zeros((), device=device)
        self._since_read = torch.zeros((), device=device)

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The batch's loss; its gradients are in place."""
        self._loss = self.gradients(inputs, targets)
        return self._loss

    def clip(self, max_norm: float) -> torch.Tensor:
        """Clip the gradients; their norm before that."""
        self._norm = self.gradients.clip(max_norm)
        return self._norm

    def step(self, lr: float) -> None:
        """Update the weights if loss and norm are finite; count the step."""
        self.progress.step += 1
        if not self.reads_every_step:
            skipped = (~torch.isfinite(self._loss + self._norm)).float()  # 0 or 1
            self.optimizer.step(lr, found_inf=skipped)
            self._in_a_row = (self._in_a_row + skipped) * skipped
            self._since_read = self._since_read + skipped
            return
        loss, norm = self._loss.item(), self._norm.item()
        self.value = norm if math.isfinite(loss) and not math.isfinite(norm) else loss
        if math.isfinite(self.value):
            self.optimizer.step(lr)
            self.progress.skipped = 0
        else:
            self.progress.skipped += 1

    def read(self) -> int:
        """Synchronise with a device that runs asynchronously; how many steps it has skipped."""
        if self.reads_every_step:
            return 0
        self.progress.skipped = int(self._in_a_row.item())
        since = int(self._since_read.item())
        self._since_read.zero_()
        return since

    def reset(self, progress: Progress) -> None:
        """Continue from a saved state."""
        self.progress = progress
        self._in_a_row.fill_(progress.skipped)
        self._since_read.zero_()

    def is_spike(self, loss: float) -> bool:
        """Whether `loss` is far above the usual one; updates the running means of the usual."""
        progress = self.progress
        if not math.isfinite(progress.usual_loss):
            progress.usual_loss, progress.usual_spread = loss, loss  # at first nothing is a spike
            return False
        usual, spread = progress.usual_loss, progress.usual_spread
        limit = usual + max(_SPREADS * spread, _SHARE * usual)
        known = min(loss, limit)  # one spike does not make the next one usual
        progress.usual_loss = _MEMORY * usual + (1.0 - _MEMORY) * known
        progress.usual_spread = _MEMORY * spread + (1.0 - _MEMORY) * abs(known - usual)
        return loss > limit
