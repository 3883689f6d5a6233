"""`mygpt report`: write a run's report as one offline page."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mygpt.cli import options
from mygpt.cli.terminal import at_words, say, visible, waiting
from mygpt.errors import InputError

if TYPE_CHECKING:
    from mygpt.decode.writer import Writer
    from mygpt.training.events import Finished, Started

_SAMPLE_TOKENS = 200
_SAMPLE_S = 2.0  # a sample of a slow model ends after this time


def report(
    run: Annotated[str, typer.Argument(help="The run's folder, or its checkpoint file.")],
    out: Annotated[
        Path | None,
        options.option(
            "The page to write. Default: report.html in the run's folder.", "--out", "-o"
        ),
    ] = None,
    overwrite: Annotated[bool, options.overwrite("an existing file")] = False,
) -> None:
    """Write a run's report: one page that needs no network and no other file.

    It shows a diagnosis, the losses compared with simpler models, the speed, snapshots of the
    model at several steps of the training, samples with the passages that they copied, the best
    model's attention, the loss of each character of the validation text, and how to reproduce the
    run. The run may be finished, interrupted, or still in progress.

    Example: mygpt report runs/poems
    """
    with waiting("starting"):
        from mygpt.views.report import write_report

        written = write_report(run, out, overwrite=overwrite)
    say(f"report: {written} ({written.stat().st_size:,} bytes)")


def report_the_end(
    finished: Finished,
    *,
    quiet: bool = False,
    shown: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Write the report of a run that has just finished.

    An error is printed to standard error and not raised: the run itself is saved and complete.

    Args:
        finished: training's last event.
        quiet: print only errors.
        shown: called with the report's data.
    """
    try:
        from mygpt.views.report import write_report

        written = write_report(finished.run, finished=finished, shown=shown)
        line, stream = f"report: {written}", sys.stdout
    except (Exception, KeyboardInterrupt) as error:
        again = f"mygpt report {shlex.quote(str(finished.run))}"
        line = f"no report: {str(error) or type(error).__name__}; `{again}` writes it"
        stream, quiet = sys.stderr, False
    if not quiet:
        with contextlib.suppress(OSError):  # the reader of the output is gone
            say(line, file=stream, flush=True)


def show_sample(writer: Writer) -> None:
    """Print a sample of a trained model, at the temperature of `mygpt generate`."""
    text, ends = "", math.inf
    how: dict[str, Any] = {"temperature": options.TEMPERATURE, "seed": 0, "overflow": "refill"}
    with contextlib.suppress(InputError, OSError):  # a broken model; the reader is gone
        for piece in writer.stream("", _SAMPLE_TOKENS, **how):
            ends = ends if text else time.monotonic() + _SAMPLE_S  # from the first piece on
            text += piece
            if time.monotonic() >= ends:
                break
        lines = visible(text.strip(), sys.stdout).replace("\n", "\n  | ")  # no "\r" is left
        head = f"a sample at temperature {options.TEMPERATURE:g}:"
        say(at_words(f"\n{head}\n  | {lines}\n", sys.stdout))


def show_next_steps(started: Started, finished: Finished) -> None:
    """Print what to do with a finished run."""
    run = shlex.quote(str(finished.run))
    steps = [(f"mygpt generate -c {run} -p TEXT", "continue a text")]
    if "more time would help" in finished.verdict:
        longer = f"--steps {2 * finished.step}"
        if started.budget_s is not None:
            longer = f"--minutes {started.budget_s / 30:g}"  # twice as long
        steps.append((f"mygpt train --resume {run} {longer}", "train longer"))
    steps.append((f"mygpt play {run}", "a guided tour"))
    width = max(len(command) for command, _ in steps)
    with contextlib.suppress(OSError):
        say("next:")
        for command, purpose in steps:
            say(f"  {command:<{width}}  {purpose}", flush=True)
