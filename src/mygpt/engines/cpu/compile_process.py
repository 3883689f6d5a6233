"""A process that compiles a program: its description in the arguments, its code on the output.

Compiling takes seconds in which a signal would strike in LLVM's callbacks, and be lost there; a
process can be waited for and killed. Numba and LLVM's compiler stay out of the caller's memory.
It is started by `compile_in_process`, and ends when its input does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

from mygpt.engines.cpu.build import KernelLibrary, compile_here
from mygpt.errors import OutOfMemoryError
from mygpt.processes import start
from mygpt.signals import Abandonable


def compile_in_process(program: KernelLibrary) -> bytes | None:
    """A program's object file; None where the process cannot be had, or has failed.

    Raises:
        Abandoned: on a signal that otherwise lets the work finish.
        OutOfMemoryError: where the system has killed it.
    """
    if not sys.executable:
        return None
    with Abandonable():
        try:
            process = start(__name__, json.dumps(program))
        except OSError:
            return None
        with process:
            try:
                assert process.stdout is not None
                code = process.stdout.read()
            except BaseException:
                process.kill()
                raise
    if process.returncode == -signal.SIGKILL:
        raise OutOfMemoryError(
            f"the process that compiles {program.purpose} was killed: memory may be short"
        )
    return code if process.returncode == 0 else None


def main() -> None:
    """Compile, unless the input ends first."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get into the code
    threading.Thread(target=_end_with_input, daemon=True).start()
    name, purpose, seconds, sources, exports = json.loads(sys.argv[2])
    exported = tuple((module, function) for module, function in exports)
    try:
        code = compile_here(KernelLibrary(name, purpose, seconds, tuple(sources), exported))
    except Exception:  # the caller meets it itself, where it can be shown
        os._exit(1)
    answer.write(code)
    answer.flush()
    os._exit(0)  # LLVM need not clear away


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(1)
