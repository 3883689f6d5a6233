"""Load by other programs: the processor cores that they used during a measurement."""

from __future__ import annotations

import os
import time
from pathlib import Path

TOLERATED_CORES = 0.1


class Others:
    """Measures from its construction on.

    On Linux; elsewhere `cores` gives 0. Child processes are not counted as others once they have
    ended.
    """

    def __init__(self) -> None:
        self._before = (time.monotonic(), _machine_s(), _own_s())

    def cores(self) -> float:
        """Average number of cores that other programs have used since then."""
        began, machine_s, own_s = self._before
        used = (_machine_s() - machine_s) - (_own_s() - own_s)
        return max(0.0, used) / max(1e-9, time.monotonic() - began)


def _own_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _machine_s() -> float:
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    ticks = [int(word) for word in first]
    return (sum(ticks[:8]) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # less idle, iowait
