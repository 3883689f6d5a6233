"""`mygpt train` as a user starts it, observed from outside while it runs.

Whenever the command has written a model, a hard link to the file is made (which does not delay the
command), with the seconds since the start of the process; lines of its log likewise. Afterwards
each model is evaluated as those of the other contestants.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.generation.rounds import environment
from benchmarks.training.scoring import saved_loss

_CHECK_EVERY_S = 0.1


@dataclass
class Watch:
    """The models and log lines of a run's folder, with the times when they appeared.

    Attributes:
        run: the output folder of `mygpt train`.
        kept: a folder on the same disk for links to the models.
        began: time.monotonic() when the command was started.
        models: (seconds, "best" or "last", link) of each model.
        log: (seconds, record) of each log line.
    """

    run: Path
    kept: Path
    began: float
    models: list[tuple[float, str, Path]] = field(default_factory=list)
    log: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kept.mkdir(parents=True)
        self._seen: dict[str, tuple[int, int]] = {}
        self._read_bytes = 0

    def check(self) -> None:
        """Record new models and log lines."""
        seconds = time.monotonic() - self.began
        for name in ("best", "last"):
            with contextlib.suppress(FileNotFoundError):
                self._keep(name, seconds)
        with contextlib.suppress(FileNotFoundError):
            self._read_log(seconds)

    def _keep(self, name: str, seconds: float) -> None:
        source = self.run / f"{name}.safetensors"
        if _identity(source) == self._seen.get(name):
            return
        link = self.kept / f"{len(self.models):04}-{name}.safetensors"
        try:
            os.link(source, link)
        except FileNotFoundError:
            raise
        except OSError:  # a disk that has no hard links
            self._seen[name] = _identity(source)
            shutil.copyfile(source, link)
        else:
            self._seen[name] = _identity(link)
        self.models.append((seconds, name, link))

    def _read_log(self, seconds: float) -> None:
        with (self.run / "log.jsonl").open("rb") as lines:
            lines.seek(self._read_bytes)
            complete = lines.read().rpartition(b"\n")[0]
        if complete:
            self._read_bytes += len(complete) + 1
            self.log += [(seconds, json.loads(line)) for line in complete.split(b"\n")]


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def run(
    text: Path, seconds: float, work: Path, *, flags: Sequence[str] = (), seed: int = 0
) -> tuple[float, Watch]:
    """Run the command with `--minutes` for these seconds; its wall time and its models and log.

    Raises:
        RuntimeError: when the command fails; the message ends with its last lines of output.
    """
    command = [sys.executable, "-m", "mygpt", "train", str(text.resolve())]
    command += ["--minutes", str(seconds / 60.0), "--output", str(work / "run"), *flags]
    command += ["--seed", str(seed)] if seed else []
    with (work / "printed.txt").open("w+", encoding="utf-8") as printed:
        watch = Watch(work / "run", work / "kept", time.monotonic())
        process = subprocess.Popen(
            command, cwd=work, env=environment(None), stdout=printed, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            watch.check()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_CHECK_EVERY_S)
        wall_s = time.monotonic() - watch.began
        watch.check()
        if process.returncode:
            printed.seek(0)
            last = "\n".join(printed.read().strip().splitlines()[-5:])
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{last}")
    return wall_s, watch


def scored(wall_s: float, watch: Watch, test: str) -> dict[str, Any]:
    """Evaluate every model of the run; the results as plain values.

    "points" are the losses of the models that were best by its own validation at that time.
    "own_points" are the validation losses of its log, in the window of its validation.
    """
    final = next(watch.run / f"{n}.safetensors" for n in ("best", "last") if _there(watch, n))
    bests = [(s, path) for s, name, path in watch.models if name == "best"]
    if not bests:
        bests = [(s, path) for s, name, path in watch.models if name == "last"]
    end = saved_loss(final, test)
    points = [(seconds, saved_loss(path, test)["loss"]) for seconds, path in bests]
    last = watch.run / "last.safetensors"
    nats = math.log(2) * len(test.encode()) / len(test)  # per character, of a bit per byte
    log = [(s, record) for s, record in watch.log if "val_bits_per_byte" in record]
    return {
        "seconds": wall_s,
        "points": [*points, (wall_s, end["loss"])],
        "own_points": [(s, nats * record["val_bits_per_byte"]) for s, record in log],
        "last_loss": saved_loss(last, test)["loss"] if last.exists() else None,
        **_length(record for _, record in watch.log),
        **end,
    }


def _length(records: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Steps and tokens of a log; steps after its last record count with that record's mean."""
    step = counted_step = counted_tokens = 0
    for record in records:
        step = max(step, record["step"])
        if "tokens" in record:
            counted_step, counted_tokens = record["step"], record["tokens"]
    return {"step": step, "tokens": round(counted_tokens * step / max(1, counted_step))}


def _there(watch: Watch, name: str) -> bool:
    return (watch.run / f"{name}.safetensors").exists()
