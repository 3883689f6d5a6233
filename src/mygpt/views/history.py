"""Read a run's log into losses, samples and incidents, thinned to what a page can show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeVar

from mygpt.json_objects import read_records, step_of

_LARGEST = 1e18  # far above every valid number in a log


class _OfAStep(Protocol):
    @property
    def step(self) -> int: ...


P = TypeVar("P")
S = TypeVar("S", bound=_OfAStep)


@dataclass(frozen=True)
class Report:
    """A step with a loss line.

    Attributes:
        step: the step.
        loss: the loss of its batch in nats per token.
        lr: the learning rate.
        tokens: training tokens so far.
        elapsed_s: seconds of training so far.
    """

    step: int
    loss: float
    lr: float
    tokens: int
    elapsed_s: float


@dataclass(frozen=True)
class Validation:
    """A validation pass.

    Attributes:
        step: the step after which it was made.
        val_loss: in nats per token.
        bits_per_byte: the same in bits per byte; NaN if the log does not contain it.
        elapsed_s: seconds of training so far.
    """

    step: int
    val_loss: float
    bits_per_byte: float
    elapsed_s: float


@dataclass(frozen=True)
class Sample:
    """A sample that the model generated during training.

    Attributes:
        step: the step after which it was generated.
        text: the text.
        copied: (start, end) character offsets of passages that are also in the training text.
    """

    step: int
    text: str
    copied: list[tuple[int, int]]


@dataclass(frozen=True)
class Trouble:
    """A skipped step, or a jump of the loss.

    Attributes:
        step: the step.
        text: a description.
    """

    step: int
    text: str


@dataclass
class History:
    """A run's log by kind, in the order of steps, without steps that were rolled back."""

    reports: list[Report] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last step in the log."""
        return max((own[-1].step for own in (self.reports, self.validations) if own), default=0)

    @property
    def best(self) -> Validation | None:
        """The validation with the lowest loss."""
        return min(self.validations, key=lambda seen: seen.val_loss, default=None)

    def speeds(self) -> list[tuple[int, float]]:
        """(step, tokens per second since the report before) for each report."""
        return [
            (after.step, (after.tokens - before.tokens) / (after.elapsed_s - before.elapsed_s))
            for before, after in pairwise(self.reports)
            if after.elapsed_s > before.elapsed_s and after.tokens > before.tokens
        ]


def read_log(log: Path) -> History:
    """Read a log; invalid lines and an incomplete last line are skipped.

    Raises:
        OSError: if it cannot be read.
    """
    history = History()
    for record in read_records(log):
        step = step_of(record)
        if step is not None:
            _add(history, step, record)
    return history


def _add(history: History, step: int, record: dict[str, Any]) -> None:
    elapsed_s = _number(record, "elapsed_s", math.nan)
    loss, val_loss = _number(record, "loss"), _number(record, "val_loss")
    if math.isfinite(loss):
        tokens = int(_number(record, "tokens", 0.0))
        lr = _number(record, "lr")
        _append(history.reports, Report(step, loss, lr, tokens, elapsed_s))
    if math.isfinite(val_loss):
        bits = _number(record, "val_bits_per_byte")
        _append(history.validations, Validation(step, val_loss, bits, elapsed_s))
    if isinstance(text := record.get("sample"), str):
        _append(history.samples, Sample(step, text, _spans(record.get("copied"))))
    if "left_out" in record:
        count = int(_number(record, "steps", 1.0))
        one = "skipped because its loss or gradient was not finite"
        several = f"{count} steps up to this one were skipped: no finite loss or gradient"
        history.troubles.append(Trouble(step, several if count > 1 else one))
    if math.isfinite(spike := _number(record, "spike")):
        usual = _number(record, "usual")
        history.troubles.append(
            Trouble(step, f"the loss jumped to {spike:.4f} from about {usual:.4f}")
        )


def _append(points: list[S], point: S) -> None:
    """Add a point; if its step is not after the last one, the run was rolled back to there."""
    while points and points[-1].step >= point.step:
        points.pop()
    points.append(point)


def _number(record: dict[str, Any], name: str, missing: float = math.nan) -> float:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return missing
    # An integer in JSON may be too large for a float.
    return float(value) if abs(value) < _LARGEST else missing


def _spans(copied: object) -> list[tuple[int, int]]:
    if not isinstance(copied, list):
        return []
    return [
        (span[0], span[1])
        for span in copied
        if isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)
    ]


def thin(points: Sequence[P], most: int, value: Callable[[P], float]) -> list[P]:
    """At most `most` points: the first, the last, and the minimum and maximum of equal intervals.

    So no peak and no dip is lost, however many points there are.
    """
    if len(points) <= most:
        return list(points)
    intervals = max(1, most // 2 - 1)
    kept = {0, len(points) - 1}
    for n in range(intervals):
        own = range(n * len(points) // intervals, (n + 1) * len(points) // intervals)
        kept.add(min(own, key=lambda place: value(points[place])))
        kept.add(max(own, key=lambda place: value(points[place])))
    return [points[place] for place in sorted(kept)]


def medians(points: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """At most `most` points: the last step and the median value of equal intervals."""
    if len(points) <= most:
        return list(points)
    bounds = [n * len(points) // most for n in range(most + 1)]
    return [
        (points[end - 1][0], median(value for _, value in points[begin:end]))
        for begin, end in pairwise(bounds)
    ]


def spread(points: Sequence[P], most: int) -> list[P]:
    """At most `most` of the points, evenly spaced from the first to the last."""
    if len(points) <= most:
        return list(points)
    return [points[n * (len(points) - 1) // (most - 1)] for n in range(most)]
