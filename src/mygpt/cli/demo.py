"""`mygpt demo`: train on the built-in corpus for about a minute and print samples."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from mygpt.cli import options
from mygpt.cli.terminal import say, waiting
from mygpt.machine import process_age_s

_TEMPERATURES = (0.5, 0.8, 1.1)
_OUTPUT = Path("runs/demo")


def demo(
    minutes: Annotated[float, typer.Option(help="How long to train.")] = 0.8,
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder.")] = _OUTPUT,
    overwrite: Annotated[bool, options.overwrite("another run in this folder")] = False,
) -> int:
    """Train a small GPT on the built-in text for about a minute, then print samples.

    The text is the Python language reference, which is part of every CPython. The run of an
    earlier demo is replaced.

    Example: mygpt demo --minutes 2
    """
    began = time.monotonic() - process_age_s()
    status = waiting("starting")
    from mygpt import training
    from mygpt.cli.progress import TrainingDisplay
    from mygpt.cli.report import report_the_end

    with TrainingDisplay(waiting=status) as display:
        writer = training.train(
            minutes=minutes,
            began=began,
            output=output,
            overwrite=overwrite or _is_demo(output),
            listener=display,
            command="mygpt demo",
        )
    if display.signal is not None:
        return 128 + display.signal
    for temperature in _TEMPERATURES:
        text = writer.generate("The ", 240, temperature=temperature, seed=0)
        say(f"\n--- temperature {temperature} ---\n{text}")
    if display.finished is not None:
        report_the_end(display.finished)
    say(f'\nYour turn: mygpt generate --checkpoint {shlex.quote(str(output))} --prompt "The "')
    return 0


def _is_demo(run: Path) -> bool:
    """Whether this folder holds an earlier demo that was never resumed: it may be replaced."""
    from mygpt.checkpoint.model_file import read_checkpoint
    from mygpt.errors import CheckpointError

    try:
        provenance = read_checkpoint(run / "last.safetensors").provenance
    except CheckpointError:
        return False
    return provenance.get("command") == "mygpt demo" and "sittings" not in provenance
