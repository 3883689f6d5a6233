"""`python -m torture [NAME...]`: all torture tests, or the named ones, with the full counts."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from torture import Tally, damage, deaths, hosts, interrupts, numbers, serving, stores, strings
from torture.odd_texts import text_inputs

# Each test, its count in `make torture`, and its count in `make test`.
ALL: list[tuple[Callable[[int, Path], Tally], int, int]] = [
    (deaths.kill_at_random, 200, 4),
    (stores.kill_tokenizing, 20, 2),
    (deaths.stop_at_every_step, 200, 6),
    (deaths.faults_in_a_save, 1000, 10),
    (damage.flipped_bits, 2000, 60),
    (damage.cut_ends, 1000, 41),
    (deaths.full_disk, 50, 3),
    (deaths.signalled_at_random, 200, 4),
    (interrupts.interrupted_at_random, 200, 3),
    (numbers.planted_nans, 100, 8),
    (numbers.same_seed, 10, 2),
    (numbers.replayed, 10, 1),
    (damage.hostile_pickles, 500, 40),
    (damage.hostile_headers, 10000, 120),
    (strings.strings, 100000, 200),
    (text_inputs, 100, 12),
    (hosts.hosts, 7, 0),
    (serving.odd_clients, 1, 0),
]


def main(names: list[str]) -> int:
    """Run them and print each tally; 1 if a trial failed, else 0."""
    torch.set_num_threads(1)
    wrong = 0
    print("What survives the death of a process; a loss of power is not simulated.")
    for torture, count, _ in ALL:
        if names and torture.__name__ not in names:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="torture-") as folder:
            tally = torture(count, Path(folder))
        wrong += not tally.good and not tally.note.startswith("not run")
        print(f"{tally}  [{torture.__name__}, {time.monotonic() - began:.0f} s]", flush=True)
    return min(1, wrong)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
