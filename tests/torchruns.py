"""mygpt under torchrun, for tests: all processes that were started are ended with the call."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ranks import RankError, environment_of

_MARK = "MYGPT_TEST_RANKS"  # an environment variable of all processes started here


def torchrun(
    count: int,
    *arguments: str | Path,
    env: dict[str, str] | None = None,
    options: tuple[str, ...] = (),
    timeout_s: float = 300,
) -> subprocess.CompletedProcess[str]:
    """`torchrun --standalone --nproc-per-node COUNT OPTIONS -m mygpt ARGUMENTS`, until it ends.

    Raises:
        RankError: when it has not ended in time; then all its processes are killed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with torchrun_started(count, *arguments, env=env, options=options, into=folder) as process:
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                errors = (folder / "err").read_text()[-4000:]
                raise RankError(f"torchrun did not end in {timeout_s} s\n{errors}") from None
        out, err = ((folder / stream).read_text() for stream in ("out", "err"))
        return subprocess.CompletedProcess(process.args, code, out, err)


@contextlib.contextmanager
def torchrun_started(
    count: int,
    *arguments: str | Path,
    into: Path,
    env: dict[str, str] | None = None,
    options: tuple[str, ...] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """The same, running; its output goes to the files `out` and `err` in `into`.

    Leaving the context kills its processes, also workers whose launcher was killed.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc-per-node={count}", *options, "-m", "mygpt", *map(str, arguments)]
    with _started(launcher, into, env or {}) as process:
        yield process


def ranks_of(process: subprocess.Popen[bytes]) -> list[int]:
    """The process ids of a launcher's workers (Linux)."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(child) for child in path.read_text().split()]


@contextlib.contextmanager
def _started(
    command: list[str], folder: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a new session; at the end it and all that it started are killed."""
    mark = secrets.token_hex(16)
    env = environment_of({**environment, _MARK: mark})
    with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=env, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        while left := _marked(mark):  # torchrun's workers have sessions of their own
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


def _marked(mark: str) -> list[int]:
    """The processes that have this mark in their environment (Linux)."""
    wanted, found = f"{_MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found
