"""Helper processes: a module of this package as a program behind pipes.

Nothing of the caller is forked (it may have threads) or imported again (its script may have no
guard).
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
    """A process that runs the `main` of `module`, with this process's import path.

    It is to end when its standard input does, which also this process's end closes.

    Args:
        module: its full name.
        arguments: what it finds in `sys.argv[2:]`.
        env: additions to the environment.
    """
    folders = [folder or os.getcwd() for folder in sys.path]
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _PROGRAM.format(module), json.dumps(folders), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **(env or {})},
        process_group=0,  # a terminal's Ctrl-C is for this process alone
    )
