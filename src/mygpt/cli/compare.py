"""`mygpt compare`: several runs compared, as text, JSON or one offline page."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from mygpt.cli import options
from mygpt.cli.prompts import read_prompt
from mygpt.cli.terminal import say, to_json, waiting
from mygpt.core.config import SamplingConfig
from mygpt.errors import require_int

_WIDTH = 80  # columns of the text
_INDENT = "    "  # of samples


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two to eight runs: their folders.")],
    prompt: Annotated[str | None, options.prompt_option()] = None,
    max_new_tokens: options.MaxNewTokens = 200,
    temperature: Annotated[
        float, options.temperature_option(options.TEMPERATURE)
    ] = options.TEMPERATURE,
    seed: options.Seed = None,
    out: Annotated[Path | None, options.option("Write this HTML page, too.", "--out", "-o")] = None,
    overwrite: Annotated[bool, options.overwrite("an existing page")] = False,
    json: options.Json = False,
) -> None:
    """Compare runs: losses, the settings that differ, and samples of the same prompt and seed.

    The samples are those of the best models. Characters of the prompt that a model does not know
    are removed from its prompt, with a note. The page shows the validation losses as curves, and
    needs no network and no other file.

    Example: mygpt compare runs/poems runs/prose -p "The sea" --out compare.html
    """
    from mygpt.core.random import check_seed
    from mygpt.engine import fresh_seed
    from mygpt.views.page import require_free

    require_free(out, overwrite=overwrite)
    SamplingConfig(temperature)  # wrong values are refused before anything is read
    require_int("max_new_tokens", max_new_tokens, least=0)
    seed = fresh_seed() if seed is None else seed  # the output has it
    check_seed(seed)
    text = read_prompt(prompt, None, None) or ""
    with waiting("reading the runs"):
        from mygpt.checkpoint.durable import write_durably
        from mygpt.views.compare import Asked, compare_runs
        from mygpt.views.compare_page import compare_page

        data = compare_runs(runs, Asked(text, max_new_tokens, seed, temperature))
    page = b"" if out is None else compare_page(data).encode()
    if out is not None:  # before the text, whose reader may end early
        write_durably(out, [page])
    if json:
        say(to_json(data, indent=2))
    else:
        for line in _lines(data):
            say(line)
    if out is not None:
        say(f"\npage: {out} ({len(page):,} bytes)", file=sys.stderr if json else None)


def _lines(data: dict[str, Any]) -> Iterator[str]:
    """The comparison as lines of text."""
    from mygpt.views.compare_page import (
        differences_of,
        figures_of,
        legend_of,
        notes_on,
        sampling_of,
        title_of,
    )

    names = [run["name"] for run in data["runs"]]
    heads, rows = figures_of(data)
    yield from _figures(heads, names, rows)
    yield from _wrapped(f"({legend_of(data)})")
    for note in (*data["remarks"], *notes_on(data)):
        yield from _wrapped(f"note: {note}")
    yield ""
    yield from _differences(names, differences_of(data))
    yield ""
    yield from _wrapped(f"samples of the best models: {sampling_of(data)}")
    for run in data["runs"]:
        if run["sample"] is not None:
            yield f"\n{title_of(run)}:"
            yield from _indented(run["sample"]["prompt"] + run["sample"]["text"])


def _figures(heads: list[str], names: list[str], rows: list[list[str]]) -> Iterator[str]:
    """A table of a run in each row; names that are too long have a line of their own."""
    from rich.cells import cell_len, set_cell_size

    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    first, left = max(map(cell_len, names)), _WIDTH - sum(2 + width for width in widths)
    apart = first > left
    for name, row in zip(("", *names), (heads, *rows), strict=True):
        if apart and name:
            yield name
        figures = "".join(f"  {cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        yield (figures[2:] if apart else set_cell_size(name, first) + figures)


def _differences(names: list[str], settings: list[tuple[str, list[str]]]) -> Iterator[str]:
    """A table of a setting in each row; rows that are too wide are listed below it, by value."""
    from rich.cells import cell_len, set_cell_size

    if not settings:
        yield "no setting differs"
        return
    yield "settings that differ:"
    first = max(cell_len(setting) for setting, _ in settings)
    most = (_WIDTH - 2 - first) // len(names) - 2  # columns of a value
    table = [row for row in settings if max(map(cell_len, row[1])) <= most]
    if max(map(cell_len, names)) > most:
        table = []
    rows = [("", names), *table] if table else []
    width = max((cell_len(value) for _, values in rows for value in values), default=0)
    for setting, values in rows:
        cells = "".join(f"  {set_cell_size(value, width)}" for value in values)
        yield f"  {set_cell_size(setting, first)}{cells}".rstrip()
    for setting, values in settings:
        if (setting, values) not in table:
            yield f"  {setting}"
            for value in dict.fromkeys(values):
                pairs = zip(names, values, strict=True)
                having = ", ".join(name for name, own in pairs if own == value)
                yield from _wrapped(f"{_INDENT}{value}: {having}", _INDENT)


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent=f"{indent}  ")


def _indented(text: str) -> Iterator[str]:
    """A sample's lines, indented and broken where they are too long; no character is changed."""
    from rich.cells import chop_cells

    for line in text.split("\n"):
        for part in chop_cells(line, _WIDTH - len(_INDENT)) or [""]:
            yield f"{_INDENT}{part}"
