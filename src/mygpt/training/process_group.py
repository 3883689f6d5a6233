"""The processes that train one model together; one alone is the usual case.

`torchrun` starts them and tells each its place through environment variables. They agree here on
everything that decides what comes next: a wrong input, the clock, a signal, the loss. What is
agreed on goes through main memory (gloo); gradients go the way of their device (NCCL on CUDA).
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.errors import InputError, MygptError
from mygpt.machine import choose_device

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

_PATIENCE = timedelta(hours=2)  # the first process may read and tokenize a long text meanwhile
_STEP_PATIENCE = timedelta(minutes=30)  # a save of a large model, or samples, and some more
_MEETING, _PAUSE_S, _CONNECT_S = "mygpt/port", 0.05, 5.0
_meetings = itertools.count()  # a program may train several times: every meeting has a place
_NO_NAME = ("", "none")  # torchrun's names for a job that was given none


class PeerError(MygptError):
    """Another process of the same training failed and has told why; this one is silent."""

    def __init__(self, exit_code: int = 1) -> None:
        super().__init__("")
        self.exit_code = exit_code


@dataclass(frozen=True)
class ProcessGroup:
    """This process's place among those that train together.

    Attributes:
        rank: its number, from 0; number 0 reads the plan, logs and writes.
        size: how many there are.
        local_rank: its number on this machine.
        local_size: how many there are on this machine.
        job: the name under which `torchrun` starts this training anew; None where nothing does.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    job: str | None = None

    @property
    def is_single(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    @property
    def is_main(self) -> bool:
        """Whether this process logs and writes."""
        return self.rank == 0

    def choose_device(self, name: str) -> torch.device:
        """As `machine.choose_device`; of several CUDA devices each process takes its own."""
        device = choose_device(name)
        if self.is_single:
            return device
        if device.type == "mps":  # gloo does not carry its tensors
            if name == "auto":
                return torch.device("cpu")
            raise InputError(f"device={name} cannot be shared by processes: use --device cpu")
        if device.type != "cuda":
            return device
        if ":" in name and self.local_size > 1:
            raise InputError(
                f"device={name} is one device for {self.local_size} processes: use --device cuda"
            )
        return device if ":" in name else choose_device(f"cuda:{self.local_rank}")

    def broadcast(self, value: T) -> T:
        """The first process's value, on all; it goes through pickle, between our own processes."""
        if self.is_single:
            return value
        held = [value]
        with _peers():
            torch.distributed.broadcast_object_list(held, device=torch.device("cpu"))
        return held[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of their numbers, on all."""
        if self.is_single:
            return [value]
        found: list[Any] = [None] * self.size
        with _peers():
            torch.distributed.all_gather_object(found, value)
        return found

    def run_on_all(self, action: Callable[[], T], *, main_only: bool = False) -> T | None:
        """Do something everywhere, or in the first process alone; if one fails, all do.

        Returns what the action gave here; None where it was not done.

        Raises:
            PeerError: where another process failed.
        """
        if self.is_single:
            return action()
        result: T | None = None
        problem: Exception | None = None
        if self.is_main or not main_only:
            try:
                result = action()
            except Exception as error:
                problem = error
        codes = self.gather(None if problem is None else getattr(problem, "exit_code", 1))
        first = next((rank for rank, code in enumerate(codes) if code is not None), None)
        if first is None:
            return result
        if first == self.rank and problem is not None:
            raise problem
        raise PeerError(codes[first] or 1)

    def main_clock(self, seconds: float) -> float:
        """The first process's reading of its clock, on all."""
        return seconds if self.is_single else float(self.all_gather(seconds)[0])

    def any_signal(self, number: int | None) -> int | None:
        """A signal that any process has received; None for none."""
        if self.is_single:
            return number
        return int(self.all_gather(number or 0).max()) or None

    def all_gather(self, number: float) -> NDArray[np.float64]:
        """One number from each process, (N,) float64, the same on all."""
        found = list(torch.empty(self.size, 1, dtype=torch.float64))
        with _peers():
            torch.distributed.all_gather(found, torch.tensor([number], dtype=torch.float64))
        return torch.cat(found).numpy()

    def sum_loss(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of every process's part of a loss (scalars), the same on all."""
        if self.is_single:
            return part
        if part.device.type == "cpu":  # added in one order everywhere
            return torch.tensor(self.all_gather(part.item()).sum(), dtype=torch.float32)
        total = part.clone()
        torch.distributed.all_reduce(total)
        return total

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Make a tensor the sum of every process's, in place."""
        if not self.is_single:
            with _peers():
                torch.distributed.all_reduce(tensor)

    def broadcast_arrays(
        self, arrays: Mapping[str, NDArray[Any]] | None
    ) -> dict[str, NDArray[Any]]:
        """The first process's arrays, on all; the others give None. One at a time is copied."""
        known = arrays or {}
        if self.is_single:
            return dict(known)
        shapes = self.broadcast({name: (a.shape, a.dtype) for name, a in known.items()})
        found: dict[str, NDArray[Any]] = {}
        for name, (shape, dtype) in shapes.items():
            array = np.array(known[name], order="C") if known else np.empty(shape, dtype)
            self.broadcast_bytes(array)
            found[name] = known[name] if known else array
        return found

    def broadcast_bytes(self, array: NDArray[Any]) -> None:
        """Make an array, contiguous and of one shape everywhere, what the first process's is."""
        if array.size and not self.is_single:
            data = torch.from_numpy(array.reshape(-1).view(np.uint8))
            with _peers():
                torch.distributed.broadcast(data, 0)

    def shorten_timeout(self) -> None:
        """From here on nobody waits long for another: a machine that vanished is noticed then."""
        shorten = getattr(torch.distributed.distributed_c10d, "_set_pg_timeout", None)
        if not self.is_single and shorten is not None:
            shorten(_STEP_PATIENCE)

    def shards_model(self, wanted: bool) -> bool:
        """Whether a model is shared out, where that is wanted: not to one process."""
        return wanted and not self.is_single

    def rows_per_process(self, batch_size: int) -> int:
        """The most rows of a batch that one process takes."""
        return -(-batch_size // self.size)


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def _peers() -> Iterator[None]:
    """What torch raises when another process is gone becomes a `PeerError`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, MygptError):
            raise
        raise PeerError from error


def from_environment() -> ProcessGroup:
    """Where `torchrun` has put this process; alone where it was not started by it.

    Raises:
        InputError: for a place that cannot be.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return SINGLE_PROCESS
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        text = os.environ.get(name, "1" if name.endswith("SIZE") else "0")
        if not (text.isascii() and text.isdigit()):
            raise InputError(f"{name}={text!r:.40} in the environment is no number: use torchrun")
        numbers[name] = int(text)
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if not rank < size:
        raise InputError(
            f"RANK={rank} in the environment is not below WORLD_SIZE={size}: use torchrun"
        )
    return ProcessGroup(rank, size, numbers["LOCAL_RANK"], numbers["LOCAL_WORLD_SIZE"], _job())


def _job() -> str | None:
    """A name that stays the same when `torchrun` starts the processes again, and is no other's."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return None
    if name not in _NO_NAME:
        return f"job {name}"
    parent = os.getppid()  # the agent outlives those that it starts
    try:
        began = Path(f"/proc/{parent}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
    return f"agent {socket.gethostname()} {parent} {began[19]}"


@contextmanager
def joined(device: str = "auto") -> Iterator[ProcessGroup]:
    """The processes of this training, in touch with each other until the end of the block.

    What is raised inside is told with the number of its process, and to `torchrun`.
    """
    group = from_environment()
    if group.is_single:
        yield group
        return
    where = group.choose_device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    began = not torch.distributed.is_initialized()
    try:
        if began:
            _meet(group, where)
        yield group
    except MygptError as error:
        if isinstance(error, PeerError):
            raise
        _tell_torchrun(error)
        if group.is_main:
            raise
        told = f"process {group.rank} of {group.size} on {socket.gethostname()}: {error}"
        raise type(error)(told) from error
    except RuntimeError as error:  # FSDP sends in the middle of a step
        if not _tells_of_peers(error):
            raise
        raise PeerError from error
    finally:
        if began and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _meet(group: ProcessGroup, where: torch.device) -> None:
    """Get in touch with the other processes.

    Raises:
        InputError: where they cannot be reached.
    """
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    meeting: dict[str, Any] = {}
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = _meeting_place(group)
            meeting = {"store": store, "rank": group.rank, "world_size": group.size}
        torch.distributed.init_process_group(backend, timeout=_PATIENCE, **meeting)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, MygptError):
            raise
        raise InputError(
            f"the {group.size} processes do not reach each other ({error!s:.200}): if all of them "
            "run, name the network device between the machines, GLOO_SOCKET_IFNAME=eth0 perhaps"
        ) from error


def _tells_of_peers(error: RuntimeError) -> bool:
    """Whether torch says with it that another process is gone."""
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)


def _meeting_place(group: ProcessGroup) -> Store:
    """A store of this attempt's own, whose port is told in the one that `torchrun` holds.

    That one outlives the processes, and keeps where those of an earlier attempt listened: new
    ones would wait for the dead (pytorch/pytorch#135712).
    """
    from torch._C._distributed_c10d import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    key = f"{_MEETING}/{next(_meetings)}"
    agents = TCPStore(host, port, is_master=False, timeout=_PATIENCE)
    if group.is_main:
        own = TCPStore(host, 0, is_master=True, timeout=_PATIENCE, wait_for_workers=False)
        agents.set(key, str(own.port))
        return own
    until = time.monotonic() + _PATIENCE.total_seconds()
    while True:
        told = int(agents.get(key))
        try:  # an earlier attempt's first process is dead, and its port closed
            _connect(host, told)
            return TCPStore(host, told, is_master=False, timeout=_PATIENCE)
        except (RuntimeError, OSError):
            if time.monotonic() > until:
                raise PeerError from None
            time.sleep(_PAUSE_S)


def _connect(host: str, port: int) -> None:
    """Raise `OSError` where nobody listens."""
    socket.create_connection((host, port), timeout=_CONNECT_S).close()


def _tell_torchrun(error: MygptError) -> None:
    """Leave the message where `torchrun` looks for what to show as the cause."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": "", "timestamp": str(int(time.time()))}
    try:
        Path(path).write_text(json.dumps({"message": {"message": str(error), "extraInfo": extra}}))
    except OSError:
        return
