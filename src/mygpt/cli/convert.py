"""`mygpt import` and `mygpt export`: read and write models in other programs' formats."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from mygpt.cli import options
from mygpt.cli.terminal import at_words, say


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
        Path | None,
        options.option(
            "A folder, or a file such as model.safetensors. Default: runs/NAME.", "--output", "-o"
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        options.option(
            "A tokenizer's JSON file, or a run or folder that contains one, if the model has no "
            "tokenizer."
        ),
    ] = None,
    num_heads: Annotated[
        int | None,
        options.option("The number of attention heads, if the file does not contain it."),
    ] = None,
    overwrite: Annotated[bool, options.overwrite("an existing checkpoint")] = False,
) -> None:
    """Convert another program's model for use with generate, eval, export and train --from.

    No code in the file is run.

    Example: mygpt import gpt2-folder --output runs/gpt2
    """
    from mygpt.formats import import_checkpoint

    if output is None:
        named = Path(source).resolve()
        output = Path("runs", named.stem if named.is_file() else named.name)
    path, notes = import_checkpoint(
        source,
        output,
        overwrite=overwrite,
        tokenizer=tokenizer,
        num_heads=num_heads,
        command=shlex.join(["mygpt", *sys.argv[1:]]),
    )
    for note in notes:
        say(at_words(f"note: {note}", sys.stderr), file=sys.stderr)
    say(f"wrote {path}\nnext: mygpt generate -c {shlex.quote(str(path))}")


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder or a checkpoint file.")],
    output: Annotated[Path, typer.Argument(help="The folder (hf) or file (gguf) to write.")],
    to: Annotated[
        str,
        typer.Option(help="hf: a folder for transformers and vLLM; gguf: a file for llama.cpp."),
    ],
    number_type: Annotated[
        str | None,
        options.option("Number format of a GGUF file's matrices: f32, f16 or q8_0.", "--type"),
    ] = None,
    overwrite: Annotated[bool, options.overwrite("an existing file or folder")] = False,
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
        say(at_words(f"note: {note}", sys.stderr), file=sys.stderr)
    say(f"wrote {output}")
