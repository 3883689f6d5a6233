"""Losses that are no numbers, and runs that must be the same."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import torch

from mygpt import training
from mygpt.core.model import GPT
from mygpt.training.events import Event, StepsSkipped
from mygpt.training.gradients import make_gradients
from mygpt.training.non_finite import NonFiniteGuard
from mygpt.training.optimizer import Optimizer
from torture import Figure
from torture.runs import OPTIONS, fresh, in_child, log, silent, text_file, train


def planted_nans(count: int, folder: Path) -> Figure:
    """NaN or infinity in the loss or one gradient at `count` random steps of one run.

    Each such step leaves weights and moments as they are, to the bit; the run finishes.
    """
    figure = Figure("steps with a planted NaN: no update applied, told, and the run finished")
    chance = random.Random(0)
    steps = 5 * count
    planted = set(chance.sample(range(2, steps), count))
    heard: list[Event] = []
    untouched: list[int] = []
    step = 0

    def planting(model: GPT, *arguments: Any) -> Any:
        gradients = make_gradients(model, *arguments)
        computed = type(gradients).__call__

        class Planting(type(gradients)):  # type: ignore[misc]
            def __call__(self, *arguments: Any) -> torch.Tensor:
                nonlocal step
                step += 1
                loss = computed(self, *arguments)
                if step in planted:
                    bad = chance.choice([math.nan, math.inf, -math.inf])
                    if step % 2:
                        return loss * bad
                    gradient = chance.choice(
                        [p.grad for p in model.parameters() if p.grad is not None]
                    )
                    gradient.view(-1)[chance.randrange(gradient.numel())] = bad
                return loss

        gradients.__class__ = Planting
        return gradients

    inner = NonFiniteGuard.step

    def watched(self: NonFiniteGuard, lr: float) -> None:
        before = _everything(self.optimizer)
        inner(self, lr)
        if _everything(self.optimizer) == before:
            untouched.append(self.progress.step)

    import mygpt.training.trainer as loop

    NonFiniteGuard.step = watched  # type: ignore[method-assign]
    loop.make_gradients = planting
    run = fresh(folder)
    try:
        options = {**OPTIONS, "steps": steps, "save_every": 0, "eval_every": steps}
        training.train(text_file(folder), output=run, listener=heard.append, **options)
    finally:
        NonFiniteGuard.step = inner  # type: ignore[method-assign]
        loop.make_gradients = make_gradients
    told = {event.step for event in heard if isinstance(event, StepsSkipped)}
    logged = {record["step"] for record in log(run) if "left_out" in record}
    for number in sorted(planted):
        ok = number in untouched and number in told and number in logged
        figure.count(ok, f"step {number}")
    others = sorted(set(untouched) - planted)
    finished = [r["step"] for r in log(run) if "val_loss" in r] == [steps]
    if others or not finished:
        figure.count(False, f"steps {others[:3]} left out unasked, finished: {finished}")
    return figure


def _everything(optimizer: Optimizer) -> bytes:
    """Weights and moments, byte for byte."""
    arrays = optimizer.arrays()
    weights = [p.detach().numpy().tobytes() for p in optimizer.model.parameters()]
    return b"".join([*weights, *(arrays[name].tobytes() for name in sorted(arrays))])


def same_seed(count: int, folder: Path) -> Figure:
    """The same run again and again: the same log but for times, byte for byte."""
    figure = Figure("runs of one seed with the same log but for times")
    first = ""
    for trial in range(count):
        run = fresh(folder)
        assert in_child(lambda run=run: train(run)) == 0  # type: ignore[misc]
        text = json.dumps(log(run))
        first = first or text
        figure.count(text == first, f"run {trial} differs")
    return figure


def replayed(count: int, folder: Path) -> Figure:
    """Runs by the clock, made again from their plan: the same log but for times."""
    figure = Figure("runs by --minutes, replayed: same losses and rates")
    for trial in range(count):
        run, again = fresh(folder), fresh(folder, "again")
        options = {"steps": None, "minutes": 0.01, "save_every": 0, "seed": trial}
        assert in_child(lambda run=run, o=options: train(run, **o)) == 0  # type: ignore[misc]

        def replay(run: Path = run, again: Path = again) -> None:
            training.replay(run, output=again, device="cpu", listener=silent)

        code = in_child(replay)
        same = code == 0 and log(run) == log(again)
        figure.count(same, f"run {trial}: ended with {code}")
    return figure
