"""`mygpt explain`: how a model came to write what it wrote, as a page or in the terminal."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mygpt.cli.prompts import (
    ENCODING,
    PROMPT_FILE,
    UNKNOWN,
    check_unknown,
    known_prompt,
    read_prompt,
)
from mygpt.cli.terminal import say
from mygpt.core.config import SamplingConfig, check_max_new_tokens
from mygpt.errors import InputError

if TYPE_CHECKING:
    from mygpt.views.explain import Explanation

_SAMPLING = "Sampling"


def _sampling(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=_SAMPLING, show_default=False)


def explain(
    run: Annotated[Path, typer.Argument(help="A run's folder or a checkpoint.")],
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="The text to continue; - reads standard input, as what is piped in without it.",
            show_default=False,
        ),
    ] = None,
    prompt_file: Annotated[Path | None, PROMPT_FILE] = None,
    encoding: Annotated[str | None, ENCODING] = None,
    unknown: Annotated[str, UNKNOWN] = "error",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The page to write.", show_default=False),
    ] = None,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Show it here, as coloured bars.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Where to end at the latest.")
    ] = 40,
    temperature: Annotated[
        float, _sampling("Below 1 sharpens, above 1 flattens, 0 is greedy (1).")
    ] = 1.0,
    top_k: Annotated[int | None, _sampling("Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, _sampling("Draw from the smallest set with this probability.")
    ] = None,
    min_p: Annotated[
        float | None, _sampling("Drop tokens below this share of the likeliest one's.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, _sampling("Above 1 makes tokens that occurred less likely.")
    ] = None,
    seed: Annotated[
        int | None, _sampling("The same seed writes the same text; drawn and shown if missing.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a page that is there.")
    ] = False,
) -> None:
    """Show how a model writes: each token's chance, what else it might have been, where it looks.

    The page needs no network and no other file.

    Example: mygpt explain runs/poems -p "The sea" --out sea.html
    """
    if out is None and not terminal:
        raise InputError("explain writes a page or to the terminal: add --out PAGE or --terminal")
    if out is not None and out.exists() and not overwrite:
        raise InputError(f"{out} exists: add --overwrite, or choose another --out")
    sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty)
    check_max_new_tokens(max_new_tokens)
    check_unknown(unknown)
    text = read_prompt(prompt, prompt_file, encoding)
    if text is None:
        raise InputError(
            "explain needs a prompt: --prompt TEXT, --prompt-file FILE, or --prompt - for "
            "standard input"
        )
    from mygpt.checkpoint import read_checkpoint, resolve
    from mygpt.core.random import check_seed, fresh_seed

    path = resolve(run)
    if seed is None:
        seed = fresh_seed()
        if not sampling.greedy:
            say(f"seed {seed}", file=sys.stderr)
    check_seed(seed)
    from mygpt.views.explain import about, explain, explain_page

    checkpoint = read_checkpoint(path)
    text = known_prompt(checkpoint.tokenizer, text, unknown)
    found = explain(checkpoint, text, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)
    if terminal:
        from mygpt.cli.bars import show

        show(found)
    if out is not None:
        command = _command(run, text, max_new_tokens, found)
        _write(out, explain_page(found, about=about(checkpoint, name=str(run), command=command)))


def _command(run: Path, prompt: str, most: int, found: Explanation) -> str:
    """The `mygpt generate` that writes the same text."""
    words = ["mygpt", "generate", "-c", str(run), "-p", prompt, "-n", str(most)]
    for name, default in vars(SamplingConfig()).items():
        value = getattr(found.sampling, name)
        if value != default:
            words += [f"--{name.replace('_', '-')}", f"{value}"]
    return shlex.join([*words, "--seed", str(found.seed), "--engine", "numpy"])


def _write(out: Path, page: str) -> None:
    from mygpt.storage import write_durably

    data = page.encode()
    write_durably(out, [data])
    say(f"page: {out} ({len(data):,} bytes)")
