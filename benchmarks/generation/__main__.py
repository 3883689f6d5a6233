"""Generation speed: every engine on the same weights, measured in turns on this machine.

Usage: PYTHONPATH=src python -m benchmarks.generation [--rounds 3] [--only S,M,L,Q,R]
       [--cases s,m-int8,cold] [--patience 2] [--out docs/benchmarks]
in the folder above `benchmarks`, with `benchmarks/peers.txt` installed. Prints as it goes and
writes `generation.json`, `generation.md` and `generation.svg`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.generation import cold_start, report
from benchmarks.generation.cases import CASES, COLD_START, Case
from benchmarks.generation.rounds import (
    QUIET_WAIT_S,
    ROOT,
    Contestant,
    await_quiet,
    environment,
    equal_tokens,
    reference_ids,
    run_case,
)

Limits = dict[str, dict[str, float]]


def measure_limits(before: Limits | None = None) -> Limits:
    """The machine's limits by number of threads: the maximum of a new measurement and `before`."""
    found = {}
    for threads in ("1", "2"):
        await_quiet(QUIET_WAIT_S)
        command = [sys.executable, "-m", "benchmarks.generation.limits", threads]
        output = subprocess.run(
            command, env=environment(int(threads)), cwd=ROOT, check=True, capture_output=True
        ).stdout
        found[threads] = json.loads(output)
        for name, value in (before or found)[threads].items():
            found[threads][name] = max(value, found[threads][name])
        values = ", ".join(f"{name} {value:.1f}" for name, value in found[threads].items())
        print(f"limits, {threads} threads: {values} (GB/s; GFLOP/s)", flush=True)
    return found


def measure_case(case: Case, work: Path, rounds: int, patience: int) -> dict[str, Any]:
    """Measure one case; the results as plain values."""
    print(f"{case.title}: preparing", flush=True)
    references = reference_ids(case, work)
    found = []
    for one in run_case(case, work, rounds, patience):
        expected = references["tanh" if "llama" in one.engine else "own"]
        # Past the window, refill has another context than the chapter's loop.
        comparable = one.ids and not (case.overflow == "refill" and one.engine == case.ours)
        equal = equal_tokens(one.ids, expected) if comparable else None
        found.append(_described(one, equal))
        shown = "{} of {} tokens equal".format(*equal) if equal else one.failure
        print(f"  {one.label}: {shown or 'not compared'}", flush=True)
    return {"case": asdict(case), "contestants": found}


def _described(one: Contestant, equal: tuple[int, int] | None) -> dict[str, Any]:
    return {
        "engine": one.engine,
        "threads": one.threads,
        "label": one.label,
        "tokens_per_s": one.rates,
        "others_cores": one.others,
        "equal_tokens": equal,
        "failure": one.failure,
    }


def measure_cold(work: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds and MB of each program, from process start to end, by number of characters."""
    cold_start.prepare(work)
    found = []
    for length in cold_start.LENGTHS:
        programs = cold_start.commands(work, length)
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
        for number in range(rounds + 1):
            for name, command in programs.items():
                measured = cold_start.run(command, environment(None), ROOT)
                if number:  # round 0 is a warm-up: files are read, kernels compiled
                    runs[name].append(measured)
        found.append({"characters": length, "runs": runs})
        for name, measured in runs.items():
            shown = " ".join(f"{seconds:.2f} s {mb:.0f} MB," for seconds, mb in measured)
            print(f"cold start, {length} characters, {name}: {shown}", flush=True)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="S,M,L,Q,R", help="sizes of models, separated by commas")
    parser.add_argument("--cases", help=f"{', '.join(c.key for c in CASES)}, {COLD_START}")
    parser.add_argument(
        "--patience",
        type=int,
        default=2,
        help="how often a timing is repeated while other programs use the processor",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    return parser.parse_args()


def main() -> None:
    options = parse()
    sizes = options.only.split(",")
    keys = options.cases.split(",") if options.cases else [c.key for c in CASES] + [COLD_START]
    results: dict[str, Any] = {
        "machine": report.describe_machine(),
        "limits": measure_limits(),
        "cases": [],
        "cold": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if COLD_START in keys and "S" in sizes:
            results["cold"] = measure_cold(work, options.rounds)
        for case in CASES:
            if case.key in keys and case.size in sizes:
                measured = measure_case(case, work, options.rounds, options.patience)
                results["cases"].append(measured)
                report.write(results, options.out)
    results["limits"] = measure_limits(results["limits"])
    report.write(results, options.out)
    print((options.out / "generation.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
