"""The processes that train one model; usually there is a single one.

`torchrun` starts them and sets each one's rank in environment variables. Here they communicate
whatever decides what they do next: an error, the clock, a signal, the loss. That goes through
gloo on the CPU; gradients go through the backend of their device (NCCL on CUDA).
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.compat import set_process_group_timeout
from mygpt.errors import InputError, MygptError
from mygpt.machine import choose_device

T = TypeVar("T")

_START_TIMEOUT = timedelta(hours=2)  # process 0 may have to read and tokenize a long text
_STEP_TIMEOUT = timedelta(minutes=30)  # a step, and saving a large model or writing samples
_PORT_KEY, _PAUSE_S, _CONNECT_S = "mygpt/port", 0.05, 5.0
_groups_joined = itertools.count()  # a program may train several times, each with its own key


class PeerError(MygptError):
    """Another process of the group failed and reports why; this one ends without a message."""

    def __init__(self, exit_code: int = 1) -> None:
        super().__init__("")
        self.exit_code = exit_code


@dataclass(frozen=True)
class ProcessGroup:
    """This process's rank among those that train one model."""

    rank: int = 0  # its number, from 0; process 0 prepares the run, logs and writes
    size: int = 1  # the number of processes
    local_rank: int = 0  # its number on this machine
    local_size: int = 1  # the number of processes on this machine

    @property
    def is_single(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    @property
    def is_main(self) -> bool:
        """Whether this process logs and writes."""
        return self.rank == 0

    def choose_device(self, name: str) -> torch.device:
        """As `machine.choose_device`; with several CUDA devices each process takes its own."""
        device = choose_device(name)
        if self.is_single:
            return device
        if device.type == "mps":  # gloo does not support its tensors
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
        """Process 0's value, on all; it is pickled, between our own processes only."""
        if self.is_single:
            return value
        held = [value]
        with _peers():
            torch.distributed.broadcast_object_list(held, device=torch.device("cpu"))
        return held[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, on all."""
        if self.is_single:
            return [value]
        found: list[Any] = [None] * self.size
        with _peers():
            torch.distributed.all_gather_object(found, value)
        return found

    def run_on_all(self, action: Callable[[], T]) -> T:
        """The action's result in this process; if it fails in one, all raise.

        Raises:
            PeerError: if the action failed in another process.
        """
        if self.is_single:
            return action()
        problem: Exception | None = None
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

    def run_on_main(self, action: Callable[[], T]) -> T | None:
        """The result in process 0, which alone runs the action; if it fails, all raise."""
        return self.run_on_all(lambda: action() if self.is_main else None)

    def from_main(self, action: Callable[[], T]) -> T:
        """Process 0's result of an action, on all; if it fails, all raise."""
        return self.broadcast(self.run_on_all(lambda: [action()] if self.is_main else []))[0]

    def each_machine_first(self, action: Callable[[], T]) -> T:
        """The action's results in all processes; one of each machine goes first.

        It may fill a cache that the others of the machine then read.
        """
        first = self.run_on_all(lambda: [action()] if self.local_rank == 0 else [])
        return self.run_on_all(lambda: first or [action()])[0]

    def main_clock(self, seconds: float) -> float:
        """Process 0's reading of its clock, on all."""
        return seconds if self.is_single else float(self.all_gather(seconds)[0])

    def any_signal(self, number: int | None) -> int | None:
        """The number of a signal that any process has received; None if there was none."""
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
        """The sum of all processes' parts of a loss (scalars), the same on all."""
        if self.is_single:
            return part
        if part.device.type == "cpu":  # the same order of addition on all
            return torch.tensor(self.all_gather(part.item()).sum(), dtype=torch.float32)
        total = part.clone()
        torch.distributed.all_reduce(total)
        return total

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        if not self.is_single:
            with _peers():
                torch.distributed.all_reduce(tensor)

    def broadcast_arrays(
        self, arrays: Mapping[str, NDArray[Any]] | None
    ) -> dict[str, NDArray[Any]]:
        """Process 0's arrays, on all; the others pass None. They are copied one at a time."""
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
        """Overwrite an array with process 0's; contiguous, and of the same shape on all."""
        if array.size and not self.is_single:
            data = torch.from_numpy(array.reshape(-1).view(np.uint8))
            with _peers():
                torch.distributed.broadcast(data, 0)

    def shorten_timeout(self) -> None:
        """From here on wait less long for other processes, so that a lost machine is noticed."""
        if not self.is_single:
            set_process_group_timeout(_STEP_TIMEOUT)

    def shards_model(self, wanted: bool) -> bool:
        """Whether the model is sharded: if that is asked for and there are several processes."""
        return wanted and not self.is_single

    def rows_per_process(self, batch_size: int) -> int:
        """The largest number of rows of a batch that one process gets."""
        return -(-batch_size // self.size)


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def _peers() -> Iterator[None]:
    """Turn torch's error about a lost process into a `PeerError`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, MygptError):
            raise
        raise PeerError from error


def from_environment() -> ProcessGroup:
    """The group of the environment variables that `torchrun` sets; without them a single process.

    Raises:
        InputError: for values that are not possible.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return SINGLE_PROCESS
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        text = os.environ.get(name, "1" if name.endswith("SIZE") else "0")
        if not (text.isascii() and text.isdigit()):
            raise InputError(
                f"{name}={text!r:.40} in the environment is not a number: use torchrun"
            )
        numbers[name] = int(text)
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if not rank < size:
        raise InputError(
            f"RANK={rank} in the environment is not below WORLD_SIZE={size}: use torchrun"
        )
    return ProcessGroup(rank, size, numbers["LOCAL_RANK"], numbers["LOCAL_WORLD_SIZE"])


def restart_advice(*, resumes: bool) -> list[str]:
    """A line if `torchrun` is to restart this command, and that would not resume the run.

    Args:
        resumes: whether the command resumes a run that exists.
    """
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return []
    if not resumes:
        return ["a restart by torchrun resumes this run only with --resume auto: add it"]
    several = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    if several and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return [
            "a machine that dies cannot join again: start torchrun with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every machine (docs/scaling.md)"
        ]
    return []


@contextmanager
def joined(device: str = "auto") -> Iterator[ProcessGroup]:
    """The process group of this training, connected until the end of the block.

    Errors inside get the number of their process, and are also passed to `torchrun`.
    """
    group = from_environment()
    if group.is_single:
        yield group
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    where = group.choose_device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    began = not torch.distributed.is_initialized()
    try:
        if began:
            _connect_group(group, where)
        yield group
    except MygptError as error:
        if isinstance(error, PeerError):
            raise
        get_error_handler().record_exception(error)  # torchrun reads the cause of a failure there
        if group.is_main:
            raise
        message = f"process {group.rank} of {group.size} on {socket.gethostname()}: {error}"
        raise type(error)(message) from error
    except RuntimeError as error:  # FSDP communicates within a step
        if not _is_about_peers(error):
            raise
        raise PeerError from error
    finally:
        if began and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _connect_group(group: ProcessGroup, where: torch.device) -> None:
    """Connect to the other processes.

    Raises:
        InputError: if they cannot be reached.
    """
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    options: dict[str, Any] = {}
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = _own_store(group)
            options = {"store": store, "rank": group.rank, "world_size": group.size}
        torch.distributed.init_process_group(backend, timeout=_START_TIMEOUT, **options)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, MygptError):
            raise
        raise InputError(
            f"the {group.size} processes cannot connect to each other ({error!s:.200}): if all of "
            "them run, name the machines' network device, GLOO_SOCKET_IFNAME=eth0 perhaps"
        ) from error


def _is_about_peers(error: RuntimeError) -> bool:
    """Whether this error of torch means that another process is lost."""
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)


def _own_store(group: ProcessGroup) -> Any:
    """A store of this attempt alone; its port is published in `torchrun`'s store.

    `torchrun`'s own store outlives the processes, and keeps the addresses of an earlier attempt,
    for which new processes would wait (pytorch/pytorch#135712).
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    key = f"{_PORT_KEY}/{next(_groups_joined)}"
    agents = TCPStore(host, port, is_master=False, timeout=_START_TIMEOUT)
    if group.is_main:
        own = TCPStore(host, 0, is_master=True, timeout=_START_TIMEOUT, wait_for_workers=False)
        agents.set(key, str(own.port))
        return own
    until = time.monotonic() + _START_TIMEOUT.total_seconds()
    while True:
        published = int(agents.get(key))
        try:  # an earlier attempt's process 0 has ended, and its port is closed
            socket.create_connection((host, published), timeout=_CONNECT_S).close()
            return TCPStore(host, published, is_master=False, timeout=_START_TIMEOUT)
        except (RuntimeError, OSError):
            if time.monotonic() > until:
                raise PeerError from None
            time.sleep(_PAUSE_S)
