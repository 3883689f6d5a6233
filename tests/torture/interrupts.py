"""SIGINT and SIGTERM at any moment of any command, also while kernels compile or a step is long."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mygpt.training.run import RunFolder
from torture import Tally
from torture.runs import TEXT

_LIMIT_S = 1.0
# With all cores busy, a process waits for one.
_BUSY_LIMIT_S = 4.0
_STARTING_S = 0.5  # in which Python may not have reached the first line of mygpt
_TRAIN = ["train", "text.txt", "--overwrite", "-o", "runs/new", "--steps"]
# Steps of more than 10 s: in machine code, and in torch, for a width that machine code lacks.
_LONG = [
    [*_TRAIN, "3", "--max-seq-len", "40000"],
    [*_TRAIN, "3", "--max-seq-len", "16000", "--batch-size", "6", "--embed-dim", "40"],
]
_COMPILING = [
    ["warmup"],
    [*_TRAIN, "100000"],
    ["generate", "-c", "runs/old", "--engine", "cpu", "-p", "a", "-n", "10000000"],
]
_OTHERS = [
    [*_TRAIN, "100000"],
    ["train", "--resume", "runs/old", "--steps", "100000"],
    ["generate", "-c", "runs/old", "-p", "a", "-n", "10000000"],
    ["generate", "-c", "runs/old", "--engine", "torch", "-p", "a", "-n", "10000000"],
    ["serve", "runs/old", "--port", "0"],
    ["eval", "runs/old", "text.txt"],
    ["tokenize", "long.txt", "--out", "store", "--tokenizer", "bpe:1000", "--overwrite"],
    ["explain", "runs/old", "-p", "abc", "--terminal"],
    ["report", "runs/old"],
    ["reproduce", "runs/old"],
    ["doctor", "runs/old"],
    ["demo", "-o", "runs/demo", "--overwrite"],
    ["plan", "runs/old"],
    ["info", "runs/old"],
]


@dataclass
class _End:
    """How a command ended: its code, the seconds since the last signal, and its output."""

    code: int
    seconds: float
    out: bytes
    err: bytes
    signals: int
    started_s: float


def interrupted_at_random(count: int, folder: Path) -> Tally:
    """A third while kernels compile, a third during long steps, the rest at any moment."""
    tally = Tally(
        "interrupted: ended within a second, the right code, no traceback, a readable state"
    )
    wait_s = 8.0 if count > 20 else 1.0
    _set_up(folder)
    rng, slowest, finished, early = random.Random(0), 0.0, 0, 0
    for trial in range(count):
        kind = trial % 3
        command = rng.choice((_COMPILING, _LONG, _OTHERS)[kind])
        number = rng.choice((signal.SIGINT, signal.SIGTERM))
        shutil.rmtree(folder / "cache", ignore_errors=True)
        end = _interrupted(command, number, folder, rng, kind, wait_s)
        before_start = end.started_s < _STARTING_S and end.code == -number and not end.out
        early += before_start
        finished += end.code in (0, -number) and not before_start
        slowest = max(slowest, end.seconds)
        limit_s = _LIMIT_S if os.getloadavg()[0] <= (os.cpu_count() or 1) else _BUSY_LIMIT_S
        problem = _state_problem(folder / "runs")
        left = _left_over(str(folder))
        right = end.code == 128 + number or end.code in (0, -number)
        ok = right and end.seconds <= limit_s and not problem and not left
        ok &= before_start or b"Traceback" not in end.err
        tally.count(
            ok,
            f"trial {trial}: {' '.join(command)}: code {end.code} for {end.signals} of {number} "
            f"after {end.started_s:.2f} s, ended in {end.seconds:.2f} s, {problem}, {left}, "
            f"{end.err[-300:]!r}",
        )
    tally.note = (
        f"the slowest in {slowest:.2f} s; {finished} had finished before the signal, {early} had "
        "not started"
    )
    return tally


def _set_up(folder: Path) -> None:
    (folder / "text.txt").write_text(TEXT * 6)  # 50,000 characters
    (folder / "long.txt").write_text(TEXT * 2000)
    _run([*_TRAIN[:-2], "runs/old", "--steps", "5", "--quiet"], folder).wait()


def _run(args: list[str], folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    """The command; it prints to the files `out` and `err`."""
    with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "mygpt", *args],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, "TORTURE": str(folder), **environment},
            # A shell that starts this in the background has it ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def _interrupted(
    command: list[str], number: int, folder: Path, rng: random.Random, kind: int, wait_s: float
) -> _End:
    empty = {"MYGPT_CACHE": str(folder / "cache")} if kind == 0 else {}
    process = _run(command, folder, **empty)
    began = time.monotonic()
    out, err = folder / "out", folder / "err"
    if kind == 1:  # the line before the first step
        while b"baselines" not in out.read_bytes() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.2 + wait_s * rng.random())
    else:
        time.sleep(0.05 + rng.random() * min(wait_s, rng.choice((0.2, 2.0, 7.0))))
    last = time.monotonic()
    started_s = last - began
    sent = 0
    if process.poll() is None:
        process.send_signal(number)
        sent = 1
    if _has_a_state(command):  # it may finish its step; a second signal ends it at once
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1 + 1.5 * rng.random())
        if process.poll() is None:
            last = time.monotonic()
            process.send_signal(number)
            sent = 2
    try:
        code = process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    seconds = time.monotonic() - last
    return _End(code, seconds, out.read_bytes(), err.read_bytes(), sent, started_s)


def _has_a_state(command: list[str]) -> bool:
    return command[0] in ("train", "demo", "reproduce")


def _state_problem(runs: Path) -> str:
    """The first state that cannot be loaded, and why; empty if all can."""
    for run in sorted(runs.iterdir()):
        if (run / "last.state.safetensors").exists():
            try:
                RunFolder(run).load_state()
            except Exception as error:
                return f"{run.name}: {error}"
    return ""


def _left_over(mark: str) -> list[str]:
    """Command lines of processes that still run after 3 s, as Linux lists them."""
    end = time.monotonic() + 3.0
    while (found := _processes(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def _processes(mark: str) -> list[str]:
    wanted = re.compile(rb"(^|\0)TORTURE=" + re.escape(os.fsencode(mark)) + rb"(\0|$)")
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted.search((folder / "environ").read_bytes()):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found
