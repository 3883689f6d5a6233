"""Snapshots of a training: when they are taken, and the file in which they are kept.

They take at most 1% of the training's time, and change neither weights nor random generators.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from typing import TYPE_CHECKING, Any

from mygpt.decode.writer import Writer
from mygpt.evaluation.snapshot import Probe, Snapshot
from mygpt.json_objects import read_records, step_of

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from mygpt.core.config import GPTConfig
    from mygpt.training.checkpointing import Setup
    from mygpt.training.progress import Progress

# Fractions of the run at which snapshots are due, dense where most changes. The end is another one.
FRACTIONS = tuple((number / 48) ** 2 for number in range(1, 48))
MOST_BYTES = 50_000  # of a snapshot
_TIME_FRACTION = 0.01  # of the run's time
_AT_FIRST = 0.2  # of that time may be used at the run's beginning
_LEAST_S = 0.05  # about what the first snapshot of a small model takes
_LONG_S = 10.0  # a run as long as this says why it has no snapshot
_MOST_HEADS = 1000  # of all blocks: their scores have to fit in a snapshot
_SAMPLE_TOKENS, _SAMPLE_CHARS = 40, 300


class Snapshots:
    """Takes the snapshots of a run.

    Args:
        setup: of the run.
        val_tokens: 1-D ids of the validation text.
        sharded: whether each process has a part of the weights.
    """

    def __init__(self, setup: Setup, val_tokens: NDArray[np.integer], *, sharded: bool) -> None:
        self._model, self._tokenizer = setup.model, setup.text.tokenizer
        self._run, self._val_tokens = setup.run, val_tokens
        self._seq_len = setup.config.seq_len
        self._sample_tokens = min(_SAMPLE_TOKENS, setup.config.sample_tokens)
        self._probe: Probe | None = None
        self._cost_s: float | None = None  # of the last snapshot; None before the first
        self._spent_s = 0.0
        self._taken_step = -1
        self._problem = _problem(setup.model.config, sharded=sharded)

    def resume(self, step: int) -> None:
        """Continue from a saved state of that step: later snapshots are removed."""
        self._run.cut_snapshots(step)
        found, _ = read_snapshots(self._run.snapshots_path)
        self._spent_s = sum(one.took_s for one in found)
        self._taken_step = found[-1].step if found else -1

    def take(self, progress: Progress, done: float, total_s: float) -> None:
        """Take a snapshot, if the time that is left for that allows it.

        Args:
            progress: of the run.
            done: the fraction of the run that is done; at its end, 1.
            total_s: how long the training will take.
        """
        if not self._run.group.is_main or progress.step in (0, self._taken_step):
            return
        cost_s = self._cost_s
        if cost_s is None:  # a step reads more tokens, also backward
            cost_s = max(_LEAST_S, progress.elapsed_s / progress.step)
        # The square root gives the first tenth of a run a third of the time. One snapshot is
        # reserved for the end.
        most_s = _TIME_FRACTION * total_s
        if done < 1:
            most_s = most_s * (_AT_FIRST + (1 - _AT_FIRST) * math.sqrt(done)) - cost_s
        too_long = self._spent_s + cost_s > most_s
        if not self._problem and not too_long:
            self._take(progress.step)
        elif done >= 1 and self._taken_step < 0 and total_s >= _LONG_S:
            why = self._problem or (
                f"one takes about {cost_s:.2g} s, and all together may take "
                f"{_TIME_FRACTION:.0%} of the training's {total_s:.0f} s"
            )
            self._append({"step": progress.step, "none": why})

    def _take(self, step: int) -> None:
        if self._cost_s is None and self._sample_tokens:
            self._sample(step, 1)  # loads an engine, which the samples of the run need anyway
        began = time.perf_counter()
        record = self._record(step)
        self._cost_s = time.perf_counter() - began
        self._spent_s += self._cost_s
        self._taken_step = step
        self._append({"step": step, "took_s": round(self._cost_s, 4), **record})

    def _append(self, record: dict[str, Any]) -> None:
        try:
            line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        except ValueError:  # a number is not finite, which the training notices by itself
            return
        if len(line) <= MOST_BYTES:
            self._run.append_snapshot(line)

    def _record(self, step: int) -> dict[str, Any]:
        if self._probe is None:
            config = self._model.config
            self._probe = Probe(self._val_tokens, self._tokenizer, config, self._seq_len)
        measured = self._probe.measure(self._model)
        text = self._sample(step, self._sample_tokens) if self._sample_tokens else ""
        return {**measured, "sample": text[:_SAMPLE_CHARS]}

    def _sample(self, seed: int, tokens: int) -> str:
        return Writer(self._model, self._tokenizer).generate("", tokens, seed=seed)


def _problem(config: GPTConfig, *, sharded: bool) -> str:
    """Why no snapshot can be taken; empty if one can."""
    if sharded:
        return "each process has only a part of the weights"
    if config.num_layers * config.num_heads > _MOST_HEADS:
        return f"the model has more than {_MOST_HEADS:,} heads"
    if config.max_seq_len < 2:
        return "in a window of 1 token there is no earlier one to attend to"
    return ""


def read_snapshots(path: Path) -> tuple[list[Snapshot], str]:
    """The snapshots in a file, in the order of steps, and why there are none; both may be empty.

    Invalid lines are skipped.

    Raises:
        CheckpointError: if it is a link, a pipe or a device.
    """
    found: list[Snapshot] = []
    why = ""
    with contextlib.suppress(OSError):  # a run without snapshots
        for record in read_records(path):
            step = step_of(record)
            if step is None or (found and step <= found[-1].step):
                continue
            if isinstance(record.get("none"), str):
                why = record["none"][:200]
            with contextlib.suppress(ValueError):
                found.append(Snapshot.from_record(record))
    return found, why
