"""SIGINT and SIGTERM at any moment of any command: while kernels compile, and inside long steps."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mygpt.training.run import RunFolder
from torture import Figure
from torture.runs import TEXT

_LIMIT_S = 1.0
# Where other programs keep the cores busy, a process waits for one.
_BUSY_LIMIT_S = 4.0
_STARTING_S = 0.5  # until which Python may not have run the first line of ours
_TRAIN = ["train", "text.txt", "--overwrite", "-o", "runs/new", "--steps"]
# Steps of more than 10 s: our kernels', and torch's for a width that those do not have.
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
    """How a command ended: its code, seconds since the last signal, and what it printed."""

    code: int
    seconds: float
    out: str
    err: str
    signals: int
    started_s: float


def interrupted_at_random(count: int, folder: Path) -> Figure:
    """A third while kernels compile, a third inside long steps, the rest anywhere."""
    figure = Figure("interrupted: ended within a second, the right code, no traceback, a state")
    wait_s = 8.0 if count > 20 else 1.0
    _set_up(folder)
    chance, slowest, finished, early = random.Random(0), 0.0, 0, 0
    for trial in range(count):
        kind = trial % 3
        command = chance.choice((_COMPILING, _LONG, _OTHERS)[kind])
        number = chance.choice((signal.SIGINT, signal.SIGTERM))
        shutil.rmtree(folder / "cache", ignore_errors=True)
        end = _interrupted(command, number, folder, chance, kind, wait_s)
        before_ours = end.started_s < _STARTING_S and end.code == -number and not end.out
        early += before_ours
        finished += end.code in (0, -number) and not before_ours
        slowest = max(slowest, end.seconds)
        limit_s = _LIMIT_S if os.getloadavg()[0] <= (os.cpu_count() or 1) else _BUSY_LIMIT_S
        problem = _state_problem(folder / "runs")
        left = _left_over(str(folder))
        right = end.code == 128 + number or end.code in (0, -number)
        ok = right and end.seconds <= limit_s and not problem and not left
        ok &= before_ours or "Traceback" not in end.err
        figure.count(
            ok,
            f"trial {trial}: {' '.join(command)}: code {end.code} for {end.signals} of {number} "
            f"after {end.started_s:.2f} s, ended in {end.seconds:.2f} s, {problem}, {left}, "
            f"{end.err[-300:]!r}",
        )
    figure.note = (
        f"the slowest in {slowest:.2f} s; {finished} had finished before it came, {early} had not "
        "begun"
    )
    return figure


def _set_up(folder: Path) -> None:
    (folder / "text.txt").write_text(TEXT * 6)  # 50,000 characters
    (folder / "long.txt").write_text(TEXT * 2000)
    _run([*_TRAIN[:-2], "runs/old", "--steps", "5", "--quiet"], folder).communicate()


def _run(args: list[str], folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "mygpt", *args],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TORTURE": str(folder), **environment},
        # A shell that starts us in the background has us ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _interrupted(
    command: list[str],
    number: int,
    folder: Path,
    chance: random.Random,
    kind: int,
    wait_s: float,
) -> _End:
    empty = {"MYGPT_CACHE": str(folder / "cache")} if kind == 0 else {}
    process = _run(command, folder, **empty)
    began = time.monotonic()
    printed: list[bytearray] = [bytearray(), bytearray()]
    readers = [
        threading.Thread(target=_read, args=(stream, text))
        for stream, text in zip((process.stdout, process.stderr), printed, strict=True)
    ]
    for reader in readers:
        reader.start()
    if kind == 1:  # the line before the first step
        while b"to beat" not in printed[0] and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.2 + wait_s * chance.random())
    else:
        time.sleep(0.05 + chance.random() * min(wait_s, chance.choice((0.2, 2.0, 7.0))))
    last = time.monotonic()
    started_s = last - began
    sent = 0
    if process.poll() is None:
        process.send_signal(number)
        sent = 1
    if _has_a_state(command):  # it may finish its step: then a second one comes
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1 + 1.5 * chance.random())
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
    for reader in readers:
        reader.join(timeout=5)
    out, err = (text.decode(errors="replace") for text in printed)
    return _End(code, seconds, out, err, sent, started_s)


def _has_a_state(command: list[str]) -> bool:
    return command[0] in ("train", "demo", "reproduce")


def _read(stream: IO[bytes], text: bytearray) -> None:
    with stream:
        while data := stream.read1():  # type: ignore[attr-defined]
            text += data
            del text[:-20_000]


def _state_problem(runs: Path) -> str:
    """What is wrong with the states that are there; empty if nothing is."""
    for run in sorted(runs.iterdir()):
        if (run / "last.state.safetensors").exists():
            try:
                RunFolder(run).load_state()
            except Exception as error:
                return f"{run.name}: {error}"
    return ""


def _left_over(mark: str) -> list[str]:
    """Commands of processes that are still there after a while; Linux alone tells."""
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
