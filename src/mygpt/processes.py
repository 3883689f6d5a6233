"""Helper processes: run a module of this package in a new process, connected by pipes.

The caller is not forked, because it may have threads. Its script is not imported again, because
it may lack an `if __name__ == "__main__"` guard.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping

_PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {} import main; main()"


def start(
    module: str, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process that runs the `main` of `module`, with this process's import path.

    `main` must return when its standard input ends; that also happens if this process ends.

    Args:
        module: the module's full name.
        arguments: strings that `main` finds in `sys.argv[2:]`.
        env: additions to the environment.
    """
    folders = [folder or os.getcwd() for folder in sys.path]
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _PROGRAM.format(module), json.dumps(folders), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **(env or {})},
        process_group=0,  # so that Ctrl-C in a terminal reaches only the calling process
    )
