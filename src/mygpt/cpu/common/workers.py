"""Threads that run kernels at the same time as the caller; they are kept from run to run."""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

from mygpt.machine import cpu_quota

Run = Callable[[int, int], int]


@functools.cache
def usable_cores() -> int:
    """Cores this process may run on, at most as many as its control group's quota allows.

    Two hardware threads of one core count once: a matrix product alone keeps a core's arithmetic
    units or its memory busy, and a second thread on it only makes the others wait.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})
    else:
        cores = os.cpu_count() or 1
    quota = cpu_quota()
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def _siblings(cpu: int) -> str:
    """The list of hardware threads, as Linux writes it, that share this one's core."""
    try:
        path = f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        return Path(path).read_text().strip()
    except OSError:
        return str(cpu)


class _Worker:
    """A thread that waits for tasks. A queue puts it to sleep between runs; in a run it spins."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[tuple[Run, int, int]] = SimpleQueue()
        self.done: SimpleQueue[None] = SimpleQueue()
        threading.Thread(target=self._work, name="mygpt-cpu", daemon=True).start()

    def _work(self) -> None:
        while True:
            run, address, number = self.tasks.get()
            run(address, number)
            self.done.put(None)


_workers: dict[tuple[int, int, int], _Worker] = {}


def run_on_threads(run: Run, address: int, threads: int) -> None:
    """Call run(address, n) for n from 0 to threads - 1 at the same time; return when all have."""
    helpers = []
    for number in range(1, threads):
        # The process is part of the key since threads do not survive a fork. Two callers never
        # share a worker: kernels of one run wait for each other at barriers, so a worker that is
        # still busy with another run would make both wait.
        key = (os.getpid(), threading.get_ident(), number)
        if key not in _workers:
            _workers[key] = _Worker()
        helpers.append(_workers[key])
        helpers[-1].tasks.put((run, address, number))
    run(address, 0)
    for helper in helpers:
        helper.done.get()
