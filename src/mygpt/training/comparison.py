"""Two runs' logs side by side: did the second come out as the first?"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

from mygpt.errors import InputError
from mygpt.json_objects import read_records, step_of

_KINDS = ("loss", "val_loss")
# Nats per token by which a loss may differ where other hardware adds in another order.
CLOSE = 0.02


@dataclass(frozen=True)
class Comparison:
    """What two logs have in common.

    Attributes:
        compared: losses that both tell of at the same step.
        equal: how many of them are the same to the last bit.
        largest: the largest difference, nats per token; NaN where nothing was compared.
        step: where that was.
        finals: of both, the last validation loss that they have in common (of the last batch
            where there is none).
    """

    compared: int
    equal: int
    largest: float
    step: int
    finals: tuple[float, float]

    @property
    def same(self) -> bool:
        """Whether every loss is the same to the last bit."""
        return 0 < self.compared == self.equal

    @property
    def close(self) -> bool:
        """Whether the runs ended alike."""
        return self.compared > 0 and abs(self.finals[0] - self.finals[1]) <= CLOSE

    def __str__(self) -> str:
        if not self.compared:
            return "the two logs tell of no step in common: nothing could be compared"
        before, after = self.finals
        ends = f"the last loss was {before:.4f} and is {after:.4f}"
        if self.same:
            return f"reproduced: all {self.compared:,} losses are the same to the bit; {ends}"
        told = (
            f"{self.equal:,} of {self.compared:,} losses are the same to the bit, the largest "
            f"difference is {self.largest:.2g} at step {self.step:,}; {ends}"
        )
        return f"reproduced, but for rounding: {told}" if self.close else f"NOT reproduced: {told}"


Losses = dict[tuple[int, str], float]


def compare_losses(one: Losses, other: Losses) -> Comparison:
    """Compare the losses that two logs tell of."""
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
    """A log's losses by (step, kind); of two of one step the later counts, as after going back.

    Raises:
        InputError: where it cannot be read.
    """
    found: Losses = {}
    try:
        for record in read_records(log):
            step = step_of(record)
            if step is None:
                continue
            for kind in _KINDS:
                with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):
                    found[step, kind] = float(record[kind])
    except OSError as error:
        raise InputError(f"{log} cannot be read: {error.strerror}; its losses are lost") from None
    return found


def _final(losses: Losses) -> float:
    for kind in reversed(_KINDS):
        steps = [step for step, own in losses if own == kind]
        if steps:
            return losses[max(steps), kind]
    return math.nan
