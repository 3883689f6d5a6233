"""A comparison of runs in words and figures, for the printed text and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mygpt.machine import clock
from mygpt.views.compare import BITS, NATS
from mygpt.views.page import make_page


def figures_of(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The heads of the columns, and each run's figures as text: the table of a comparison."""
    units = {"loss": "nats/token", "bits_per_byte": "bits/byte"}
    if data["unit"] == NATS:
        del units["bits_per_byte"]
    heads = ["parameters", "tokens", "time"]
    for head in units.values():
        heads += [head, "5-gram"]
    rows = []
    for run in data["runs"]:
        row = [f"{run['parameters']:,}", f"{run['tokens']:,}", clock(run["seconds"])]
        for unit in units:
            losses = [(run[of] or {}).get(unit) for of in ("best", "fivegram")]
            row += ["-" if loss is None else f"{loss:.4f}" for loss in losses]
        rows.append(row)
    return heads, rows


def legend_of(data: dict[str, Any]) -> str:
    """The meaning of the columns of `figures_of`."""
    more = ", and in bits/byte" if data["unit"] == BITS else ""
    return (
        "tokens and time: of training; nats/token: the lowest validation loss"
        f"{more}; 5-gram: the loss of a 5-gram model of the training text"
    )


def differences_of(data: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The settings that differ, with each run's value as text."""
    return [(one["name"], [*map(_shown, one["values"])]) for one in data["differences"]]


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value in (None, "") else f"{value:g}" if isinstance(value, float) else f"{value}"


def sampling_of(data: dict[str, Any]) -> str:
    """How the samples were generated, in words."""
    asked = data["asked"]
    prompt = f"prompt {asked['prompt']!r:.60}" if asked["prompt"] else "no prompt"
    return (
        f"{prompt}, seed {asked['seed']}, at most {asked['max_new_tokens']:,} tokens, "
        f"temperature {asked['temperature']:g}"
    )


def title_of(run: dict[str, Any]) -> str:
    """The title of a run's sample."""
    step = run["sample"]["step"]
    return run["name"] if step is None else f"{run['name']}, step {step:,}"


def notes_on(data: dict[str, Any]) -> list[str]:
    """The progress of runs that are not done, and the notes on all runs, each with their names."""
    names: dict[str, list[str]] = {}
    for run in data["runs"]:
        for note in [run["progress"]] * (run["standing"] != "done") + run["notes"]:
            names.setdefault(note, []).append(run["name"])
    return [f"{', '.join(named)}: {note}" for note, named in names.items()]


def _baseline(losses: Sequence[float | None]) -> list[dict[str, Any]]:
    """The 5-gram model as a line of the chart, if it has the same loss for all runs."""
    known = {round(loss, 4) for loss in losses if loss is not None}
    return [{"name": "5-gram", "loss": loss} for loss in known] if len(known) == 1 else []


def compare_page(data: dict[str, Any]) -> str:
    """The HTML of the offline page of a comparison."""
    heads, rows = figures_of(data)
    unit = "loss" if data["unit"] == NATS else "bits_per_byte"
    curves = [
        [[seen["step"], seen["tokens"], seen["seconds"], seen[unit]] for seen in run["validations"]]
        for run in data["runs"]
    ]
    shown = {
        "names": [run["name"] for run in data["runs"]],
        "remarks": data["remarks"],
        "heads": heads,
        "rows": rows,
        "legend": legend_of(data),
        "unit": data["unit"],
        "curves": curves,
        "baselines": _baseline([(run["fivegram"] or {}).get(unit) for run in data["runs"]]),
        "differences": differences_of(data),
        "sampling": sampling_of(data),
        "samples": [
            {"title": title_of(run), **run["sample"]} for run in data["runs"] if run["sample"]
        ],
        "notes": notes_on(data),
    }
    return make_page("pages/compare.js", shown, title="mygpt compare")
