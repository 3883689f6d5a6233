"""Small training runs, and what tests read of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mygpt
from mygpt import training
from mygpt.checkpoint.container import read_arrays
from mygpt.training.events import Event, Note
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
    planner.speed = speed
    return planner


def silent(event: Event) -> None:
    """A listener that ignores every event."""


def fit(text: str, output: Path, **options: Any) -> list[Event]:
    heard: list[Event] = []
    mygpt.train(text, output=output, listener=heard.append, **{**TINY, **options})
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
    a, b = (read_arrays(run / "last.state.safetensors")[0] for run in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert log(one) == log(other)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Trainer.fit
    monkeypatch.setattr(
        Trainer, "fit", lambda self, should_stop: inner(self, lambda: self.progress.step >= step)
    )


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
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
