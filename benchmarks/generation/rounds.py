"""Contestants in separate processes, timed in turns; the load by other programs is measured too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.generation.cases import Case

ROOT = Path(__file__).resolve().parents[2]
TOLERATED_CORES = 0.1  # cores that other processes may use during a timing
QUIET_WAIT_S = 3.0  # longest wait for this before a timing
LEAST_S = 1.0  # a run is repeated for at least this long


def environment(threads: int | None) -> dict[str, str]:
    """Environment of a process of the benchmark; None: the program chooses its threads."""
    env = dict(os.environ, PYTHONPATH=f"{ROOT / 'src'}{os.pathsep}{ROOT}")
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    return env


@dataclass
class Contestant:
    """An engine with a number of threads (None: it chooses), and its measurements."""

    engine: str
    threads: int | None
    ids: list[list[int]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # tokens/s of each round
    others: list[float] = field(
        default_factory=list
    )  # cores that other programs used, in each round
    failure: str = ""

    @property
    def label(self) -> str:
        """Engine and thread count, for tables."""
        plural = "" if self.threads == 1 else "s"
        return f"{self.engine}, {self.threads or 'default'} thread{plural}"

    def start(self, case: Case, work: Path) -> None:
        """Start the process and wait for its warm-up to end."""
        spec = asdict(case) | {"engine": self.engine, "threads": self.threads, "work": str(work)}
        spec["checked"] = case.checked_tokens
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (stop closes it)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.generation.worker", json.dumps(spec)],
            cwd=ROOT,
            env=environment(self.threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.ids = self._answer().get("ids", [])

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line and not self.failure:
            self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:]
            self.failure = last[0] if last else f"ended with {self._process.returncode}"
        return json.loads(line) if line else {}

    def measure(self, patience: int) -> None:
        """One timing, repeated up to `patience` times while other programs use the processor."""
        best: tuple[float, float] | None = None
        for _ in range(patience + 1):
            await_quiet(QUIET_WAIT_S if patience else 0.0)
            began, busy, own = time.perf_counter(), _machine_s(), _process_s(self._process.pid)
            print(LEAST_S, file=self._process.stdin, flush=True)
            answer = self._answer()
            if self.failure:
                return
            elapsed = time.perf_counter() - began
            mine = _process_s(self._process.pid) - own
            others = max(0.0, _machine_s() - busy - mine) / elapsed
            rate = answer["tokens"] / answer["seconds"]
            if best is None or others < best[0]:
                best = (others, rate)
            if others < TOLERATED_CORES:
                break
        assert best is not None
        self.others.append(best[0])
        self.rates.append(best[1])

    def stop(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def await_quiet(longest_s: float) -> None:
    """Wait until no other process computes, the contestants measured before included."""
    end = time.perf_counter() + longest_s
    while True:
        busy, began = _machine_s(), time.perf_counter()
        time.sleep(0.2)
        used = (_machine_s() - busy) / (time.perf_counter() - began)
        if used < TOLERATED_CORES or time.perf_counter() > end:
            return


def _machine_s() -> float:
    """Processor time of all processes since boot in seconds, on Linux; elsewhere 0."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    ticks = [int(word) for word in first]
    return (sum(ticks[:8]) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # less idle, iowait


def _process_s(pid: int) -> float:
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def contestants(case: Case) -> list[Contestant]:
    """mygpt's engine with its own choice of threads, one and two; every peer with one and two."""
    found = [Contestant(case.ours, threads) for threads in (None, 1, 2)]
    return found + [Contestant(peer, threads) for peer in case.peers for threads in (1, 2)]


def run_case(case: Case, work: Path, rounds: int, patience: int) -> list[Contestant]:
    """All contestants of a case, timed in turns."""
    found = contestants(case)
    for one in found:
        one.start(case, work)
    for number in range(rounds):
        for one in found:
            if not one.failure:
                one.measure(patience)
            if one.rates[number:]:
                shown = f"{one.rates[number]:,.1f} tokens/s, others {one.others[number]:.2f}"
                print(f"  round {number + 1}: {one.label}: {shown}", flush=True)
    for one in found:
        one.stop()
    return found


def reference_ids(case: Case, work: Path) -> dict[str, list[list[int]]]:
    """The first tokens of the chapter's loop, with the model's GELU and with tanh GELU."""
    found = {}
    draw = "chapter draw" in case.peers
    for name in ("chapter draw" if draw else "chapter", "chapter tanh"):
        one = Contestant(name, None)
        one.start(case, work)
        one.stop()
        assert not one.failure, one.failure
        found["tanh" if name == "chapter tanh" else "own"] = one.ids
    return found


def equal_tokens(ids: list[list[int]], reference: list[list[int]]) -> tuple[int, int]:
    """How many tokens are equal before each row's first difference, and of how many."""
    equal = 0
    for row, expected in zip(ids, reference, strict=True):
        for one, other in zip(row, expected, strict=True):
            if one != other:
                break
            equal += 1
    return equal, sum(len(row) for row in reference)
