"""A diagnosis of a run: whether it still learned, converged, overfitted, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mygpt.tokenization.unknown import MOST_UNKNOWN
from mygpt.training.history import Validation

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
        return "nothing was validated: whether it learned or memorised is not known"
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
        return "it has settled"
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
