"""Report of the measurements: `training.md`, its JSON files and its plot."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.training.load import TOLERATED_CORES

Results = dict[str, Any]

TITLES = {
    "mygpt": "mygpt train",
    "nanogpt": "nanoGPT's recipe for a CPU",
    "tutorial": "the tutorial's recipe",
}
_COLORS = {"mygpt": "#2a7f62", "nanogpt": "#b5533c", "tutorial": "#4a6fa5"}
_HIGHEST_SHOWN = 3.2  # nats; losses above it are those of the first seconds


def describe_machine() -> dict[str, Any]:
    """Processor, number of cores, versions of the packages."""
    from mygpt.machine import cpu_name

    return {
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("torch", "numpy", "numba")},
    }


def write_curves(results: Results, folder: Path) -> Path:
    """Write JSON and plot of the curves, and the page; returns the page's path."""
    stem = "training-tuning" if results["tuning"] else "training"
    _write_json(results, folder / f"{stem}.json")
    draw(results, folder / f"{stem}.svg")
    return _write_page(folder, stem)


def write_speed(results: Results, folder: Path) -> Path:
    """Write JSON of the speeds, and the page; returns the page's path."""
    _write_json(results, folder / "training-speed.json")
    return _write_page(folder, "training")


def _write_json(results: Results, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _write_page(folder: Path, stem: str) -> Path:
    """The page of all results in the folder: curves, and speeds (not with tuning)."""
    lines = ["# Training, side by side"]
    curves, speed = folder / f"{stem}.json", folder / "training-speed.json"
    if curves.exists():
        lines += curves_section(json.loads(curves.read_text(encoding="utf-8")), f"{stem}.svg")
    if stem == "training" and speed.exists():
        lines += speed_section(json.loads(speed.read_text(encoding="utf-8")))
    page = folder / f"{stem}.md"
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return page


def _machine(results: Results, loads: Sequence[float]) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    busy = sum(load > TOLERATED_CORES for load in loads)
    return (
        f"Machine: {machine['processor']}, {machine['cores']} cores; Python {machine['python']}, "
        f"{versions}. Other programs used more than {TOLERATED_CORES} cores during {busy} of "
        f"{len(loads)} measurements."
    )


def curves_section(results: Results, picture: str) -> list[str]:
    """Losses at the end of the budget, and before."""
    runs = results["runs"]
    loads = [run["others_cores"] for found in runs.values() for run in found]
    text = "the last tenth of the first 90% of the text" if results["tuning"] else "its last 10%"
    flags = f" (here with `{results['flags']}`)" if results["flags"] else ""
    lines = [
        "",
        f"## The same text, {results['budget_s']:g} seconds",
        "",
        f"Each is trained by characters on the first part of a text and evaluated on {text}: one "
        "pass of the same evaluator, nats per character, in adjacent windows of 64. Seconds count "
        "from the start of the process, importing torch included, also in tokens/s. `mygpt train "
        f"FILE --minutes M`{flags} is run as by a user and includes its own validation and saving; "
        "it keeps the model that is best on its validation text, which is the text of the "
        "evaluation. The others (`benchmarks/training/recipes/`) are evaluated with the clock "
        "stopped; the cosine schedule of nanoGPT's recipe ends with the budget.",
        "",
        _machine(results, loads),
        "",
        "| recipe | parameters | seconds | steps | tokens/s | loss, windows of 64 "
        "| loss, own window |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(_curve_row(name, found) for name, found in runs.items() if found),
        "",
        *_passed(runs),
        f"![Validation loss against seconds]({picture})",
        "",
        "Solid: windows of 64; for mygpt, each model at the second in which it was on the disk. "
        "Dotted: validation losses of mygpt's log, in the window of its validation.",
    ]
    several = max((len(found) for found in runs.values()), default=1)
    if several > 1:
        lines += ["", f"Medians of {several} runs with different seeds (least to most)."]
    return lines


def _spread(values: Sequence[float], form: str) -> str:
    middle, least, most = (format(f(values), form) for f in (statistics.median, min, max))
    return middle if least == most else f"{middle} ({least} to {most})"


def _curve_row(name: str, found: list[Results]) -> str:
    def column(value: Callable[[Results], float], form: str) -> str:
        return _spread([value(run) for run in found], form)

    own = column(lambda run: run.get("own_loss", run["loss"]), ".4f")
    windows = sorted({run.get("own_window", 64) for run in found})
    return (
        f"| {TITLES[name]} | {column(lambda run: run['parameters'], ',.0f')} "
        f"| {column(lambda run: run['seconds'], '.1f')} | {column(lambda run: run['step'], ',.0f')}"
        f" | {column(lambda run: run['tokens'] / run['seconds'], ',.0f')} "
        f"| {column(lambda run: run['loss'], '.4f')} "
        f"| {own} at {', '.join(map(str, windows))} |"
    )


def seconds_to(points: Sequence[Sequence[float]], loss: float) -> float | None:
    """The first time at which a curve of (seconds, loss) is at most `loss`; None if never."""
    return next((seconds for seconds, reached in points if reached <= loss), None)


def _passed(runs: dict[str, list[Results]]) -> list[str]:
    """When mygpt's models reached the final losses of the others."""
    lines = []
    for name, found in runs.items():
        if name == "mygpt" or not found or not runs.get("mygpt"):
            continue
        end = statistics.median(run["loss"] for run in found)
        times = [seconds_to(run["points"], end) for run in runs["mygpt"]]
        known = [seconds for seconds in times if seconds is not None]
        when = (
            f"after {_spread(known, '.1f')} s"
            if len(known) == len(times)
            else (f"in {len(known)} of {len(times)} runs")
        )
        lines.append(f"mygpt passes the last loss of {TITLES[name]} ({end:.4f}) {when}.")
    return [*lines, ""] if lines else []


def speed_section(results: Results) -> list[str]:
    """Tokens per second of training steps."""
    matches = results["matches"]
    loads = [load for m in matches for c in m["contestants"] for load in c["others_cores"]]
    rounds = len(matches[0]["gemm_gflops"]) if matches else 0
    return [
        "",
        "## Training steps",
        "",
        f"Tokens per second in one process on {results['machine']['threads']} threads, medians of "
        f"{rounds} rounds in which all were measured in turns; a ratio is the median of the ratios "
        "of the rounds. Without validation and saves; the first step of each round is not counted. "
        "The share is the fraction of the rate of torch.mm with 2048 x 2048 float32 matrices, "
        "measured in the same rounds. A token takes 6 N operations, forward and backward (N "
        "parameters without the position embedding), and 12 x layers x C x T for attention "
        "(Chowdhery et al., 2022), including the masked half. The tutorial's block is initialized "
        "with large weights, so that first losses are large; with the tutorial's model both "
        "programs must have equal losses.",
        "",
        _machine(results, loads),
        "",
        "| model | code | parameters | tokens/s (least to most) | ratio (least to most) "
        "| share of GEMM | first loss | last loss |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        *(line for match in matches for line in _match_rows(match)),
    ]


def _match_rows(match: Results) -> list[str]:
    gemm = statistics.median(match["gemm_gflops"])
    base = match["contestants"][0]["tokens_per_s"]
    rows = []
    for one in match["contestants"]:
        rates = one["tokens_per_s"]
        ratios = [a / b for a, b in zip(rates, base, strict=True)]
        ratio = "1" if rates is base else _spread(ratios, ".2f")
        share = statistics.median(rates) * one["flops_per_token"] / 1e9 / gemm
        rows.append(
            f"| {match['title']} | {one['label']} | {one['parameters']:,} "
            f"| {_spread(rates, ',.0f')} | {ratio} | {share:.0%} of {gemm:.0f} GFLOP/s "
            f"| {one['first_loss']:.4f} | {one['last_loss']:.4f} |"
        )
    return rows


def draw(results: Results, path: Path) -> None:
    """Plot validation loss against seconds, one line per run."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mygpt"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    losses = []
    for name, found in results["runs"].items():
        for number, run in enumerate(found):
            points = [(s, loss) for s, loss in run["points"] if loss <= _HIGHEST_SHOWN]
            losses += [loss for _, loss in points]
            title = f"{TITLES[name]}, windows of 64"
            label = "_" if number else title  # labels that begin with "_" are not in the legend
            axes.plot(*_columns(points), "o-", color=_COLORS[name], markersize=3, label=label)
            own = [(s, v) for s, v in run.get("own_points", []) if v <= _HIGHEST_SHOWN]
            label = "_" if number or not own else f"{TITLES[name]}, its own log"
            axes.plot(*_columns(own), ":", color=_COLORS[name], linewidth=1, label=label)
    if losses:
        axes.set_ylim(min(losses) - 0.15, min(_HIGHEST_SHOWN, max(losses) + 0.1))
    ends = [run["seconds"] for found in results["runs"].values() for run in found]
    axes.set_xlim(0, 1.03 * max([results["budget_s"], *ends]))
    axes.set_xlabel("seconds since the process began")
    axes.set_ylabel("validation loss, nats per character")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _columns(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]
