"""`mygpt export`: write a model in another program's format."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mygpt.cli.terminal import say


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder or a checkpoint file.")],
    output: Annotated[Path, typer.Argument(help="The folder (hf) or file (gguf) to write.")],
    to: Annotated[
        str,
        typer.Option(help="hf: a folder for transformers and vLLM; gguf: a file for llama.cpp."),
    ],
    number_type: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="Number format of a GGUF file's matrices: f32, f16 or q8_0.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file or folder.")
    ] = False,
) -> None:
    """Write a model for other programs: transformers, vLLM, llama.cpp, Ollama.

    The tutorial's block and GPT-2's become GPT-2, the modern block Qwen3 or Llama, without code of
    its own.

    Example: mygpt export runs/poems poems-hf --to hf
    """
    from mygpt.checkpoint.model_file import read_checkpoint, resolve
    from mygpt.formats import export_checkpoint

    found = read_checkpoint(resolve(checkpoint))
    notes = export_checkpoint(found, to, output, number_type=number_type, overwrite=overwrite)
    for note in notes:
        say(f"note: {note}", file=sys.stderr)
    say(f"wrote {output}")
