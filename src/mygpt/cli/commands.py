"""All commands, and how they end.

Nothing heavy is imported here: `mygpt --help` answers at once.
"""

from __future__ import annotations

import contextlib
import difflib
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
from typer.core import TyperGroup

from mygpt import signals
from mygpt.cli.data import data_app
from mygpt.cli.demo import demo
from mygpt.cli.doctor import doctor
from mygpt.cli.eval import eval
from mygpt.cli.explain import explain
from mygpt.cli.export import export
from mygpt.cli.generate import generate
from mygpt.cli.import_ import import_
from mygpt.cli.info import info
from mygpt.cli.plan import plan
from mygpt.cli.report import report
from mygpt.cli.reproduce import reproduce
from mygpt.cli.serve import serve
from mygpt.cli.terminal import VisibleFormatter, say
from mygpt.cli.tokenize import tokenize
from mygpt.cli.train import train
from mygpt.cli.warmup import warmup
from mygpt.errors import InputError, MygptError

# Typer's own usage errors: the base of the one it exports.
_UsageError: Any = typer.BadParameter.__mro__[1]


class _Commands(TyperGroup):
    """The commands, with a way on for a name that none of them has."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the first word names."""
        name, known = args[0], self.list_commands(ctx)
        if name in known or name.startswith("-"):
            return super().resolve_command(ctx, args)
        if os.path.exists(name):
            quoted = shlex.quote(name)
            raise InputError(f"{name} is a file or folder: mygpt train {quoted} learns from text")
        alike = [each for each in known if each.startswith(name)]
        alike = alike or difflib.get_close_matches(name, known, n=3)
        meant = f"did you mean {' or '.join(alike)}? " if alike else ""
        raise InputError(f"there is no command {name!r:.40}: {meant}`mygpt --help` lists them")


app = typer.Typer(
    name="mygpt",
    cls=_Commands,
    help="Train a GPT on a text file and write from it.",
    epilog="Try it: mygpt demo. Then: mygpt train FILE --minutes 5, and: mygpt generate -p TEXT",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
commands = (
    train, generate, serve, explain, eval, report, reproduce, import_, export, info, plan,
    demo, warmup, doctor, tokenize,
)  # fmt: skip
for command in commands:
    # Paragraphs of a docstring are one line each on the screen, however they are wrapped here.
    paragraphs = (command.__doc__ or "").split("\n\n")
    told = "\n\n".join(" ".join(text.split()) for text in paragraphs)
    # `generate` says itself where a text that no option takes belongs.
    settings = {"allow_extra_args": command is generate}
    app.command(command.__name__.rstrip("_"), help=told, context_settings=settings)(command)
app.add_typer(data_app, name="data")


def _show_version(wanted: bool) -> None:
    if wanted:
        from mygpt import __version__

        say(f"mygpt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Train a GPT on a text file and write from it."""


def run(args: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; its exit code (see `mygpt.cli.main`)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if logging.lastResort is not None:  # shows the warnings of `logging`, where nobody else does
        logging.lastResort.setFormatter(VisibleFormatter())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a narrow encoding must not end a training
            stream.reconfigure(errors="replace")
    try:
        with _pipes_as_before():
            code = app(args=args, prog_name="mygpt", standalone_mode=False)
            sys.stdout.flush()
    except MygptError as error:
        _say(error)
        code = error.exit_code
    except _UsageError as error:
        _say(_usage(error))
        code = 2
    except OSError as error:  # a full disk behind stdout, say
        _say(f"cannot write: {error.strerror or error}")
        with contextlib.suppress(OSError, ValueError):  # what is left has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 3
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _say("out of memory: choose fewer samples, a smaller model, --batch-size or --seq-len")
        code = 4
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    return code if isinstance(code, int) else 0


def _usage(error: Any) -> str:
    """What is wrong with a command's words, and where it says which it takes."""
    message: str = error.format_message()
    context = getattr(error, "ctx", None)
    if not message or context is None:  # `mygpt` alone shows its help, which says all
        return message
    return f"{message.rstrip('.')}: `{context.command_path} --help` shows what it takes"


@contextlib.contextmanager
def _pipes_as_before() -> Iterator[None]:
    """What a broken pipe does to a program that calls `main` is after it as it was before."""
    number = getattr(signal, "SIGPIPE", None)
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(number)
    try:
        yield
    finally:
        signal.signal(number, before)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python or torch (whose error for it is a RuntimeError) had no memory left."""
    told = ("out of memory", "can't allocate memory", "not enough memory", "bad allocation")
    return isinstance(error, MemoryError) or any(words in str(error) for words in told)


def _say(problem: object) -> None:
    watch = signals.watch()
    if watch is not None and watch.received is not None:
        return  # what a signal led to is no news
    if str(problem):  # `mygpt` alone shows its help, which says all
        say(f"mygpt: {problem}", file=sys.stderr)
