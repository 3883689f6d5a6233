"""Threads that run their part of a compiled job beside the caller; kept between jobs."""

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
    """Cores this process may run on, and no more than its control group's share of time.

    Two hardware threads of one core count once: a product keeps a core's arithmetic or its
    memory busy by itself, and a second thread on it only makes the others wait.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})
    else:
        cores = os.cpu_count() or 1
    share = cpu_quota()
    return max(1, cores if share is None else min(cores, math.ceil(share)))


def _siblings(cpu: int) -> str:
    """What Linux calls the core that this hardware thread belongs to."""
    try:
        path = f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        return Path(path).read_text().strip()
    except OSError:
        return str(cpu)


class _Worker:
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
    """Call run(address, n) for n from 0 to threads - 1 at once; return when all have."""
    helpers = []
    for number in range(1, threads):
        # The process too is part of the key: threads do not survive a fork. And two callers
        # never share a worker: they would wait for each other's jobs.
        key = (os.getpid(), threading.get_ident(), number)
        if key not in _workers:
            _workers[key] = _Worker()
        helpers.append(_workers[key])
        helpers[-1].tasks.put((run, address, number))
    run(address, 0)
    for helper in helpers:
        helper.done.get()
