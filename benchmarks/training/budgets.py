"""The loss of `mygpt train FILE --minutes M` for given times, on the last tenth of the text.

The whole command is timed, from its start to its end. `last.safetensors` is evaluated, which is not
selected by validation, in windows of 64 and in the model's own window. Results of several calls are
stored in one JSON file, by budget and seed. (There, "plain" and "exportable" are runs of versions
that had n-gram input tables, with and without these.)

Usage: python -m benchmarks.training.budgets PATH [--seconds 30,150] [--seeds 0,1,2]
       [--out docs/benchmarks/training-budgets.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.training.load import Others
from benchmarks.training.report import describe_machine
from benchmarks.training.scoring import cut_of, saved_loss


def run(path: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Run the command once: its wall time, and the losses of its model."""
    text = path.read_text(encoding="utf-8")
    test = text[cut_of(text) :]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = ["-m", "mygpt", "train", str(path), "--minutes", str(seconds / 60)]
        command += ["--seed", str(seed), "--output", str(output)]
        others, began = Others(), time.monotonic()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        wall_s, busy = time.monotonic() - began, others.cores()
        records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        last = saved_loss(output / "last.safetensors", test)
        best = saved_loss(output / "best.safetensors", test)
    reports = [record for record in records if "tokens" in record]
    return {
        "wall_s": wall_s,
        "other_cores": busy,
        "tokens": reports[-1]["tokens"],
        "steps": reports[-1]["step"],
        **{name: last[name] for name in ("loss", "own_loss", "own_window", "parameters")},
        "best_loss": best["loss"],
        "best_own_loss": best["own_loss"],
    }


def main() -> None:
    """Run all budgets and seeds, print each result and the medians, and store the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--seconds", default="30,150")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/training-budgets.json"))
    options = parser.parse_args()
    kept: dict[str, Any] = {"machine": describe_machine(), "runs": {}}
    if options.out.exists():
        kept["runs"] = json.loads(options.out.read_text())["runs"]
    for seconds in options.seconds.split(","):
        found = kept["runs"].setdefault(f"{seconds} s", {})
        for seed in options.seeds.split(","):
            found[seed] = run(options.path, float(seconds), int(seed))
            shown = {k: round(v, 4) for k, v in found[seed].items()}
            print(f"{seconds} s, seed {seed}: {json.dumps(shown)}", flush=True)
            options.out.write_text(json.dumps(kept, indent=1) + "\n")
        for name in ("loss", "own_loss", "wall_s"):
            median = statistics.median(one[name] for one in found.values())
            print(f"{seconds} s: median {name} {median:.4f}", flush=True)


if __name__ == "__main__":
    main()
