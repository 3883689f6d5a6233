"""Small training runs, and what tests read of them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mygpt import training
from mygpt.checkpoint.container import read_arrays
from mygpt.errors import MygptError
from mygpt.training.events import Event, Note, StepDone
from mygpt.training.gradients import ParallelGradients
from mygpt.training.planning import Planner
from mygpt.training.prepare import Prepared, Request, prepare
from mygpt.training.trainer import Trainer

TEXT = "".join(f"{n} times {n} is {n * n}, as far as anybody knows. " for n in range(200))
TINY: dict[str, Any] = {
    "preset": "nano",
    "embed_dim": 8,
    "num_heads": 2,
    "num_layers": 1,
    "max_seq_len": 16,
    "batch_size": 4,
    "steps": 12,
    "print_every": 1,
    "eval_every": 4,
    "save_every": 4,
    "sample_tokens": 0,
}


def prepared(files: object, **arguments: Any) -> Prepared:
    """A new run up to where its model is made."""
    return prepare(Request.of(files, **arguments))


def planner_of(preset: str, options: dict[str, Any], speed: float) -> Planner:
    """A planner on a machine of a given speed, in operations a second."""
    planner = Planner(preset, options, torch.device("cpu"), time.monotonic())
    planner.speeds = {"float32": speed}
    return planner


def silent(event: Event) -> None:
    """A listener that ignores every event."""


def fit(text: str, output: Path, **options: Any) -> list[Event]:
    heard: list[Event] = []
    training.train(text, output=output, listener=heard.append, **{**TINY, **options})
    return heard


def resume(run: Path, **options: Any) -> list[Event]:
    heard: list[Event] = []
    training.resume(run, listener=heard.append, **options)
    return heard


def notes(heard: list[Event]) -> str:
    return "\n".join(event.text for event in heard if isinstance(event, Note))


def log(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "elapsed_s"} for record in records]


def progress_of(run: Path) -> dict[str, Any]:
    return read_arrays(run / "last.state.safetensors")[1]["course"]


def assert_same(one: Path, other: Path) -> None:
    """The states of two runs are bitwise equal, and their logs are."""
    assert_arrays(*(read_arrays(run / "last.state.safetensors")[0] for run in (one, other)))
    assert log(one) == log(other)


def assert_arrays(one: Any, other: Any, *, but: str = "") -> None:
    """Two dictionaries hold bitwise equal arrays, except one of that name."""
    assert one.keys() == other.keys()
    for name in one.keys() - {but}:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Trainer.fit
    monkeypatch.setattr(
        Trainer, "fit", lambda self, should_stop: inner(self, lambda: self.progress.step >= step)
    )


class Runs:
    """The small runs of one test: in its folder, by name, on the text `times.txt`.

    Attributes:
        folder: of the runs and the text.
        text: the text's path.
        finished: a finished run that all tests of a module share; see `copy`.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, finished: Path) -> None:
        self.folder, self.patch, self.finished = folder, patch, finished
        self.text = str(folder / "times.txt")
        Path(self.text).write_text(TEXT)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def fit(self, name: str = "run", **options: Any) -> list[Event]:
        """Train a run from its beginning; its events."""
        files = options.pop("files", self.text)
        return fit(files, self / name, **options)

    def fit_until(self, step: int, name: str = "run", **options: Any) -> None:
        """The same, stopped with a save after this step."""
        with self.patch.context() as patch:
            stop_at(step, patch)
            self.fit(name, **options)

    def resume(self, name: str = "run", **options: Any) -> list[Event]:
        return resume(self / name, **options)

    def replay(self, name: str = "run", output: str = "again", **options: Any) -> None:
        options = {"output": self / output, "listener": silent, **options}
        training.replay(self / name, **options)

    def copy(self, name: str = "run") -> Path:
        """A copy of the finished run of `TINY`, whose text is in another folder."""
        return Path(shutil.copytree(self.finished, self / name))


def refusal(action: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The error of a user that a call raises, which is one line."""
    with pytest.raises(MygptError) as raised:
        action(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def dying_at(step: int, error: BaseException | None = None) -> Callable[[Event], None]:
    """A listener that raises an error, `Dead` unless given, after a step."""

    def listener(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            raise error or Dead

    return listener


def full_disk(patch: pytest.MonkeyPatch) -> None:
    """Every sync fails, as on a disk without space."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(os, "fsync", full)


def damage(path: Path, place: int = -1) -> None:
    """Flip a bit."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def plant(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], float]) -> None:
    """Multiply the loss of call number n (from 1) by `bad(n)`."""
    inner, calls = ParallelGradients.__call__, [0]

    def call(self: ParallelGradients, *arguments: Any) -> torch.Tensor:
        calls[0] += 1
        return inner(self, *arguments) * bad(calls[0])

    monkeypatch.setattr(ParallelGradients, "__call__", call)


class Dead(BaseException):
    """The process dies here."""
