"""`mygpt report`: write a run's report as one offline page."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mygpt.cli.terminal import say, waiting

if TYPE_CHECKING:
    from mygpt.training.events import Finished


def report(
    run: Annotated[str, typer.Argument(help="The run's folder, or its checkpoint file.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The page to write. Default: report.html in the run's folder.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
) -> None:
    """Write a run's report: one page that needs no network and no other file.

    It shows a diagnosis, the losses compared with simpler models, the speed, samples with the
    passages that they copied, the best model's attention, the loss of each character of the
    validation text, and how to reproduce the run. The run may be finished, interrupted, or still
    in progress.

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
