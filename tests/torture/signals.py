"""Signals at random moments, one or two."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from mygpt.errors import Interrupted
from torture import Tally
from torture.runs import Child, Flag, differs, fresh, in_child, resume, train

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def _until_signalled(run: Path, flag: Flag) -> None:
    """As the command: a run that a signal ended has exit code 128 + the signal's number."""
    from mygpt.training.trainer import Trainer

    for number in _NUMBERS:  # a shell that starts this in the background has some ignored
        default = number == signal.SIGINT and signal.default_int_handler
        signal.signal(number, default or signal.SIG_DFL)
    inner = Trainer.fit

    def fit(self: Trainer, should_stop: object) -> None:
        flag.value = 1
        inner(self, should_stop)  # type: ignore[arg-type]

    Trainer.fit = fit  # type: ignore[method-assign]
    try:
        train(run)
    except KeyboardInterrupt as error:
        os._exit(128 + (error.signal if isinstance(error, Interrupted) else signal.SIGINT))


def signalled_at_random(count: int, folder: Path) -> Tally:
    """A signal at a random moment of training; each third run gets a second one at once."""
    tally = Tally(
        "signalled: a state, the right code, no temporary files, resumed bitwise the same"
    )
    reference, rng = fresh(folder, "reference"), random.Random(0)
    assert in_child(lambda: train(reference)) == 0
    finished = 0
    for trial in range(count):
        run = fresh(folder)
        child = Child(lambda flag, run=run: _until_signalled(run, flag))  # type: ignore[misc]
        while child.flag.value == 0 and child.alive():
            time.sleep(0.0002)
        time.sleep(0.002 + rng.random() * 0.25)
        number = rng.choice(_NUMBERS)
        second = trial % 3 == 2
        if child.alive():
            child.send(number)
        if second:
            time.sleep(rng.random() * 0.01)
            if child.alive():
                child.send(number)
        code = child.wait()
        # A signal after the end of the run finds the default handler again.
        finished += code in (0, -number)
        left = [path.name for path in run.glob(".mygpt-*")]
        after = in_child(lambda run=run: resume(run))  # type: ignore[misc]
        problem = differs(run, reference) if after == 0 else f"resuming ended with {after}"
        ok = code in (128 + number, 0, -number) and not left and not problem
        tally.count(ok, f"trial {trial}: code {code} for {number}, {left}, {problem}")
    tally.note = f"{finished} had finished before the signal"
    return tally
