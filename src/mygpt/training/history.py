"""A run's log, read into losses, samples and incidents."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

from mygpt.json_objects import read_records, step_of

_LARGEST = 1e18  # far above every valid number in a log


@dataclass(frozen=True)
class Report:
    """A step with a loss line."""

    step: int
    loss: float  # the loss of its batch in nats per token
    lr: float
    tokens: int
    elapsed_s: float  # seconds of training so far


@dataclass(frozen=True)
class Validation:
    """A validation pass."""

    step: int  # the step after which it was made
    val_loss: float  # in nats per token
    # The mean loss of the training batches reported since the validation before; NaN for none.
    loss: float = math.nan
    # The standard error of the validation loss; 0 if the log does not contain it.
    error: float = 0.0
    # The validation loss in bits per byte; NaN if the log does not contain it.
    bits_per_byte: float = math.nan
    elapsed_s: float = math.nan  # seconds of training so far


@dataclass(frozen=True)
class Sample:
    """A sample that the model generated during training."""

    step: int  # the step after which it was generated
    text: str
    # (start, end) character offsets of passages that are also in the training text.
    copied: list[tuple[int, int]]


@dataclass(frozen=True)
class Trouble:
    """A skipped step, or a jump of the loss."""

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
        since = history.validations[-1].step if history.validations else -1
        fresh = takewhile(lambda report: report.step > since, reversed(history.reports))
        own = [report.loss for report in fresh]
        mean, error = fmean(own) if own else math.nan, _number(record, "val_standard_error", 0.0)
        bits = _number(record, "val_bits_per_byte")
        validation = Validation(step, val_loss, mean, error, bits, elapsed_s)
        _append(history.validations, validation)
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


def _append(points: list[Any], point: Any) -> None:
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
