"""`mygpt report`: a run as one offline page."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mygpt.cli.terminal import Waiting, say

if TYPE_CHECKING:
    from mygpt.training.events import Finished


def report(
    run: Annotated[str, typer.Argument(help="The run's folder, or the checkpoint it wrote.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The page; without it report.html in the run's folder.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is there.")
    ] = False,
) -> None:
    """Write a run's report: one page that needs no network and no other file.

    It shows the verdict, the losses beside what simpler models reach, the speed, samples and what
    they copied, where the best model looks, and how to make the run again. The run may be
    finished, interrupted, or still going on.

    Example: mygpt report runs/poems
    """
    with Waiting("starting" if sys.stdout.isatty() else ""):
        from mygpt.views.report import write_report

        written = write_report(run, out, overwrite=overwrite)
    say(f"report: {written} ({written.stat().st_size:,} bytes)")


def report_the_end(finished: Finished, *, quiet: bool = False) -> None:
    """Write the report of a training that has just ended.

    Whatever goes wrong costs a line on standard error: the run is saved, and has not failed.

    Args:
        finished: what the training told.
        quiet: say nothing but what went wrong.
    """
    try:
        from mygpt.views.report import write_report

        told, stream = f"report: {write_report(finished.run, finished=finished)}", sys.stdout
    except (Exception, KeyboardInterrupt) as error:
        again = f"mygpt report {shlex.quote(str(finished.run))}"
        told = f"no report: {str(error) or type(error).__name__}; `{again}` writes it"
        stream, quiet = sys.stderr, False
    if not quiet:
        with contextlib.suppress(OSError):  # whoever read our lines has left
            say(told, file=stream, flush=True)
