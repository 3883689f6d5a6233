"""A run that ends at any moment: killed, dead after a call of a save, signalled, on a full disk."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mygpt.errors import Interrupted, StorageError
from mygpt.training.checkpointing import Checkpointer
from mygpt.training.run import RunFolder
from mygpt.training.trainer import Trainer
from torture import Tally
from torture.runs import (
    Child,
    Flag,
    fresh,
    in_child,
    reference_of,
    resume,
    resumes_differently,
    stopping_after,
    temporary_files,
    text_file,
    train,
)

_STATE = "last.state.safetensors"


def _step_of(run: Path) -> int:
    return RunFolder(run).load_state()[0].progress.step


# SIGKILL


def _train_counting_saves(flag: Flag, run: Path) -> None:
    """Train; the flag is odd during every save, and even otherwise."""
    inner = Checkpointer.save

    def save(*arguments: Any, **options: Any) -> None:
        flag.value += 1
        inner(*arguments, **options)
        flag.value += 1

    Checkpointer.save = save
    train(run)


def kill_at_random(count: int, folder: Path) -> Tally:
    """SIGKILL at random moments, more than half of them during a save; then resume to the end."""
    tally = Tally("killed at a random moment, resumed, bitwise the same")
    reference = reference_of(folder)
    rng, inside, saves = random.Random(0), 0, 11
    for trial in range(count):
        run = fresh(folder)
        child = Child(_train_counting_saves, run)
        in_a_save = trial % 4 > 0  # up to 3 ms into one of the saves
        child.wait_for(2 * rng.randrange(saves) + 1 if in_a_save else 1)
        time.sleep(rng.random() * (0.003 if in_a_save else 0.25))
        child.send(signal.SIGKILL)
        inside += child.flag.value % 2
        child.wait()
        problem = resumes_differently(run, reference)
        tally.count(not problem, f"trial {trial}: {problem}")
    tally.note = f"{inside} of them during a save"
    return tally


def stop_at_every_step(count: int, folder: Path) -> Tally:
    """A run of `count` steps, stopped after each of them and resumed."""
    tally = Tally("stopped after a step, resumed, bitwise the same")
    options: dict[str, Any] = {"steps": count, "save_every": 0, "eval_every": 20}
    reference = reference_of(folder, **options)
    for step in range(1, count + 1):

        def stop_then_resume(run: Path, step: int = step) -> None:
            with stopping_after(step):
                train(run, **options)
            assert _step_of(run) == step
            resume(run)

        problem = resumes_differently(fresh(folder), reference, stop_then_resume)
        tally.count(not problem, f"step {step}: {problem}")
    return tally


# Death after every call of a save. The system calls, by the names in `os` that mygpt uses:

_CALLS = ("open", "write", "fsync", "link", "replace", "unlink", "ftruncate", "close")
_DIED = 77


def _die_after_call(number: int, *, half: bool = False) -> Callable[[], int]:
    """End the process after `number` system calls; returns a function that counts them.

    With `half`, a write that is the last call writes only half of its bytes.
    """
    done = 0

    def counted(inner: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == number and half and name == "write":
                args = args[0], args[1][: len(args[1]) // 2]
            result = inner(*args, **options)
            if done == number:
                os._exit(_DIED)
            return result

        return call

    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name), name))
    return lambda: done


def _save_after_three_steps(flag: Flag, run: Path, dies_after: int, half: bool = False) -> None:
    """Resume a run of 6 steps, and save it after 9; the flag counts the calls."""
    calls = _die_after_call(dies_after, half=half)
    with stopping_after(9):
        resume(run)
    flag.value = calls()


def faults_in_a_save(count: int, folder: Path) -> Tally:
    """Death after each call of a save and in the middle of each write; the old state or the new.

    `count` is a limit; a save has about 100 such places.
    """
    tally = Tally("died after a call of a save: old state or new, resumed, bitwise the same")
    reference, before = reference_of(folder, steps=12), fresh(folder, "before")

    def half_of_it() -> None:
        with stopping_after(6):
            train(before, steps=12)

    assert in_child(half_of_it) == 0
    undisturbed = Child(
        _save_after_three_steps, shutil.copytree(before, fresh(folder, "counted")), 10**9
    )
    assert undisturbed.wait() == 0
    calls = range(1, undisturbed.flag.value + 1)
    points = [(number, half) for number in calls for half in (False, True)]
    if count < len(points):
        points = random.Random(0).sample(points, count)
    old, writes = (before / _STATE).read_bytes(), 0
    for number, half in points:
        run = shutil.copytree(before, fresh(folder))
        if Child(_save_after_three_steps, run, number, half).wait() != _DIED:
            continue
        writes += half
        step = _step_of(run)
        intact = (run / _STATE).read_bytes() == old if step == 6 else step == 9
        problem = resumes_differently(run, reference)
        tally.count(intact and not problem, f"call {number}: step {step}, {problem}")
    tally.note = f"{writes} of them in the middle of a write"
    return tally


# Signals

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def _train_until_signalled(flag: Flag, run: Path) -> None:
    """As the command: a run that a signal ended has exit code 128 + the signal's number."""
    for number in _SIGNALS:  # a shell that starts this in the background has some ignored
        default = number == signal.SIGINT and signal.default_int_handler
        signal.signal(number, default or signal.SIG_DFL)
    inner = Trainer.fit

    def fit(self: Trainer, should_stop: Callable[[], bool]) -> None:
        flag.value = 1
        inner(self, should_stop)

    Trainer.fit = fit
    try:
        train(run)
    except KeyboardInterrupt as error:
        os._exit(128 + (error.signal if isinstance(error, Interrupted) else signal.SIGINT))


def signalled_at_random(count: int, folder: Path) -> Tally:
    """A signal at a random moment of training; each third run gets a second one at once."""
    tally = Tally(
        "signalled: a state, the right code, no temporary files, resumed bitwise the same"
    )
    reference, rng, finished = reference_of(folder), random.Random(0), 0
    for trial in range(count):
        run = fresh(folder)
        child = Child(_train_until_signalled, run)
        child.wait_for(1)
        time.sleep(0.002 + rng.random() * 0.25)
        number = rng.choice(_SIGNALS)
        for _ in range(2 if trial % 3 == 2 else 1):
            if child.alive():
                child.send(number)
            time.sleep(rng.random() * 0.01)
        code = child.wait()
        # A signal after the end of the run finds the default handler again.
        finished += code in (0, -number)
        left = temporary_files(run)
        problem = resumes_differently(run, reference)
        ok = code in (128 + number, 0, -number) and not left and not problem
        tally.count(ok, f"trial {trial}: code {code} for {number}, {left}, {problem}")
    tally.note = f"{finished} had finished before the signal"
    return tally


# Full disks

_FULL = 3  # the exit code of a full disk


@contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of that many bytes at `folder`; False where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and os.name == "posix"
    mounted = mounted and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(count: int, folder: Path) -> Tally:
    """A disk that is full at `count` points of a run: exit code 3, and nothing is lost.

    Then the disk has space again, and the run is resumed to the same end.
    """
    tally = Tally("disk full: code 3, the previous state intact, resumed bitwise the same")
    reference, disk, full = reference_of(folder), folder / "disk", 0
    needed = sum(path.stat().st_size for path in reference.iterdir())
    for trial in range(count):
        free = 4096 * (8 + (needed * 2 // 4096 - 8) * trial // max(1, count - 1))
        with _small_disk(disk, 16 * needed) as mounted:
            if not mounted:
                tally.note = "not run: mounting is not allowed here"
                return tally
            text_file(disk)
            run, filler = disk / "run", disk / "filler"
            filler.write_bytes(b"\0" * (shutil.disk_usage(disk).free - free))
            code = in_child(_train_until_full, run)
            full += code == _FULL
            begun = (run / _STATE).exists()  # or not even the first state fitted
            kept = f"kept step {_step_of(run)}" if begun else ""
            left = temporary_files(run)
            filler.unlink()
            if not begun:
                shutil.rmtree(run, ignore_errors=True)
            problem = resumes_differently(run, reference, resume if begun else train)
            ok = code in (0, _FULL) and not left and not problem
            tally.count(ok, f"{free:,} bytes free: code {code}, {kept}, {left}, {problem}")
    tally.note = f"{full} runs filled the disk"
    return tally


def _train_until_full(run: Path) -> None:
    """As the command: a `StorageError` is exit code 3."""
    try:
        train(run)
    except StorageError as error:
        expected = all(part in str(error) for part in ("No space left", "free there"))
        os._exit(error.exit_code if expected else 98)
