"""Validation loss against seconds: `mygpt train`, the tutorial's recipe and nanoGPT's.

Usage: python -m benchmarks.training.curves PATH [--seconds 150] [--rounds 1] [--tuning]
       [--only mygpt,nanogpt,tutorial] [--flags="--lr 0.01"] [--out docs/benchmarks]
in the folder above `benchmarks`, on a machine that does nothing else; needs matplotlib. Each
has the same time, importing its libraries included, one after the other, `rounds` times with
different seeds. All are trained on the first 90% of the text and evaluated on the last 10%;
`--tuning` removes these last 10% first, for all but the final measurement, and names its files
`training-tuning.*`. Writes a JSON file, a plot and `training.md`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.generation.rounds import QUIET_WAIT_S, ROOT, await_quiet, environment
from benchmarks.training import report, watched
from benchmarks.training.load import Others
from benchmarks.training.scoring import cut_of

CONTESTANTS = ("mygpt", "nanogpt", "tutorial")


def prepared(path: Path, work: Path, *, tuning: bool) -> Path:
    """Copy the text for all contestants: all of it, or for tuning only the first 90%."""
    text = path.read_text(encoding="utf-8")
    copy = work / "text.txt"
    copy.write_text(text[: cut_of(text)] if tuning else text, encoding="utf-8", newline="")
    return copy


def run_ours(
    text: Path, seconds: float, work: Path, *, seed: int, flags: list[str]
) -> dict[str, Any]:
    """Run `mygpt train` for these seconds, then evaluate every model that it wrote."""
    others = Others()
    wall_s, watch = watched.run(text, seconds, work, flags=flags, seed=seed)
    busy = others.cores()
    content = text.read_text(encoding="utf-8")
    return {**watched.scored(wall_s, watch, content[cut_of(content) :]), "others_cores": busy}


def run_recipe(name: str, text: Path, seconds: float, work: Path, *, seed: int) -> dict[str, Any]:
    """Run a plain recipe for these seconds; it is evaluated meanwhile with its clock stopped."""
    records = work / f"{name}.jsonl"
    others = Others()
    command = [sys.executable, "-m", "benchmarks.training.budgeted", name, str(text), str(records)]
    command += ["--seconds", str(seconds), "--began", str(time.monotonic()), "--seed", str(seed)]
    subprocess.run(command, cwd=ROOT, env=environment(None), check=True)
    busy = others.cores()
    found = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    points = [(record["seconds"], record["loss"]) for record in found]
    return {**found[-1], "points": points, "others_cores": busy}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Results of all contestants, measured in turns, as plain values."""
    names = [name for name in CONTESTANTS if name in options.only.split(",")]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        text = prepared(options.path, Path(folder), tuning=options.tuning)
        for number in range(options.rounds):
            for name in names:
                work = Path(folder) / f"{name}-{number}"
                work.mkdir()
                await_quiet(QUIET_WAIT_S)
                if name == "mygpt":
                    flags = shlex.split(options.flags)
                    found = run_ours(text, options.seconds, work, seed=number, flags=flags)
                else:
                    found = run_recipe(name, text, options.seconds, work, seed=number)
                runs[name].append(found)
                print(
                    f"round {number + 1}: {name}: {found['loss']:.4f} nats per character after "
                    f"{found['seconds']:.1f} s, others {found['others_cores']:.2f} cores",
                    flush=True,
                )
    return {
        "machine": report.describe_machine(),
        "budget_s": options.seconds,
        "tuning": options.tuning,
        "flags": options.flags,
        "runs": runs,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "path", type=Path, help="a text; Tiny Shakespeare for the published results"
    )
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tuning", action="store_true", help="do not use the last 10%%")
    parser.add_argument("--only", default=",".join(CONTESTANTS), help="separated by commas")
    parser.add_argument("--flags", default="", help="further flags of `mygpt train`")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    return parser.parse_args()


def main() -> None:
    options = parse()
    results = measure(options)
    page = report.write_curves(results, options.out)
    print(page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
