"""`mygpt train` as a user starts it, watched from outside while it runs.

Whenever the command has written a model, the file is kept (a hard link: the command loses no
time) with the seconds since the process began; so are the lines of its log. Afterwards each
model is scored as everyone's is.
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

_LOOK_EVERY_S = 0.1


@dataclass
class Watch:
    """What a run's folder shows from outside, and when.

    Attributes:
        run: the folder that `mygpt train` writes.
        kept: a folder on the same disk for the models' links.
        began: time.monotonic() when the command was started.
        models: (seconds, "best" or "last", link) of each model written.
        log: (seconds, record) of each line.
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

    def look(self) -> None:
        """Note what is new."""
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
            whole = lines.read().rpartition(b"\n")[0]
        if whole:
            self._read_bytes += len(whole) + 1
            self.log += [(seconds, json.loads(line)) for line in whole.split(b"\n")]


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def run(
    text: Path, seconds: float, work: Path, *, flags: Sequence[str] = (), seed: int = 0
) -> tuple[float, Watch]:
    """Run the command with `--minutes` for these seconds; its wall time and what was seen.

    Raises:
        RuntimeError: when the command fails; the message ends with its last lines.
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
            watch.look()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_EVERY_S)
        wall_s = time.monotonic() - watch.began
        watch.look()
        if process.returncode:
            printed.seek(0)
            last = "\n".join(printed.read().strip().splitlines()[-5:])
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{last}")
    return wall_s, watch


def scored(wall_s: float, watch: Watch, held: str) -> dict[str, Any]:
    """The watched run as plain values; scores every model that was kept.

    "points" are the models it would have left, had it been stopped there: the best by its own
    validation. "own_points" are its log's validation losses, in the window of its validation.
    """
    final = next(watch.run / f"{n}.safetensors" for n in ("best", "last") if _there(watch, n))
    bests = [(s, path) for s, name, path in watch.models if name == "best"]
    if not bests:
        bests = [(s, path) for s, name, path in watch.models if name == "last"]
    end = saved_loss(final, held)
    points = [(seconds, saved_loss(path, held)["loss"]) for seconds, path in bests]
    last = watch.run / "last.safetensors"
    nats = math.log(2) * len(held.encode()) / len(held)  # per character, of a bit per byte
    log = [(s, record) for s, record in watch.log if "val_bits_per_byte" in record]
    return {
        "seconds": wall_s,
        "points": [*points, (wall_s, end["loss"])],
        "own_points": [(s, nats * record["val_bits_per_byte"]) for s, record in log],
        "last_loss": saved_loss(last, held)["loss"] if last.exists() else None,
        **_length(record for _, record in watch.log),
        **end,
    }


def _length(records: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Steps and tokens of a log; what came after its last training record as that record's mean."""
    step = counted_step = counted_tokens = 0
    for record in records:
        step = max(step, record["step"])
        if "tokens" in record:
            counted_step, counted_tokens = record["step"], record["tokens"]
    return {"step": step, "tokens": round(counted_tokens * step / max(1, counted_step))}


def _there(watch: Watch, name: str) -> bool:
    return (watch.run / f"{name}.safetensors").exists()
