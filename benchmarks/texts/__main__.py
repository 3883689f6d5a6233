"""Train on each text for several times, and compare: times, seeds, hand-set options, n-grams.

Of each text the last tenth is scored once and never trained or validated on; `mygpt train` gets the
rest, of which it keeps a tenth for validation. The whole command is timed. Scored is the model that
a run offers (best.safetensors), in its own window, in nats per character. Results are stored one by
one, so that a run of this program that was ended continues where it was.

Usage: python -m benchmarks.texts FOLDER [--texts 60k-prose,...] [--minutes 0.5,1,2,5]
       [--seeds 0,1,2] [--grid] [--out docs/benchmarks/texts.json]
       python -m benchmarks.texts FOLDER --report
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.training.load import Others
from benchmarks.training.report import describe_machine
from benchmarks.training.scoring import cut_of, saved_loss

RULE = ""  # the options of a run by the default recipe
DROPOUTS, DECAYS = (0.0, 0.1, 0.2, 0.3), (0.1, 1.0)
# Two widths for each number of characters that are trained on.
WIDTHS = ((100_000, (64, 128)), (1_000_000, (128, 192)), (math.inf, (192, 256)))
Cell = dict[str, Any]


def grid(characters: int) -> list[str]:
    """The hand-set options that the rule is compared with, as words of the command line."""
    widths = next(pair for most, pair in WIDTHS if characters < most)
    return [
        f"--dropout {dropout} --embed-dim {width} --weight-decay {decay}"
        for dropout, width, decay in itertools.product(DROPOUTS, widths, DECAYS)
    ]


def split(text: str) -> tuple[str, str]:
    """The text to train on, and the last tenth without characters that do not occur before."""
    train = text[: cut_of(text)]
    known = set(train)
    return train, "".join(char for char in text[len(train) :] if char in known)


def train_and_score(text: str, minutes: float, seed: int, options: str) -> Cell:
    """Run the command once: its wall time, what it read, and the loss of its model."""
    train, test = split(text)
    with tempfile.TemporaryDirectory() as folder:
        path, run = Path(folder) / "text.txt", Path(folder) / "run"
        path.write_text(train, encoding="utf-8")
        command = ["train", str(path), "--minutes", f"{minutes:g}", "--seed", f"{seed}"]
        command += ["--output", str(run), *shlex.split(options)]
        others, began = Others(), time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "mygpt", *command], check=True, stdout=subprocess.DEVNULL
        )
        wall_s, busy = time.monotonic() - began, others.cores()
        records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        found = saved_loss(run / "best.safetensors", test)
    reports = [record for record in records if "tokens" in record]
    validations = [record["val_loss"] for record in records if "val_loss" in record]
    return {
        "loss": found["own_loss"],
        "parameters": found["parameters"],
        "tokenizer": found["tokenizer"],
        "val_loss": min(validations, default=None),
        "tokens": reports[-1]["tokens"],
        "wall_s": wall_s,
        "other_cores": busy,
    }


def baselines(text: str) -> Cell:
    """What needs no training: a 5-gram model and xz on the same last tenth, nats per character.

    Both get the part of the text that the network learns from: without its validation text.
    """
    from mygpt.evaluation.baselines import xz_bits_per_byte
    from mygpt.evaluation.ngram import ngram_losses

    train, test = split(text)
    chars = {char: number for number, char in enumerate(sorted(set(train)))}
    train = train[: cut_of(train)]
    ids = np.array([chars[char] for char in train + test], np.int64)
    (fivegram,) = ngram_losses(ids[: len(train)], ids[len(train) :], len(chars), (5,))
    xz = xz_bits_per_byte(test.encode(), train.encode())
    nats = None if xz is None else xz * math.log(2) * len(test.encode()) / len(test)
    return {"characters": len(text), "fivegram": fivegram, "xz": nats}


def medians(runs: dict[str, Cell]) -> dict[tuple[str, float, str], float]:
    """The median loss over the seeds, by text, minutes and options."""
    by_cell: dict[tuple[str, float, str], list[float]] = {}
    for key, cell in runs.items():
        name, minutes, _, options = key.split("|")
        by_cell.setdefault((name, float(minutes), options), []).append(cell["loss"])
    return {key: statistics.median(losses) for key, losses in by_cell.items()}


def report(stored: dict[str, Any]) -> Iterator[str]:
    """A line for each text and time, and which aims are missed."""
    found = medians(stored["runs"])
    yield f"{'text':<16} {'min':>4} {'rule':>7} {'grid':>7} {'5-gram':>7} {'xz':>7}  missed"
    for name, fixed in stored["texts"].items():
        before = math.inf
        for minutes in sorted({m for n, m, _ in found if n == name}):
            rule = found.get((name, minutes, RULE), math.nan)
            others = {o: v for (n, m, o), v in found.items() if (n, m) == (name, minutes) and o}
            best, options = min(((v, o) for o, v in others.items()), default=(math.nan, ""))
            missed = ["worse than half the time"] * (rule > 1.01 * before)
            missed += [f"grid: {options}"] * (rule > 1.03 * best)
            missed += ["5-gram"] * (rule > fixed["fivegram"] and minutes >= 1)
            yield (
                f"{name:<16} {minutes:>4g} {rule:7.4f} {best:7.4f} {fixed['fivegram']:7.4f} "
                f"{fixed['xz'] or math.nan:7.4f}  {'; '.join(missed)}"
            )
            before = rule


def main() -> None:
    """Run what is not stored yet, print each result, and store it; then the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the texts: see benchmarks.texts.make")
    parser.add_argument("--texts", default="", help="names, separated by commas; all")
    parser.add_argument("--minutes", default="0.5,1,2,5")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--grid", action="store_true", help="hand-set options too, seed 0 only")
    parser.add_argument("--options", default=RULE, help="of `mygpt train`, in the rule's place")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/texts.json"))
    asked = parser.parse_args()
    stored: dict[str, Any] = {"machine": describe_machine(), "texts": {}, "runs": {}}
    if asked.out.exists():
        stored |= json.loads(asked.out.read_text())
    named = [name for name in asked.texts.split(",") if name]
    paths = [
        path for path in sorted(asked.folder.glob("*.txt")) if path.stem in (named or [path.stem])
    ]
    for path in [] if asked.report else paths:
        text = path.read_text(encoding="utf-8")
        stored["texts"].setdefault(path.stem, None)
        stored["texts"][path.stem] = stored["texts"][path.stem] or baselines(text)
        cells = [(asked.options, seed) for seed in map(int, asked.seeds.split(","))]
        cells += [(options, 0) for options in grid(len(text)) if asked.grid]
        for minutes, (options, seed) in itertools.product(
            map(float, asked.minutes.split(",")), cells
        ):
            key = f"{path.stem}|{minutes:g}|{seed}|{options}"
            if key not in stored["runs"]:
                cell = stored["runs"][key] = train_and_score(text, minutes, seed, options)
                print(f"{key}: {cell['loss']:.4f} in {cell['wall_s']:.1f} s", flush=True)
                asked.out.write_text(json.dumps(stored, indent=1) + "\n")
    print("\n".join(report(stored)))


if __name__ == "__main__":
    main()
