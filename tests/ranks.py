"""Several processes for one test: a function called by every rank, and mygpt under torchrun.

`run_ranks` starts one process that imports torch and the test's module and forks the ranks. All
processes that were started are ended when the call ends, also by an error.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import pickle
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from paths import SOURCES, TESTS

_MARK = "MYGPT_TEST_RANKS"  # an environment variable of all processes started here
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
        command = [sys.executable, __file__, name]
        with _started(command, folder, {**addresses, **environment}) as process:
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                errors = _errors_of(folder, range(count))
                raise RankError(f"{count} ranks did not end in {timeout_s} s\n{errors}") from None
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
    paths = [str(TESTS), str(SOURCES), os.environ.get("PYTHONPATH", "")]
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    env = {
        **inherited,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",  # no threads before the ranks are forked
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
        **environment,
        _MARK: mark,
    }
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


def _main(folder: Path) -> int:
    """Fork the ranks; return 1 as soon as one has failed."""
    import torch._dynamo  # sharding and optimizers would, in every rank  # noqa: F401

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
    sys.exit(_main(Path(sys.argv[1])))
