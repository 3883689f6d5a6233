"""The command `mygpt`: one file per command; the only place that parses flags and prints.

Next to nothing is imported here: until `main` runs, a signal ends Python with a traceback.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


def main(args: Sequence[str] | None = None) -> None:
    """Run the command and leave with its exit code.

    0 done; 1 our bug; 2 wrong input or usage; 3 no space or not writable; 4 out of memory;
    5 training diverged; 128 + n ended by signal n.

    Args:
        args: of the command; None is those of this process, which is the command's alone then.
    """
    if args is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    code, watch = 1, None
    try:
        from mygpt import signals

        watch = signals.install(instead_of=_leave)
        from mygpt.cli.commands import run

        if watch is not None:
            watch.unwinds = True
        code = run(args)
        if watch is not None:
            watch.unwinds = False
    except BaseException:
        # Whatever a library has made of the exception that ends the command.
        if watch is None or watch.received is None:
            raise
    finally:
        if watch is not None and args is not None:
            signals.uninstall()
    if watch is not None and watch.received is not None:
        code = 128 + watch.received
        if args is None:  # half imported libraries do not always end well
            _flush()  # the watch ends the process where nobody reads its output
            os._exit(code)
    sys.exit(code)


def _leave(number: int, frame: object) -> None:
    os._exit(128 + number)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # nobody reads it, or it is closed
            continue


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'mygpt.cli' has no attribute {name!r}")
    from mygpt.cli.commands import app

    return app
