"""What is in the files of a run, or what is wrong with them; reads everything, changes nothing."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mygpt.checkpoint import Checkpoint
from mygpt.container import Arrays, read_arrays
from mygpt.errors import CheckpointError, InputError, OutOfMemoryError
from mygpt.file_access import require_regular
from mygpt.json_objects import parse_record, step_of
from mygpt.training.state import Progress, State, check_shards_of

Verdict = Literal["ok", "warning", "damaged"]


@dataclass(frozen=True)
class Contents:
    """One file of arrays.

    Attributes:
        path: where it lies.
        verdict: None where there is no such file.
        text: what is in it, or what is wrong with it.
        size: bytes.
        step: how far the model had come; 0 where it does not tell.
        run_id: the run that wrote it.
        progress: a state's; a new one elsewhere.
        sharded: a state's weights lie in a folder beside it.
        checked: False where there was too little memory to read it.
    """

    path: Path
    verdict: Verdict | None
    text: str = "is missing"
    size: int = 0
    step: int = 0
    run_id: Any = None
    progress: Progress = field(default_factory=Progress)
    sharded: bool = False
    checked: bool = True

    @property
    def whole(self) -> bool:
        """Whether it can be used."""
        return self.verdict == "ok"


def examine(
    path: Path, kind: Literal["state", "model"] | None = None, *, inside: bool = False
) -> Contents:
    """Read a file whole; without a kind its content says which it is.

    With `inside` it is one of a run's folder: a link is damage.
    """
    if not os.path.lexists(path):
        return Contents(path, None)
    size = 0
    try:
        status = require_regular(path, inside=inside)
        size = 0 if status is None else status.st_size
        arrays, parts = read_arrays(path, inside=inside)
        if kind == "state" or (kind is None and "course" in parts):
            state = State.from_parts(path, arrays, parts)
            check_shards_of(state)
            return _read_state(state, size)
        return _read_model(Checkpoint.from_parts(path, arrays, parts), size)
    except OutOfMemoryError as error:
        text = f"not checked: {_without(path, error)}"
        return Contents(path, "warning", text, size, checked=False)
    except (InputError, OSError) as error:
        return Contents(path, "damaged", _without(path, error), size)


def _read_state(state: State, size: int) -> Contents:
    progress = state.progress
    told = [f"{size:,} bytes", f"step {progress.step:,}"]
    if state.shards is not None:
        told.append(f"weights in {state.shards['folder']}")
    if math.isfinite(progress.loss):
        told.append(f"loss {progress.loss:.4f}")
    if progress.best_step:
        told.append(
            f"best validation loss {progress.best_val_loss:.4f} at step {progress.best_step:,}"
        )
    return Contents(
        state.path,
        "ok",
        ", ".join(told),
        size,
        progress.step,
        state.provenance.get("run_id"),
        progress,
        sharded=state.shards is not None,
    )


def _read_model(checkpoint: Checkpoint, size: int) -> Contents:
    checkpoint.check_shapes()
    _require_finite(checkpoint.arrays)
    tokens, wanted = checkpoint.tokenizer.vocab_size, checkpoint.config.vocab_size
    if tokens != wanted:
        raise CheckpointError(f"its tokenizer has {tokens:,} tokens, and its model {wanted:,}")
    told, origin = [f"{size:,} bytes"], checkpoint.provenance
    forms = ("step {step:,}", "loss {loss:.4f}", "validation loss {val_loss:.4f}")
    for form in forms:
        # Whoever saved the file may have told less, or something else.
        with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):
            told.append(form.format(**origin))
    step = origin.get("step")
    return Contents(
        checkpoint.path, "ok", ", ".join(told), size,
        step if type(step) is int else 0, origin.get("run_id"),
    )  # fmt: skip


def _require_finite(weights: Arrays) -> None:
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise CheckpointError(f"tensor {name} has infinite or NaN values")


def _without(path: Path, error: Exception) -> str:
    """An error's message without the file's name and verdict, which stand beside it."""
    text = str(error).removeprefix(str(path)).lstrip(": ")
    return text.removeprefix("is damaged: ")


def log_problems(data: bytes) -> Iterator[tuple[int, str]]:
    """What is wrong with a log, with the byte at which that line begins."""
    seen: dict[bytes, int] = {}
    place, reached = 0, 0
    for number, line in enumerate(io.BytesIO(data), 1):
        record = parse_record(line)
        if not line.endswith(b"\n"):
            yield place, f"line {number:,} is cut short"
        elif record is None:
            yield place, f"line {number:,} is no JSON object"
        elif line in seen:
            yield place, f"line {number:,} is line {seen[line]:,} again"
        elif (step := step_of(record)) is not None:
            if step < reached:
                yield place, f"line {number:,} goes back to step {step:,} from step {reached:,}"
            reached = step
        seen.setdefault(line, number)
        place += len(line)
