"""`mygpt reproduce`: make a run again from its own file, and compare the losses."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from mygpt.cli.terminal import say


def reproduce(
    run: Annotated[str, typer.Argument(help="The run's folder, or the checkpoint it wrote.")],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Where the second run goes; without it it is kept, as RUN-reproduced, only where "
            "it came out as another.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help="Where the text is now; without it where the run found it. Repeat it for more.",
            show_default=False,
        ),
    ] = None,
    val_file: Annotated[
        str | None,
        typer.Option(help="Where the validation file is now, likewise.", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew where a run lies already.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the result alone.")] = False,
) -> int:
    """Make a run again, step for step, and compare its losses with the first's.

    Seed, text (by its SHA-256), recipe and the rate of every step are taken from the run. On the
    same kind of machine all losses are the same to the bit. Ends with 1 where the last loss is
    another.

    Example: mygpt reproduce runs/poems
    """
    from mygpt import training
    from mygpt.cli.progress import TrainingDisplay
    from mygpt.training.comparison import compare_losses, read_losses
    from mygpt.training.run import RunFolder

    first = RunFolder.of(run)
    first.check_exists()
    first_losses = read_losses(first.log_path)  # before hours are spent on the second's
    folder = Path(output) if output else first.folder.with_name(f"{first.folder.name}-reproduced")
    ours = output is None and not folder.exists()
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
    if result.same and ours:
        shutil.rmtree(folder)
    elif output is None:
        say(f"the second run is kept in {folder}")
    return 0 if result.close else 1
