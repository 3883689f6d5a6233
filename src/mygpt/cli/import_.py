"""`mygpt import`: convert another program's model into a mygpt checkpoint."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from mygpt.cli.terminal import say, visible


def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A Hugging Face folder (GPT-2, Llama, Qwen3), a checkpoint of the tutorial or "
            "of nanoGPT, a mygpt.GPT's state dict written by torch.save, or, with huggingface_hub "
            "installed, a model's name on the hub.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A folder, or a file such as model.safetensors.")
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="A tokenizer's JSON file, or a run or folder that contains one, if the model has "
            "no tokenizer.",
            show_default=False,
        ),
    ] = None,
    num_heads: Annotated[
        int | None,
        typer.Option(
            help="The number of attention heads, if the file does not contain it.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")
    ] = False,
) -> None:
    """Convert another program's model for use with generate, eval, export and train --from.

    No code in the file is run.

    Example: mygpt import gpt2-folder --output runs/gpt2
    """
    from mygpt.formats import import_checkpoint

    path, notes = import_checkpoint(
        source,
        output,
        overwrite=overwrite,
        tokenizer=tokenizer,
        num_heads=num_heads,
        command=shlex.join(["mygpt", *sys.argv[1:]]),
    )
    for note in notes:
        say(f"note: {note}", file=sys.stderr)
    say(visible(f"wrote {path}; next: mygpt generate -c {shlex.quote(str(path))}", sys.stdout))
