"""Death at any moment: SIGKILL, a stop after every step, and death after every call of a save."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mygpt.training.run import RunFolder
from mygpt.training.trainer import Trainer
from torture import Tally
from torture.runs import Child, Flag, differs, fresh, in_child, resume, train

# The system calls of a save, by the names in `os` under which mygpt calls them.
CALLS = ("open", "write", "fsync", "link", "replace", "unlink", "ftruncate", "close")
_DIED = 77


def _count_saves(flag: Flag) -> None:
    """Make the flag odd during every save, and even otherwise."""
    inner = Trainer.save

    def save(self: Trainer) -> None:
        flag.value += 1
        inner(self)
        flag.value += 1

    Trainer.save = save  # type: ignore[method-assign]


def kill_at_random(count: int, folder: Path) -> Tally:
    """SIGKILL at random moments, more than half of them during a save; then resume to the end."""
    tally = Tally("killed at a random moment, resumed, bitwise the same")
    reference = fresh(folder, "reference")
    assert in_child(lambda: train(reference)) == 0
    rng, inside, saves = random.Random(0), 0, 11
    for trial in range(count):
        run = fresh(folder)

        def work(flag: Flag, run: Path = run) -> None:
            _count_saves(flag)
            train(run)

        child = Child(work)
        if trial % 4:  # up to 3 ms into one of the saves
            from_flag = 2 * rng.randrange(saves) + 1
            _wait_for(child, from_flag)
            time.sleep(rng.random() * 0.003)
        else:
            _wait_for(child, 1)
            time.sleep(rng.random() * 0.25)
        child.kill()
        inside += child.flag.value % 2
        child.wait()
        code = in_child(lambda run=run: resume(run))  # type: ignore[misc]
        problem = differs(run, reference) if code == 0 else f"resuming ended with {code}"
        tally.count(not problem, f"trial {trial}: {problem}")
    tally.note = f"{inside} of them during a save"
    return tally


def _wait_for(child: Child, value: int) -> None:
    while child.flag.value < value and child.alive():
        time.sleep(0.0001)


def stop_at_every_step(count: int, folder: Path) -> Tally:
    """A run of `count` steps, stopped after each of them and resumed."""
    tally = Tally("stopped after a step, resumed, bitwise the same")
    options: dict[str, Any] = {"steps": count, "save_every": 0, "eval_every": 20}
    reference = fresh(folder, "reference")
    assert in_child(lambda: train(reference, **options)) == 0
    for step in range(1, count + 1):
        run = fresh(folder)

        def stop_then_resume(run: Path = run, step: int = step) -> None:
            fit = Trainer.fit

            def stopped(self: Trainer, should_stop: Callable[[], bool]) -> None:
                fit(self, lambda: self.progress.step >= step)

            Trainer.fit = stopped  # type: ignore[method-assign]
            train(run, **options)
            Trainer.fit = fit  # type: ignore[method-assign]
            assert RunFolder(run).load_state()[0].progress.step == step
            resume(run)

        code = in_child(stop_then_resume)
        problem = differs(run, reference) if code == 0 else f"ended with {code}"
        tally.count(not problem, f"step {step}: {problem}")
    return tally


def die_after_call(number: int, *, half: bool = False) -> Callable[[], int]:
    """End the process after `number` system calls; returns a function that counts them.

    With `half`, a write that is the last call writes only half of its bytes.
    """
    done = 0

    def counted(inner: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == number and half and name == "write":
                inner(args[0], args[1][: len(args[1]) // 2])
                os._exit(_DIED)
            result = inner(*args, **options)
            if done == number:
                os._exit(_DIED)
            return result

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name), name))
    return lambda: done


def faults_in_a_save(count: int, folder: Path) -> Tally:
    """Death after each call of a save and in the middle of each write; the old state or the new.

    `count` is a limit; a save has about 100 such places.
    """
    tally = Tally("died after a call of a save: old state or new, resumed, bitwise the same")
    reference, before = fresh(folder, "reference"), fresh(folder, "before")
    assert in_child(lambda: train(reference, steps=12)) == 0

    def up_to(run: Path, steps: int) -> None:
        # A run of 12 steps, stopped after `steps` of them.
        fit = Trainer.fit
        Trainer.fit = lambda self, should_stop: fit(  # type: ignore[method-assign]
            self, lambda: self.progress.step >= steps
        )
        train(run, steps=12) if not run.exists() else resume(run)
        Trainer.fit = fit  # type: ignore[method-assign]

    assert in_child(lambda: up_to(before, 6)) == 0
    total = Child(lambda flag: _count_calls(flag, before, folder))
    assert total.wait() == 0
    points = [(n, half) for n in range(1, total.flag.value + 1) for half in (False, True)]
    if count < len(points):
        points = random.Random(0).sample(points, count)
    writes = 0
    for number, half in points:
        run = fresh(folder)
        shutil.copytree(before, run)
        old = (run / "last.state.safetensors").read_bytes()

        def work(run: Path = run, number: int = number, half: bool = half) -> None:
            die_after_call(number, half=half)
            _save_after_three_steps(run)

        if in_child(work) != _DIED:
            continue
        writes += half
        state = (run / "last.state.safetensors").read_bytes()
        step = RunFolder(run).load_state()[0].progress.step
        intact = state == old if step == 6 else step == 9
        code = in_child(lambda run=run: resume(run))  # type: ignore[misc]
        problem = differs(run, reference) if code == 0 else f"resuming ended with {code}"
        tally.count(intact and not problem, f"call {number}: step {step}, {problem}")
    tally.note = f"{writes} of them in the middle of a write"
    return tally


def _save_after_three_steps(run: Path) -> None:
    fit = Trainer.fit
    Trainer.fit = lambda self, should_stop: fit(  # type: ignore[method-assign]
        self, lambda: self.progress.step >= 9
    )
    resume(run)


def _count_calls(flag: Flag, before: Path, folder: Path) -> None:
    run = fresh(folder, "counted")
    shutil.copytree(before, run)
    calls = die_after_call(10**9)
    _save_after_three_steps(run)
    flag.value = calls()
