"""Several processes for one test: a function called by every rank. See also `torchruns`.

The first call of `run_ranks` starts a process that imports torch, which takes seconds, and serves
all calls: for each it forks a launcher, which imports the test's module and forks the ranks. The
processes of a call are ended when the call ends, also by an error.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import inspect
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from paths import SOURCES, TESTS

_GRACE_S = 0.5  # in which the other ranks write their errors, once one has failed


class RankError(AssertionError):
    """A rank failed, or the ranks did not end in time."""


def run_ranks(
    count: int,
    function: Callable[..., Any],
    *arguments: Any,
    group: bool = True,
    timeout_s: float = 180,
    **environment: str,
) -> list[Any]:
    """Call a test module's function in `count` processes; return their results, by rank.

    The ranks find each other through a store that this process holds, so no port can clash.
    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set as torchrun sets them;
    warnings are errors, as in pytest.

    Args:
        count: number of processes.
        function: at the top level of a module under tests/.
        arguments: for the function; they and its result are pickled.
        group: make the gloo group before the call; with False the function does.
        timeout_s: of the whole call.
        environment: further variables of the ranks.

    Raises:
        RankError: with the standard error of the ranks that failed.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    addresses = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store exists: rank 0 starts none
    }
    home = str(Path(inspect.getfile(function)).parent)
    call = (count, home, function.__module__, function.__name__, arguments, group, timeout_s)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps(call))
        code = _server().launch(folder, {**addresses, **environment}, timeout_s)
        if code is None:
            errors = _errors_of(folder, range(count))
            raise RankError(f"{count} ranks did not end in {timeout_s} s\n{errors}")
        if code:
            failed = folder / "failed"
            first = [int(failed.read_text())] if failed.exists() else range(count)
            errors = _errors_of(folder, first) + (folder / "err").read_text()
            raise RankError(f"rank {', '.join(map(str, first))} of {count} failed\n{errors}")
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(count)]


COUNTS = (1, 2, 4)


def join_group() -> tuple[int, int]:
    """Of seven processes, groups of 1, 2 and 4 at once: this process's rank in its group, and the
    group's size. For functions that `run_ranks` calls with `group=False`."""
    rank = int(os.environ["RANK"])
    count = next(count for count in COUNTS if rank < 2 * count - 1)
    place = rank - (count - 1)
    group = torch.distributed.PrefixStore(f"{count}", common_store())
    torch.distributed.init_process_group("gloo", store=group, rank=place, world_size=count)
    return place, count


def common_store() -> torch.distributed.Store:
    """A connection to the store of all processes that `run_ranks` has started."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore(*address, is_master=False)


def _errors_of(folder: Path, ranks: Any) -> str:
    """The ends of the ranks' standard error."""
    errors = ""
    for rank in ranks:
        with contextlib.suppress(OSError):
            errors += f"--- rank {rank}\n{(folder / f'err-{rank}').read_text()[-4000:]}\n"
    return errors


class _Server:
    """A process that has imported torch and forks the launchers; it ends when its input is closed,
    which the end of this process does too."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment_of({}),
            start_new_session=True, bufsize=0,
        )  # fmt: skip

    def launch(self, folder: Path, environment: dict[str, str], timeout_s: float) -> int | None:
        """Have a launcher make the call in `folder`: its exit code; None after the time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = json.dumps([str(folder), environment_of(environment)])
        self._process.stdin.write(request.encode() + b"\n")
        pid, code = int(self._process.stdout.readline()), None
        try:
            if select.select([self._process.stdout], [], [], timeout_s)[0]:
                code = int(self._process.stdout.readline())
        finally:
            if code is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                self._process.stdout.readline()
        return code

    def end(self) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()


@functools.cache
def _server() -> _Server:
    server = _Server()
    atexit.register(server.end)
    return server


def environment_of(changes: dict[str, str]) -> dict[str, str]:
    """This process's variables for one that forks ranks or is started as one."""
    paths = [str(TESTS), str(SOURCES), os.environ.get("PYTHONPATH", "")]
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",  # no threads before the ranks are forked
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
        **changes,
    }


def _serve() -> None:
    """Fork a launcher for each line of standard input, a folder and variables as JSON.

    Its process id is printed, and its exit code when it has ended.
    """
    # Sharding and optimizers would import these in every rank.

    import mygpt.cpu.train.step
    import mygpt.training  # noqa: F401

    parent = os.getppid()
    for line in sys.stdin.buffer:
        pid = os.fork()
        if not pid:
            _be_launcher(*json.loads(line))
        print(pid, flush=True)
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if os.getppid() != parent:  # pytest has ended
                os.killpg(pid, signal.SIGKILL)
                return
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):  # ranks that are left
            os.killpg(pid, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(ended[1]), flush=True)


def _be_launcher(folder: str, environment: dict[str, str]) -> None:
    """The work of a forked process, in a session of its own; does not return."""
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT, 0o600), stream)
        os.environ.clear()
        os.environ.update(environment)
        code = _main(Path(folder))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main(folder: Path) -> int:
    """Fork the ranks; return 1 as soon as one has failed."""
    parent = os.getppid()
    call = pickle.loads((folder / "call").read_bytes())
    count, home, module, name, arguments, group, timeout_s = call
    sys.path.insert(0, home)
    function = getattr(importlib.import_module(module), name)
    ranks: dict[int, int] = {}
    for rank in range(count):
        pid = os.fork()
        if not pid:
            _be_rank(folder, rank, lambda: function(*arguments), timeout_s if group else None)
        ranks[pid] = rank
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            time.sleep(0.005)
        elif status:
            (folder / "failed").write_text(str(ranks[pid]))
            time.sleep(_GRACE_S)
        else:
            del ranks[pid]
        if status or os.getppid() != parent:  # pytest has ended
            for other in ranks.keys() - {pid}:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


def _be_rank(folder: Path, rank: int, work: Callable[[], Any], timeout_s: float | None) -> None:
    """The work of a forked process; does not return."""
    code = 1
    try:
        for stream, name in ((1, "out"), (2, "err")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            os.dup2(os.open(folder / f"{name}-{rank}", flags, 0o600), stream)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        warnings.simplefilter("error")
        torch.set_num_threads(1)
        if timeout_s is not None:
            torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
        result = work()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the first one that ends closes its connections
            torch.distributed.destroy_process_group()
        (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
