"""The sampling options that `generate` and `explain` share."""

from __future__ import annotations

from typing import Any

import typer

PANEL = "Sampling"  # of the help page


def _option(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=PANEL, show_default=False)


MAX_NEW_TOKENS: Any = typer.Option(
    "--max-new-tokens", "-n", help="The largest number of tokens to generate."
)
TEMPERATURE = _option("Below 1 sharpens the distribution, above 1 flattens it, 0 is greedy (1).")
TOP_K = _option("Sample from the k most probable tokens.")
TOP_P = _option("Sample from the smallest set of tokens with this total probability.")
MIN_P = _option("Exclude tokens below this fraction of the most probable token's probability.")
REPETITION_PENALTY = _option("Above 1 makes tokens less probable that have occurred before.")
SEED = _option("The same seed gives the same text. Default: a random seed, which is printed.")
