"""A run's log, read into losses, samples and incidents; and a diagnosis of the run.

It says whether the run still learned, converged or overfitted, and why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

from mygpt.json_objects import read_records, step_of
from mygpt.tokenization.unknown import MOST_UNKNOWN

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

    def add(self, step: int, record: dict[str, Any]) -> None:
        """Add a line of the log; steps from this one on, if there are any, were rolled back."""
        elapsed_s = _number(record, "elapsed_s", math.nan)
        loss, val_loss = _number(record, "loss"), _number(record, "val_loss")
        if math.isfinite(loss):
            tokens = int(_number(record, "tokens", 0.0))
            lr = _number(record, "lr")
            _append(self.reports, Report(step, loss, lr, tokens, elapsed_s))
        if math.isfinite(val_loss):
            since = self.validations[-1].step if self.validations else -1
            fresh = takewhile(lambda report: report.step > since, reversed(self.reports))
            own = [report.loss for report in fresh]
            mean = fmean(own) if own else math.nan
            error = _number(record, "val_standard_error", 0.0)
            bits = _number(record, "val_bits_per_byte")
            validation = Validation(step, val_loss, mean, error, bits, elapsed_s)
            _append(self.validations, validation)
        if isinstance(text := record.get("sample"), str):
            _append(self.samples, Sample(step, text, _spans(record.get("copied"))))
        if "left_out" in record:
            count = int(_number(record, "steps", 1.0))
            one = "skipped because its loss or gradient was not finite"
            several = f"{count} steps up to this one were skipped: no finite loss or gradient"
            self.troubles.append(Trouble(step, several if count > 1 else one))
        if math.isfinite(spike := _number(record, "spike")):
            usual = _number(record, "usual")
            self.troubles.append(
                Trouble(step, f"the loss jumped to {spike:.4f} from about {usual:.4f}")
            )


def read_log(log: Path, *, up_to: int | None = None) -> History:
    """Read a log; invalid lines and an incomplete last line are skipped.

    Args:
        log: the file.
        up_to: the last step whose records are read; None reads all.

    Raises:
        OSError: if it cannot be read.
    """
    history = History()
    for record in read_records(log):
        step = step_of(record)
        if step is not None and (up_to is None or step <= up_to):
            history.add(step, record)
    return history


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


# Nats per token: a rise of the validation loss that is not noise, and a distance of the training
# loss below it that means overfitting.
_RISE, _GAP = 0.01, 0.25
_FALLING = 0.004  # the gain in the last quarter of a run from which more time would help
# Epochs: from this many on memorising is possible, and from this many on more add little.
_AGAIN, _OFTEN = 2.0, 20.0
_MORE_TEXT = "more text would help more than more"
# With fewer steps the losses are still those of the initial weights and of the warm-up.
_FEW_STEPS = 20


def diagnose(
    validations: Sequence[Validation],
    *,
    steps: int,
    epochs: float,
    ended_early: bool,
    to_beat: float | None = None,
    unknown: float = 0.0,
) -> str:
    """What the validations mean, and what would help most.

    Args:
        validations: in order.
        steps: how many were made.
        epochs: how often the text was read.
        ended_early: because the validation loss had turned.
        to_beat: the loss of a 5-gram model, nats per token; None where it is not known.
        unknown: the part of the text that the tokenizer does not know.
    """
    if not steps:
        return "no step was made: the weights are the initial ones"
    if unknown > MOST_UNKNOWN:
        return (
            f"the tokenizer does not know {unknown:.0%} of the text, so the losses say little "
            "about it: train with a tokenizer that does (--tokenizer byte or bpe know all text)"
        )
    if not validations:
        return (
            "nothing was validated: whether it learned or memorised is not known; give a longer "
            "text, or a --val-file"
        )
    first = validations[0]
    initial = first.val_loss if first.step == 0 else math.inf  # of the initial model, with --from
    validations = validations[1:] or validations if first.step == 0 else validations
    best = min(validations, key=lambda seen: seen.val_loss)
    if best.val_loss > initial:
        return (
            f"the initial model does better ({initial:.3f}, and {best.val_loss:.3f} "
            "at best since): a lower --lr or more steps may help"
        )
    found = _diagnosis(validations, best, epochs=epochs, ended_early=ended_early)
    if to_beat is not None and best.val_loss > to_beat:
        return f"{found}; a 5-gram model does better ({to_beat:.3f})"
    return found


def _diagnosis(
    validations: Sequence[Validation], best: Validation, *, epochs: float, ended_early: bool
) -> str:
    last = validations[-1]
    if last.val_loss > best.val_loss + max(_RISE, last.error):
        return _risen(best, last, epochs=epochs, ended_early=ended_early)
    if last.val_loss - last.loss > _GAP and epochs >= _AGAIN:
        return (
            f"it knows its own text (read {epochs:.1f} times, training loss {last.loss:.3f}) much "
            f"better than new text ({last.val_loss:.3f}): {_MORE_TEXT} time"
        )
    if last.val_loss - last.loss > _GAP and epochs <= 1:
        if last.step < _FEW_STEPS:
            return f"{_few(last)} to judge how it learns: more time would help"
        return (
            f"the validation text is of another kind ({last.val_loss:.3f}) than the training text "
            f"({last.loss:.3f}, read once at most): give a --val-file, or mix the two"
        )
    if not _still_falls(validations):
        return "the loss has stopped falling"
    if epochs > _OFTEN:
        return (
            f"learning to the end, by reading the same text {epochs:.0f} times: {_MORE_TEXT} time"
        )
    return "learning to the end: more time would help"


def _risen(best: Validation, last: Validation, *, epochs: float, ended_early: bool) -> str:
    """The diagnosis of a validation loss that rose after its best."""
    rose = f"the validation loss rose from {best.val_loss:.3f} to {last.val_loss:.3f}"
    kept = "the best model is kept" + "; ended early" * ended_early
    if last.loss > best.loss:  # false if one of them is NaN
        return (
            f"best at step {best.step:,}: {rose}, and so did the training loss, to "
            f"{last.loss:.3f}; {kept}; a lower --lr would help"
        )
    if last.step < _FEW_STEPS:
        return f"best at step {best.step:,}: {rose}; {_few(last)} to say why"
    if epochs <= 1:  # a text that is read once cannot be memorised
        return (
            f"best at step {best.step:,}: {rose}; {kept}; the text was read once at most: the "
            "validation text is of another kind"
        )
    fell = f" while the training loss fell to {last.loss:.3f}" * math.isfinite(last.loss)
    return f"memorising since step {best.step:,}: {rose}{fell}; {kept}; {_MORE_TEXT} steps"


def _few(last: Validation) -> str:
    return "1 step is too few" if last.step == 1 else f"{last.step:,} steps are too few"


def _still_falls(validations: Sequence[Validation]) -> bool:
    """Whether the validation loss still fell at the end; true of a single validation."""
    last = validations[-1]
    # With few validations only the last is in the last third.
    late = (seen for seen in validations[:-1] if seen.step >= 0.7 * last.step)
    early = next(late, validations[-2:][0])
    return early.val_loss - last.val_loss > _FALLING or len(validations) < 2
