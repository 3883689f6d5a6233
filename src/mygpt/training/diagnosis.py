"""A diagnosis of a run from its log: whether it still learned, converged, overfitted, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mygpt.errors import CheckpointError
from mygpt.json_objects import read_records, step_of
from mygpt.tokenization.unknown import MOST_UNKNOWN

# Nats per token: a rise of the validation loss that is not noise, and a distance of the training
# loss below it that means overfitting.
_RISE, _GAP = 0.01, 0.25
_FALLING = 0.004  # the gain in the last quarter of a run from which more time would help
# Epochs: from this many on memorising is possible, and from this many on more add little.
_AGAIN, _OFTEN = 2.0, 20.0
_MORE_TEXT = "more text would help more than more"
# With fewer steps the losses are still those of the initial weights and of the warm-up.
_FEW_STEPS = 20


_LARGEST = 1e300  # a whole number of JSON may be too large for a float


@dataclass(frozen=True)
class Seen:
    """One validation.

    Attributes:
        step: of the validation.
        val_loss: nats per token.
        loss: of the training batches reported before it, nats per token; NaN for none.
        error: the standard error of the validation loss; 0 where it is not known.
    """

    step: int
    val_loss: float
    loss: float
    error: float = 0.0


def read_history(log: Path) -> list[Seen]:
    """The validations in a log, each with the mean training loss since the one before.

    Other lines are ignored.
    """
    seen: list[Seen] = []
    losses: list[float] = []
    try:
        records = list(read_records(log))
    except (OSError, CheckpointError):
        return []
    for record in records:
        step, val_loss = step_of(record), _known(record, "val_loss")
        loss = _known(record, "loss")
        if step is not None and val_loss is not None:
            mean = sum(losses) / len(losses) if losses else math.nan
            seen.append(Seen(step, val_loss, mean, _known(record, "val_standard_error") or 0.0))
            losses = []
        elif loss is not None:
            losses.append(loss)
    return seen


def _known(record: dict[str, Any], name: str) -> float | None:
    value = record.get(name)
    known = isinstance(value, (int, float)) and abs(value) < _LARGEST
    return value if known else None


def diagnose(
    history: list[Seen],
    *,
    steps: int,
    epochs: float,
    ended_early: bool,
    to_beat: float | None = None,
    unknown: float = 0.0,
) -> str:
    """What the validations mean, and what would help most.

    Args:
        history: in order.
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
    if not history:
        return "nothing was validated: whether it learned or memorised is not known"
    initial = history[0] if history[0].step == 0 else None  # of the initial model, with --from
    history = history[1:] or history if initial else history
    last = history[-1]
    best = min(history, key=lambda seen: seen.val_loss)
    if initial is not None and best.val_loss > initial.val_loss:
        return (
            f"the initial model does better ({initial.val_loss:.3f}, and {best.val_loss:.3f} "
            "at best since): a lower --lr or more steps may help"
        )
    gap = last.val_loss - last.loss > _GAP
    if last.val_loss > best.val_loss + max(_RISE, last.error):
        found = _risen(best, last, epochs=epochs, ended_early=ended_early)
    elif gap and epochs >= _AGAIN:
        found = [
            f"it knows its own text (read {epochs:.1f} times, training loss {last.loss:.3f}) much "
            f"better than new text ({last.val_loss:.3f}): {_MORE_TEXT} time"
        ]
    elif gap and epochs <= 1 and last.step < _FEW_STEPS:
        found = [f"{_counted(steps)} too few to judge how it learns: more time would help"]
    elif gap and epochs <= 1:
        found = [
            f"the validation text is of another kind ({last.val_loss:.3f}) than the training text "
            f"({last.loss:.3f}, read once at most): give a --val-file, or mix the two"
        ]
    elif not _is_trainable(history):
        found = ["it has settled"]
    elif epochs > _OFTEN:
        found = [
            f"learning to the end, by reading the same text {epochs:.0f} times: {_MORE_TEXT} time"
        ]
    else:
        found = ["learning to the end: more time would help"]
    if to_beat is not None and best.val_loss > to_beat:
        found.append(f"a 5-gram model does better ({to_beat:.3f})")
    return "; ".join(found)


def _risen(best: Seen, last: Seen, *, epochs: float, ended_early: bool) -> list[str]:
    """The diagnosis of a validation loss that rose after its best."""
    rose = f"the validation loss rose from {best.val_loss:.3f} to {last.val_loss:.3f}"
    kept = "the best model is kept" + "; ended early" * ended_early
    if last.loss > best.loss:  # false if one of them is NaN
        return [
            f"best at step {best.step:,}: {rose}, and so did the training loss, to "
            f"{last.loss:.3f}; {kept}; a lower --lr would help"
        ]
    if last.step < _FEW_STEPS:
        return [f"best at step {best.step:,}: {rose}; {_counted(last.step)} too few to say why"]
    if epochs <= 1:  # a text that is read once cannot be memorised
        return [
            f"best at step {best.step:,}: {rose}; {kept}; the text was read once at most: the "
            "validation text is of another kind"
        ]
    fell = f" while the training loss fell to {last.loss:.3f}" * math.isfinite(last.loss)
    return [f"memorising since step {best.step:,}: {rose}{fell}; {kept}; {_MORE_TEXT} steps"]


def _counted(steps: int) -> str:
    return "1 step is" if steps == 1 else f"{steps:,} steps are"


def _is_trainable(history: list[Seen]) -> bool:
    """Whether the validation loss still fell at the end."""
    last = history[-1]
    # With few validations only the last is in the last third.
    late = (seen for seen in history[:-1] if seen.step >= 0.7 * last.step)
    early = next(late, history[-2:][0])
    return early.val_loss - last.val_loss > _FALLING or len(history) < 2
