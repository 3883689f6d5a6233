"""Losses that are NaN or infinite, and runs that must be bitwise the same."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import torch

from mygpt import training
from mygpt.core.model import GPT
from mygpt.training import trainer
from mygpt.training.events import Event, StepsSkipped
from mygpt.training.gradients import make_gradients
from mygpt.training.non_finite import NonFiniteGuard
from mygpt.training.optimizer import Optimizer
from torture import Tally
from torture.runs import OPTIONS, fresh, in_child, text_file, train
from training_runs import log, silent
from training_steps import moments


def planted_nans(count: int, folder: Path) -> Tally:
    """NaN or infinity in the loss or one gradient at `count` random steps of one run.

    Each such step changes no bit of weights and moments; the run finishes.
    """
    tally = Tally("steps with a planted NaN: no update, reported, and the run finished")
    rng = random.Random(0)
    steps = 5 * count
    planted = set(rng.sample(range(2, steps), count))
    events: list[Event] = []
    untouched: list[int] = []
    step = 0

    def planting(model: GPT, *arguments: Any) -> Any:
        gradients = make_gradients(model, *arguments)
        computed = type(gradients).__call__

        class Planting(type(gradients)):
            def __call__(self, *arguments: Any) -> torch.Tensor:
                nonlocal step
                step += 1
                loss = computed(self, *arguments)
                if step in planted:
                    bad = rng.choice([math.nan, math.inf, -math.inf])
                    if step % 2:
                        return loss * bad
                    gradient = rng.choice([p.grad for p in model.parameters()])
                    gradient.view(-1)[rng.randrange(gradient.numel())] = bad
                return loss

        gradients.__class__ = Planting
        return gradients

    inner = NonFiniteGuard.step

    def watched(self: NonFiniteGuard, lr: float) -> None:
        before = _everything(self.optimizer)
        inner(self, lr)
        if _everything(self.optimizer) == before:
            untouched.append(self.progress.step)

    NonFiniteGuard.step = watched
    trainer.make_gradients = planting
    run = fresh(folder)
    try:
        options = {**OPTIONS, "steps": steps, "save_every": 0, "eval_every": steps}
        training.train(text_file(folder), output=run, listener=events.append, **options)
    finally:
        NonFiniteGuard.step = inner
        trainer.make_gradients = make_gradients
    reported = {event.step for event in events if isinstance(event, StepsSkipped)}
    logged = {record["step"] for record in log(run) if "left_out" in record}
    for number in sorted(planted):
        ok = number in untouched and number in reported and number in logged
        tally.count(ok, f"step {number}")
    others = sorted(set(untouched) - planted)
    finished = [r["step"] for r in log(run) if "val_loss" in r] == [steps]
    if others or not finished:
        tally.count(False, f"steps {others[:3]} skipped without cause, finished: {finished}")
    return tally


def _everything(optimizer: Optimizer) -> bytes:
    """Weights and moments, byte for byte."""
    arrays = moments(optimizer)
    weights = [p.detach().numpy().tobytes() for p in optimizer.model.parameters()]
    return b"".join([*weights, *(arrays[name].tobytes() for name in sorted(arrays))])


def same_seed(count: int, folder: Path) -> Tally:
    """The same run `count` times: the same log except times, byte for byte."""
    tally = Tally("runs of one seed with the same log except times")
    first = ""
    for trial in range(count):
        run = fresh(folder)
        assert in_child(train, run) == 0
        text = json.dumps(log(run))
        first = first or text
        tally.count(text == first, f"run {trial} differs")
    return tally


def replayed(count: int, folder: Path) -> Tally:
    """Runs of a given time, replayed from their recorded plan: the same log except times."""
    tally = Tally("runs by --minutes, replayed: same losses and rates")
    for trial in range(count):
        run, again = fresh(folder), fresh(folder, "again")
        options = {"steps": None, "minutes": 0.01, "save_every": 0, "seed": trial}
        assert in_child(train, run, **options) == 0
        code = in_child(training.replay, run, output=again, device="cpu", listener=silent)
        same = code == 0 and log(run) == log(again)
        tally.count(same, f"run {trial}: ended with {code}")
    return tally
