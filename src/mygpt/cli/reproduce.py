"""`mygpt reproduce`: repeat a run from its saved settings and compare the losses."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from mygpt.cli.terminal import say


def reproduce(
    run: Annotated[str, typer.Argument(help="The run's folder, or its checkpoint file.")],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="The folder of the second run. Default: RUN-reproduced, which is deleted if all "
            "losses are the same.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help="The text's present path. Default: the path in the run. May be repeated.",
            show_default=False,
        ),
    ] = None,
    val_file: Annotated[
        str | None,
        typer.Option(help="The validation file's present path, likewise.", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that is in the output folder.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")] = False,
) -> int:
    """Repeat a run step by step and compare its losses with those of the first run.

    The seed, the text (checked by its SHA-256), the recipe and every step's learning rate are
    taken from the run. On the same kind of machine all losses are bitwise equal. The exit code is
    1 if the last loss differs.

    Example: mygpt reproduce runs/poems
    """
    from mygpt import training
    from mygpt.cli.progress import TrainingDisplay
    from mygpt.training.comparison import compare_losses, read_losses
    from mygpt.training.run import RunFolder

    first = RunFolder.of(run)
    first.check_exists()
    first_losses = read_losses(first.log_path)  # first, so that an error costs no training time
    folder = Path(output) if output else first.folder.with_name(f"{first.folder.name}-reproduced")
    is_temporary = output is None and not folder.exists()
    command = shlex.join(["mygpt", *sys.argv[1:]])
    with TrainingDisplay(quiet=quiet) as display:
        training.replay(
            run, output=folder, overwrite=overwrite, device=device, listener=display,
            command=command, files=text or (), val_file=val_file,
        )  # fmt: skip
    if display.signal is not None:
        return 128 + display.signal
    result = compare_losses(first_losses, read_losses(RunFolder.at(folder).log_path))
    say(result)
    if result.same and is_temporary:
        shutil.rmtree(folder)
    elif output is None:
        say(f"the second run is in {folder}")
    return 0 if result.close else 1
