"""`mygpt reproduce`: repeat a run from its saved settings and compare the losses."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mygpt.cli import options
from mygpt.cli.terminal import at_words, say, waiting
from mygpt.errors import InputError

# Nats per token by which losses may differ if hardware adds in another order.
CLOSE = 0.02
Losses = dict[tuple[int, str], float]  # by step and kind: "loss" or "val_loss"


def reproduce(
    run: Annotated[str, typer.Argument(help="The run's folder, or its checkpoint file.")],
    output: Annotated[
        str | None,
        options.option(
            "The folder of the second run. Default: RUN-reproduced, which is deleted if all "
            "losses are the same.",
            "--output",
            "-o",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        options.option(
            "The text's present path. Default: the path in the run. May be repeated.", "--text"
        ),
    ] = None,
    val_file: Annotated[
        str | None, options.option("The validation file's present path, likewise.")
    ] = None,
    overwrite: Annotated[bool, options.overwrite("a run that is in the output folder")] = False,
    device: Annotated[str, options.choice("auto, cpu, cuda or mps.")] = "auto",
    quiet: Annotated[bool, options.option("Print only the result.", "--quiet", "-q")] = False,
) -> int:
    """Repeat a run step by step and compare its losses with those of the first run.

    The seed, the text (checked by its SHA-256), the recipe and every step's learning rate are
    taken from the run. On the same kind of machine all losses are bitwise equal. The exit code is
    1 if the last loss differs.

    Example: mygpt reproduce runs/poems
    """
    from mygpt import training
    from mygpt.cli.progress import TrainingDisplay
    from mygpt.training.run import RunFolder

    first = RunFolder.of(run)
    first.check_exists()
    first_losses = read_losses(first.log_path)  # first, so that an error costs no training time
    folder = Path(output) if output else first.folder.with_name(f"{first.folder.name}-reproduced")
    is_temporary = output is None and not folder.exists()
    command = shlex.join(["mygpt", *sys.argv[1:]])
    status = waiting("" if quiet else "starting")
    with TrainingDisplay(quiet=quiet, waiting=status) as display:
        training.replay(
            run, output=folder, overwrite=overwrite, device=device, listener=display,
            command=command, files=text or (), val_file=val_file,
        )  # fmt: skip
    if display.signal is not None:
        return 128 + display.signal
    result = compare_losses(first_losses, read_losses(RunFolder.at(folder).log_path))
    say(at_words(str(result), sys.stdout))
    if result.same and is_temporary:
        shutil.rmtree(folder)
    elif output is None:
        say(f"the second run is in {folder}")
    return 0 if result.close else 1


@dataclass(frozen=True)
class Comparison:
    """The losses that two logs have in common: (of the first, of the second) by (step, kind)."""

    losses: dict[tuple[int, str], tuple[float, float]]

    @property
    def same(self) -> bool:
        """Whether all losses are bitwise the same."""
        return bool(self.losses) and all(one == other for one, other in self.losses.values())

    @property
    def finals(self) -> tuple[float, float]:
        """The last validation losses in common; the last training losses if there are none."""
        last = max(self.losses, key=lambda place: (place[1] == "val_loss", place[0]), default=None)
        return (math.nan, math.nan) if last is None else self.losses[last]

    @property
    def close(self) -> bool:
        """Whether the runs ended with nearly the same loss."""
        return abs(self.finals[0] - self.finals[1]) <= CLOSE

    def __str__(self) -> str:
        if not self.losses:
            return "the two logs have no step in common: nothing could be compared"
        count, ends = (
            len(self.losses),
            "the last loss was {:.4f} and is {:.4f}".format(*self.finals),
        )
        if self.same:
            return f"reproduced: all {count:,} losses are the same to the bit; {ends}"
        equal = sum(one == other for one, other in self.losses.values())
        largest, step = max((abs(a - b), place[0]) for place, (a, b) in self.losses.items())
        details = (
            f"{equal:,} of {count:,} losses are the same to the bit, the largest difference is "
            f"{largest:.2g} at step {step:,}; {ends}"
        )
        if self.close:
            return f"reproduced, but for rounding: {details}"
        return f"NOT reproduced: {details}"


def compare_losses(one: Losses, other: Losses) -> Comparison:
    """Compare the losses of two logs."""
    return Comparison({place: (one[place], other[place]) for place in one if place in other})


def read_losses(log: Path) -> Losses:
    """A log's losses by (step, kind), without steps that were rolled back.

    Raises:
        InputError: if it cannot be read.
    """
    from mygpt.training.history import read_log

    try:
        history = read_log(log)
    except OSError as error:
        raise InputError(f"{log} cannot be read: {error.strerror}; its losses are lost") from None
    found = {(report.step, "loss"): report.loss for report in history.reports}
    return found | {(seen.step, "val_loss"): seen.val_loss for seen in history.validations}
