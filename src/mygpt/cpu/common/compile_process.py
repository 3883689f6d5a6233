"""Compiles a kernel library in another process.

Compiling takes many seconds. A signal that arrives inside a callback of LLVM would be lost;
another process can be waited for and killed. Numba and LLVM's compiler also stay out of the
caller's memory.
The process gets the library's description as an argument and writes the object file to its
standard output. It ends when its standard input is closed, so also when the caller dies.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

from mygpt.cpu.common.build import KernelLibrary, compile_here
from mygpt.errors import OutOfMemoryError
from mygpt.processes import start
from mygpt.signals import Abandonable


def compile_in_process(library: KernelLibrary) -> bytes | None:
    """A library's object file; None where the process could not be started, or has failed.

    Raises:
        Abandoned: on a signal that elsewhere lets the work in progress finish.
        OutOfMemoryError: where the system has killed the process.
    """
    if not sys.executable:
        return None
    with Abandonable():
        try:
            process = start(__name__, json.dumps(library))
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
            f"the process that compiles {library.purpose} was killed: memory may be short"
        )
    return code if process.returncode == 0 else None


def main() -> None:
    """Compile and write the object file, unless standard input is closed first."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # text that some library prints must not get into the object file
    threading.Thread(target=_end_with_input, daemon=True).start()
    name, purpose, seconds, sources, exports = json.loads(sys.argv[2])
    exported = tuple((module, function) for module, function in exports)
    try:
        code = compile_here(KernelLibrary(name, purpose, seconds, tuple(sources), exported))
    except Exception:  # the caller then compiles by itself and raises the same error
        os._exit(1)
    answer.write(code)
    answer.flush()
    os._exit(0)  # without LLVM's cleaning up, which takes time


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(1)
