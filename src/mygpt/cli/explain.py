"""`mygpt explain`: the probabilities behind a generated text, as a page or in the terminal."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mygpt.cli.prompts import (
    ENCODING,
    PROMPT_FILE,
    UNKNOWN,
    check_unknown,
    known_prompt,
    read_prompt,
)
from mygpt.cli.sampling_options import (
    MAX_NEW_TOKENS,
    MIN_P,
    REPETITION_PENALTY,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
)
from mygpt.cli.terminal import say
from mygpt.core.config import SamplingConfig
from mygpt.errors import InputError, require_int

if TYPE_CHECKING:
    from mygpt.views.explain import Explanation


def explain(
    run: Annotated[Path, typer.Argument(help="A run's folder or a checkpoint.")],
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="The text to continue. - reads standard input; a pipe or file on standard input "
            "is also read if no prompt is given.",
            show_default=False,
        ),
    ] = None,
    prompt_file: Annotated[Path | None, PROMPT_FILE] = None,
    encoding: Annotated[str | None, ENCODING] = None,
    unknown: Annotated[str, UNKNOWN] = "error",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The HTML page to write.", show_default=False),
    ] = None,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Print coloured bars in the terminal.")
    ] = False,
    max_new_tokens: Annotated[int, MAX_NEW_TOKENS] = 40,
    temperature: Annotated[float, TEMPERATURE] = 1.0,
    top_k: Annotated[int | None, TOP_K] = None,
    top_p: Annotated[float | None, TOP_P] = None,
    min_p: Annotated[float | None, MIN_P] = None,
    repetition_penalty: Annotated[float | None, REPETITION_PENALTY] = None,
    seed: Annotated[int | None, SEED] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing page.")
    ] = False,
) -> None:
    """Show how a model generates: each token's probability, its alternatives, and the attention.

    The page needs no network and no other file.

    Example: mygpt explain runs/poems -p "The sea" --out sea.html
    """
    if out is None and not terminal:
        raise InputError("explain needs an output: add --out PAGE or --terminal")
    if out is not None and out.exists() and not overwrite:
        raise InputError(f"{out} exists: add --overwrite, or choose another --out")
    sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty)
    require_int("max_new_tokens", max_new_tokens, least=0)
    check_unknown(unknown)
    text = read_prompt(prompt, prompt_file, encoding)
    if text is None:
        raise InputError(
            "explain needs a prompt: --prompt TEXT, --prompt-file FILE, or --prompt - for "
            "standard input"
        )
    from mygpt.checkpoint.model_file import read_checkpoint, resolve
    from mygpt.core.random import check_seed
    from mygpt.engine import fresh_seed

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
    """The `mygpt generate` command that generates the same text."""
    words = ["mygpt", "generate", "-c", str(run), "-p", prompt, "-n", str(most)]
    for name, default in vars(SamplingConfig()).items():
        value = getattr(found.sampling, name)
        if value != default:
            words += [f"--{name.replace('_', '-')}", f"{value}"]
    return shlex.join([*words, "--seed", str(found.seed), "--engine", "numpy"])


def _write(out: Path, page: str) -> None:
    from mygpt.checkpoint.durable import write_durably

    data = page.encode()
    write_durably(out, [data])
    say(f"page: {out} ({len(data):,} bytes)")
