"""What the torture tests of training share: a tiny run, a process for it, and a comparison.

Each run is in a forked child of a process that has imported everything, with one thread, so that
hundreds of them take minutes.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import struct
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mygpt import training
from mygpt.checkpoint.container import read_arrays
from mygpt.training.events import Event

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


def silent(event: Event) -> None:
    """A listener that ignores every event."""


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


def resume(run: Path, **options: Any) -> None:
    """Resume it."""
    training.resume(run, listener=silent, **options)


def warm() -> None:
    """Import what the first optimizer imports, before the first fork."""
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)


class Child:
    """A forked process that calls `work(flag)`; both processes see the same `flag`.

    It ends with 0, or with 99 after an exception that `work` let through.
    """

    def __init__(self, work: Callable[[Flag], Any]) -> None:
        warm()
        self.flag = Flag()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                torch.set_num_threads(1)
                work(self.flag)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def kill(self) -> None:
        """Send SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code; minus a signal's number when that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def alive(self) -> bool:
        """Whether it still runs (it can be waited for later)."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


class Flag:
    """A whole number in memory that a process shares with its children."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    @property
    def value(self) -> int:
        """The number now."""
        return struct.unpack("q", self._memory[:8])[0]

    @value.setter
    def value(self, number: int) -> None:
        self._memory[:8] = struct.pack("q", number)


def in_child(work: Callable[[], Any]) -> int:
    """Call `work` in a child process; its exit code."""
    return Child(lambda _: work()).wait()


def log(run: Path) -> list[dict[str, Any]]:
    """The run's log without its times."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "elapsed_s"} for record in records]


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
    left = sorted(path.name for path in run.glob(".mygpt-*"))
    return f"{left} were left" if left else ""


def fresh(folder: Path, name: str = "run") -> Path:
    """The path of a new run."""
    run = folder / name
    shutil.rmtree(run, ignore_errors=True)
    return run


def until(flag: Flag, value: int, child: Child, *, limit_s: float = 60.0) -> bool:
    """Wait until the flag has that value; False when the child ended first."""
    end = time.monotonic() + limit_s
    while flag.value < value:
        if not child.alive() or time.monotonic() > end:
            return False
        time.sleep(0.0002)
    return True
