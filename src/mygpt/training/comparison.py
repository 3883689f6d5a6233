"""Compares the logs of two runs: did the second reproduce the first?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from mygpt.errors import InputError
from mygpt.training.history import read_log

_KINDS = ("loss", "val_loss")
# Nats per token by which losses may differ if hardware adds in another order.
CLOSE = 0.02


@dataclass(frozen=True)
class Comparison:
    """What two logs have in common.

    Attributes:
        compared: the number of losses that both logs have at the same step.
        equal: how many of them are bitwise the same.
        largest: the largest difference, nats per token; NaN if nothing was compared.
        step: its step.
        finals: of both, the last validation loss that they have in common (the last training
            loss if there is none).
    """

    compared: int
    equal: int
    largest: float
    step: int
    finals: tuple[float, float]

    @property
    def same(self) -> bool:
        """Whether all losses are bitwise the same."""
        return 0 < self.compared == self.equal

    @property
    def close(self) -> bool:
        """Whether the runs ended with nearly the same loss."""
        return self.compared > 0 and abs(self.finals[0] - self.finals[1]) <= CLOSE

    def __str__(self) -> str:
        if not self.compared:
            return "the two logs have no step in common: nothing could be compared"
        before, after = self.finals
        ends = f"the last loss was {before:.4f} and is {after:.4f}"
        if self.same:
            return f"reproduced: all {self.compared:,} losses are the same to the bit; {ends}"
        details = (
            f"{self.equal:,} of {self.compared:,} losses are the same to the bit, the largest "
            f"difference is {self.largest:.2g} at step {self.step:,}; {ends}"
        )
        if self.close:
            return f"reproduced, but for rounding: {details}"
        return f"NOT reproduced: {details}"


Losses = dict[tuple[int, str], float]


def compare_losses(one: Losses, other: Losses) -> Comparison:
    """Compare the losses of two logs."""
    common = [place for place in one if place in other]
    apart = [(abs(one[place] - other[place]), place[0]) for place in common]
    largest, step = max(apart, default=(math.nan, 0))
    return Comparison(
        len(common),
        sum(one[place] == other[place] for place in common),
        largest,
        step,
        (_final({p: one[p] for p in common}), _final({p: other[p] for p in common})),
    )


def read_losses(log: Path) -> Losses:
    """A log's losses by (step, kind), without steps that were rolled back.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        history = read_log(log)
    except OSError as error:
        raise InputError(f"{log} cannot be read: {error.strerror}; its losses are lost") from None
    found = {(report.step, "loss"): report.loss for report in history.reports}
    return found | {(seen.step, "val_loss"): seen.val_loss for seen in history.validations}


def _final(losses: Losses) -> float:
    for kind in reversed(_KINDS):
        steps = [step for step, own in losses if own == kind]
        if steps:
            return losses[max(steps), kind]
    return math.nan
