"""What the torture tests of training share: a tiny run, a process for it, and a comparison.

Each run is in a forked child of a process that has imported everything, with one thread, so that
hundreds of them take minutes.
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mygpt import training
from mygpt.checkpoint.container import read_arrays
from mygpt.training.trainer import Trainer
from training_runs import log, silent

TEXT = "".join(f"{n} green bottles hanging on the wall, {n * n} of them. " for n in range(150))
OPTIONS: dict[str, Any] = {
    "preset": "nano",
    "embed_dim": 8,
    "num_heads": 2,
    "num_layers": 1,
    "max_seq_len": 16,
    "batch_size": 2,
    "dropout": 0.1,
    "steps": 30,
    "print_every": 1,
    "eval_every": 6,
    "save_every": 3,
    "sample_tokens": 0,
    "device": "cpu",
}


def text_file(folder: Path) -> str:
    """The text that the tiny runs train on."""
    path = folder / "bottles.txt"
    if not path.exists():
        path.write_text(TEXT)
    return str(path)


def train(run: Path, **options: Any) -> None:
    """Begin a tiny run."""
    text = text_file(run.parent)
    training.train(text, output=run, listener=silent, **{**OPTIONS, **options})


def resume(run: Path) -> None:
    """Resume it."""
    training.resume(run, listener=silent)


@contextmanager
def stopping_after(step: int) -> Iterator[None]:
    """Every run stops, with a save, after this step."""
    fit = Trainer.fit
    Trainer.fit = lambda self, _: fit(self, lambda: self.progress.step >= step)
    try:
        yield
    finally:
        Trainer.fit = fit


def warm() -> None:
    """Import what the first optimizer imports, before the first fork."""
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)


class Flag:
    """A number in memory that a process shares with its children."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    @property
    def value(self) -> int:
        return struct.unpack("q", self._memory[:8])[0]

    @value.setter
    def value(self, number: int) -> None:
        self._memory[:8] = struct.pack("q", number)


class Child:
    """A forked process that calls `work(flag, *arguments)`; both processes see the same `flag`.

    It ends with 0, or with 99 after an exception that `work` let through.
    """

    def __init__(self, work: Callable[..., Any], *arguments: Any) -> None:
        warm()
        self.flag = Flag()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                torch.set_num_threads(1)
                work(self.flag, *arguments)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code; minus a signal's number when that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def alive(self) -> bool:
        """Whether it still runs (it can be waited for later)."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait_for(self, value: int) -> None:
        """Wait until its flag has this value, or its end."""
        while self.flag.value < value and self.alive():
            time.sleep(0.0001)


def in_child(work: Callable[..., Any], *arguments: Any, **options: Any) -> int:
    """Call `work` in a child process; its exit code."""
    return Child(lambda _: work(*arguments, **options)).wait()


def reference_of(folder: Path, **options: Any) -> Path:
    """An undisturbed run."""
    run = fresh(folder, "reference")
    assert in_child(train, run, **options) == 0
    return run


def differs(run: Path, reference: Path) -> str:
    """The first bitwise difference between two runs; empty if there is none."""
    for name in ("last.state.safetensors", "best.safetensors", "last.safetensors"):
        ours, theirs = read_arrays(run / name)[0], read_arrays(reference / name)[0]
        if ours.keys() != theirs.keys():
            return f"{name} holds other arrays"
        for key, array in ours.items():
            if not np.array_equal(array, theirs[key]):
                return f"{key} of {name} differs"
    if log(run) != log(reference):
        return "the log differs"
    left = temporary_files(run)
    return f"{left} were left" if left else ""


def resumes_differently(run: Path, reference: Path, work: Callable[..., Any] = resume) -> str:
    """Resume a run in a child; what then differs from the reference, empty if nothing does."""
    code = in_child(work, run)
    return differs(run, reference) if code == 0 else f"resuming ended with {code}"


def temporary_files(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob(".mygpt-*"))


def fresh(folder: Path, name: str = "run") -> Path:
    """The path of a new run."""
    run = folder / name
    shutil.rmtree(run, ignore_errors=True)
    return run
