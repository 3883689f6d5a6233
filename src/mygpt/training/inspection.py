"""Reads the files of a run completely and says what is in them or wrong; changes nothing."""

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

from mygpt.checkpoint.container import Arrays, read_arrays
from mygpt.checkpoint.model_file import Checkpoint
from mygpt.errors import CheckpointError, InputError, OutOfMemoryError
from mygpt.file_access import require_regular
from mygpt.json_objects import parse_record, step_of
from mygpt.training.checkpointing import State, check_shards_of
from mygpt.training.progress import Progress

Verdict = Literal["ok", "warning", "damaged"]


@dataclass(frozen=True)
class Contents:
    """One file of arrays.

    Attributes:
        path: its path.
        verdict: None if there is no such file.
        text: what is in it, or what is wrong with it.
        size: bytes.
        step: of the model; 0 if the file does not say.
        run_id: the run that wrote it.
        progress: of a state; for other files a new one.
        sharded: whether a state's weights are in a folder of shards.
        checked: False if there was too little memory to read it.
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
    def intact(self) -> bool:
        """Whether it can be used."""
        return self.verdict == "ok"


def examine(
    path: Path, kind: Literal["state", "model"] | None = None, *, inside: bool = False
) -> Contents:
    """Read a whole file; without a kind its content decides which it is.

    With `inside` it is a file of a run's folder, where a link counts as damage.
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
    parts = [f"{size:,} bytes", f"step {progress.step:,}"]
    if state.shards is not None:
        parts.append(f"weights in {state.shards['folder']}")
    if math.isfinite(progress.loss):
        parts.append(f"loss {progress.loss:.4f}")
    if progress.best_step:
        parts.append(
            f"best validation loss {progress.best_val_loss:.4f} at step {progress.best_step:,}"
        )
    return Contents(
        state.path,
        "ok",
        ", ".join(parts),
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
    parts, provenance = [f"{size:,} bytes"], checkpoint.provenance
    forms = ("step {step:,}", "loss {loss:.4f}", "validation loss {val_loss:.4f}")
    for form in forms:
        # The file's provenance may lack these or have other types.
        with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):
            parts.append(form.format(**provenance))
    step = provenance.get("step")
    return Contents(
        checkpoint.path, "ok", ", ".join(parts), size,
        step if type(step) is int else 0, provenance.get("run_id"),
    )  # fmt: skip


def _require_finite(weights: Arrays) -> None:
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise CheckpointError(f"tensor {name} has infinite or NaN values")


def _without(path: Path, error: Exception) -> str:
    """An error's message without the file's name and verdict, which are shown separately."""
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
            yield place, f"line {number:,} is not a JSON object"
        elif line in seen:
            yield place, f"line {number:,} repeats line {seen[line]:,}"
        elif (step := step_of(record)) is not None:
            if step < reached:
                yield place, f"line {number:,} goes back to step {step:,} from step {reached:,}"
            reached = step
        seen.setdefault(line, number)
        place += len(line)
