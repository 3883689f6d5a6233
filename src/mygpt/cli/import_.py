"""`mygpt import`: a model of another program as a checkpoint of ours."""

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
            "of nanoGPT, torch.save of a mygpt.GPT's weights, or, with huggingface_hub, a name on "
            "the hub.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A folder, or a file such as model.safetensors.")
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="A tokenizer's JSON, or a run or folder that has one, where the model comes "
            "without one.",
            show_default=False,
        ),
    ] = None,
    num_heads: Annotated[
        int | None,
        typer.Option(help="Attention heads, where the file does not say them.", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also where something lies already.")
    ] = False,
) -> None:
    """Read a model of another program; afterwards generate, eval, export and train --from take it.

    No code of the file is run.

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
    say(
        visible(f"wrote {path}; write with: mygpt generate -c {shlex.quote(str(path))}", sys.stdout)
    )
