"""The command `mygpt`: one file per command. Flags are parsed and text is printed only here.

This file imports as little as possible: before `main` runs, a signal ends Python with a traceback.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


def main(args: Sequence[str] | None = None) -> None:
    """Run the command, then exit the process with the command's exit code.

    0 done; 1 a bug in mygpt; 2 wrong input or usage; 3 no space or not writable; 4 out of memory;
    5 training diverged; 128 + n ended by signal n.

    Args:
        args: arguments of the command. None takes those of this process; the process then has no
            other purpose than to run the command.
    """
    if args is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_at_once)
    code, watch = 1, None
    try:
        from mygpt import signals

        watch = signals.install(instead_of=_exit_at_once)
        from mygpt.cli.commands import run

        if watch is not None:
            watch.unwinds = True
        code = run(args)
        if watch is not None:
            watch.unwinds = False
    except BaseException:
        # A library may have replaced the exception that ends the command by another one.
        if watch is None or watch.received is None:
            raise
    finally:
        if watch is not None and args is not None:
            signals.uninstall()
    if watch is not None and watch.received is not None:
        code = 128 + watch.received
        if args is None:  # partly imported libraries may fail while the interpreter shuts down
            _flush()  # if this blocks because nobody reads the output, the watch ends the process
            os._exit(code)
    if args is None and "torch" in sys.modules:  # taking its modules apart takes over a second
        atexit._run_exitfuncs()
        _flush()
        os._exit(code)
    sys.exit(code)


def _exit_at_once(number: int, frame: object) -> None:
    os._exit(128 + number)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # its reader has ended, or the stream is closed
            continue


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'mygpt.cli' has no attribute {name!r}")
    from mygpt.cli.commands import app

    return app
