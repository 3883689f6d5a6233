"""What became of a run, in plain words, from its log."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Nats per token: a rise of the validation loss that is more than chance, and a training loss so
# far below it that the model knows its text better than texts of its kind.
_RISE, _GAP = 0.01, 0.25
_FALLING = 0.004  # what the last quarter of a run still gains where more time would help


@dataclass(frozen=True)
class Seen:
    """One validation.

    Attributes:
        step: when.
        val_loss: nats per token.
        loss: of the training batches reported before it, nats per token; NaN for none.
    """

    step: int
    val_loss: float
    loss: float


def read_history(log: Path) -> list[Seen]:
    """The validations that a log tells of, each with the mean of the losses since the one before.

    Lines that are none are passed over.
    """
    seen: list[Seen] = []
    losses: list[float] = []
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(record, dict):
            continue
        step, val_loss = record.get("step"), _known(record, "val_loss")
        loss = _known(record, "loss")
        if type(step) is int and val_loss is not None:
            mean = sum(losses) / len(losses) if losses else math.nan
            seen.append(Seen(step, val_loss, mean))
            losses = []
        elif loss is not None:
            losses.append(loss)
    return seen


def _known(record: dict[str, Any], name: str) -> float | None:
    value = record.get(name)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def verdict(
    history: list[Seen], *, epochs: float, ended_early: bool, to_beat: float | None = None
) -> str:
    """What the validations say, and what would help most.

    Args:
        history: in order.
        epochs: how often the text was read.
        ended_early: because the validation loss had turned.
        to_beat: the loss of a 5-gram model, nats per token; None where it is not known.
    """
    if not history:
        return "there was no text to validate on: whether it learned or memorised is not known"
    last = history[-1]
    best = min(history, key=lambda seen: seen.val_loss)
    told = []
    if last.val_loss > best.val_loss + _RISE:
        fell = f" while the training loss fell to {last.loss:.3f}"
        told.append(
            f"memorising since step {best.step:,}: the validation loss rose from "
            f"{best.val_loss:.3f} to {last.val_loss:.3f}{fell if math.isfinite(last.loss) else ''}"
            "; the best model is kept"
        )
        told.append("ended early" if ended_early else "")
        told.append("more text would help more than more steps")
    elif last.val_loss - last.loss > _GAP:
        told.append(
            f"it knows its own text (read {epochs:.1f} times, training loss {last.loss:.3f}) much "
            f"better than new text ({last.val_loss:.3f}): more text would help more than more time"
        )
    else:
        # Of few validations, the last alone lies in the last third.
        late = (seen for seen in history[:-1] if seen.step >= 0.7 * last.step)
        early = next(late, history[-2:][0])
        still = early.val_loss - last.val_loss > _FALLING or len(history) < 2
        told.append("learning to the end: more time would help" if still else "it has settled")
    if to_beat is not None and best.val_loss > to_beat:
        told.append(f"a 5-gram model does better ({to_beat:.3f})")
    return "; ".join(part for part in told if part)
