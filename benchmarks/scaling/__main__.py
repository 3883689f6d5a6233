"""Training speed with several processes and with a token store, compared with plain training.

`python -m benchmarks.scaling TEXT [processes|stores] [--rounds N]`, on a machine that does
nothing else. Speeds are those of the training steps, from the runs' logs; ratios are medians of the
ratios of each round, in which all are measured one after the other.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

_ENDLESS = "1000000000"
_VALIDATION_TEXT = "To be or not to be, that is the question.\n"


@dataclass(frozen=True)
class Way:
    """One way to train."""

    name: str
    processes: int
    threads: int
    text: Path
    options: tuple[str, ...]


def main(
    text: Path,
    what: Annotated[str, typer.Argument(help="processes, stores, or all")] = "all",
    rounds: int = 3,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        validation = Path(folder, "validation.txt")
        validation.write_text(_VALIDATION_TEXT * 20)
        quiet = ("--val-file", str(validation), "--sample-tokens", "0", "--save-seconds", _ENDLESS)
        if what in ("processes", "all"):
            medium = ("--preset", "medium", "--batch-size", "32", "--steps", "4", *quiet)
            ways = [
                Way("1 process, 1 thread", 1, 1, text, medium),
                Way("2 processes, 1 thread each", 2, 1, text, medium),
                Way("2 processes, 1 thread each, sharded", 2, 1, text, (*medium, "--shard")),
                Way("1 process, 2 threads", 1, 2, text, medium),
            ]
            print("10.7 million parameters (preset medium), 32 windows of 256 per step:")
            compare(ways, rounds)
        if what in ("stores", "all"):
            store = Path(folder, "store")
            command = ["tokenize", str(text), "--out", str(store), "--tokenizer", "char"]
            mygpt([*command, "--quiet"], 1, 2)
            # Both validate on the same tokens, the last ones of the text: no file is named.
            small = ("--preset", "nano", "--steps", "1200", *quiet[2:], "--eval-every", _ENDLESS)
            ways = [Way("memory", 1, 2, text, small), Way("store", 1, 2, store, small)]
            print("217,000 parameters (preset nano), 16 windows of 64 per step:")
            compare(ways, rounds)


def compare(ways: list[Way], rounds: int) -> None:
    """Measure each way once per round, and print its ratio to the first one."""
    speeds: dict[str, list[float]] = {way.name: [] for way in ways}
    for number in range(rounds):
        order = ways if number % 2 == 0 else ways[::-1]
        for way in order:
            speeds[way.name].append(speed(way))
    first = speeds[ways[0].name]
    for name, found in speeds.items():
        ratios = [own / other for own, other in zip(found, first, strict=True)]
        print(
            f"  {name:<38} {statistics.median(found):>9,.0f} tokens/s  "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )


def speed(way: Way) -> float:
    """Tokens per second from the first step to the last."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        command = ["train", str(way.text), "--output", str(run), "--print-every", "1", "--quiet"]
        mygpt([*command, *way.options], way.processes, way.threads)
        records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    seconds = steps[-1]["elapsed_s"] - steps[0]["elapsed_s"]
    return float((steps[-1]["tokens"] - steps[0]["tokens"]) / seconds)


def mygpt(arguments: list[str], processes: int, threads: int) -> None:
    start = ["-m", "mygpt"]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        start = [*torchrun, *start]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, *start, *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)


if __name__ == "__main__":
    typer.run(main)
