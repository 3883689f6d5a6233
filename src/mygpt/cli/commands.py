"""The list of all commands, and their exit codes and error messages.

No heavy library is imported here, so that `mygpt --help` is fast.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from typer.main import get_command

from mygpt import signals
from mygpt.cli.compare import compare
from mygpt.cli.convert import export, import_
from mygpt.cli.data import data_app
from mygpt.cli.demo import demo
from mygpt.cli.doctor import doctor, warmup
from mygpt.cli.eval import eval
from mygpt.cli.explain import explain
from mygpt.cli.generate import generate
from mygpt.cli.help import HELP_NAMES, Command, Group
from mygpt.cli.info import info
from mygpt.cli.plan import plan
from mygpt.cli.play import play
from mygpt.cli.report import report
from mygpt.cli.reproduce import reproduce
from mygpt.cli.serve import serve
from mygpt.cli.terminal import VisibleFormatter, at_words, say
from mygpt.cli.tokenize import tokenize
from mygpt.cli.train import train
from mygpt.cli.usage import usage_message
from mygpt.errors import InputError, MygptError, is_out_of_memory


class _Commands(Group):
    """The group of all commands; the name of a text gets the command that trains on it."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the first argument names."""
        name = args[0]
        if name not in self.list_commands(ctx) and os.path.exists(name):
            quoted = shlex.quote(name)
            raise InputError(f"{name} is a file or folder: to train on it, mygpt train {quoted}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="mygpt",
    cls=_Commands,
    help="Train a GPT on a text file and generate text with it.",
    epilog="Try it: mygpt demo. Then: mygpt train FILE --minutes 5, and: mygpt generate -p TEXT",
    no_args_is_help=True,
    rich_markup_mode=None,  # the help pages are plain text
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": HELP_NAMES},
)
_PANELS = {
    "Learn": (demo, play, explain),
    "Train": (train, plan, tokenize, reproduce),
    "Write": (generate, serve),
    "Exchange": (import_, export),
    "Inspect": (info, eval, report, compare, doctor, warmup),
}
for panel, commands in _PANELS.items():
    for command in commands:
        # Each paragraph of a docstring becomes one line, which is wrapped to the terminal's width.
        paragraphs = (command.__doc__ or "").split("\n\n")
        description = "\n\n".join(" ".join(text.split()) for text in paragraphs)
        # `generate` has its own error message for arguments that belong to no option.
        settings = {"allow_extra_args": command is generate}
        app.command(
            command.__name__.rstrip("_"),
            cls=Command,
            help=description,
            rich_help_panel=panel,
            context_settings=settings,
        )(command)
app.add_typer(data_app, name="data", rich_help_panel="Train")


def _show_version(wanted: bool) -> None:
    if wanted:
        from mygpt import __version__

        say(f"mygpt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Train a GPT on a text file and generate text with it."""


@functools.cache
def _command() -> Any:
    """The commands with all their options; making them takes a tenth of a second."""
    return get_command(app)


def run(args: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name and return its exit code (see `mygpt.cli.main`)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the calling process closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if logging.lastResort is not None:  # prints warnings of `logging` if no handler is configured
        logging.lastResort.setFormatter(VisibleFormatter())
    for stream in (sys.stdout, sys.stderr):
        # A character that the stream's encoding lacks must not raise an error during training.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with _sigpipe_restored():
            code = _command()(args=args, prog_name="mygpt", standalone_mode=False)
            sys.stdout.flush()
    except MygptError as error:
        _say(error)
        code = error.exit_code
    except OSError as error:  # for example, stdout is a file on a full disk
        _say(f"cannot write: {error.strerror or error}")
        with contextlib.suppress(OSError, ValueError):  # discard what is still buffered
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 3
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if hasattr(error, "format_message"):  # only Typer's errors of wrong usage have it
            _say_usage(error)
            code = 2
        elif is_out_of_memory(error):
            _say("out of memory: choose fewer samples, a smaller model, --batch-size or --seq-len")
            code = 4
        else:
            raise
    return code if isinstance(code, int) else 0


def _say_usage(error: Any) -> None:
    """Print the error of wrong arguments, with the help command to look them up."""
    if type(error).__name__ == "NoArgsIsHelpError":  # the message is the help page
        say(error.format_message())
    else:
        _say(usage_message(error))


@contextlib.contextmanager
def _sigpipe_restored() -> Iterator[None]:
    """Restore the handler of SIGPIPE afterwards, for programs that call `main`."""
    number = getattr(signal, "SIGPIPE", None)
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(number)
    try:
        yield
    finally:
        signal.signal(number, before)


def _say(problem: object) -> None:
    watch = signals.watch()
    if watch is not None and watch.received is not None:
        return  # errors that follow from a signal are not reported
    if str(problem):  # empty in a process of several whose first one reports the error
        say(at_words(f"mygpt: {problem}", sys.stderr), file=sys.stderr)
