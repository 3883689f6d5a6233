"""Snapshots of a run: they change nothing else, take 1% of the time, and follow the run's state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mygpt.training import run as run_module
from mygpt.training import snapshots as module
from mygpt.training.progress import Progress
from mygpt.training.run import RunFolder
from mygpt.training.snapshots import Snapshots, read_snapshots
from training_runs import Runs, assert_same, plant

NAME = "snapshots.jsonl"


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot at each share of the run, however long that takes."""
    monkeypatch.setattr(module, "_TIME_FRACTION", 1e9)


def steps_of(run: Path) -> list[int]:
    found, why = read_snapshots(run / NAME)
    assert why == ""
    return [one.step for one in found]


@pytest.mark.slow
def test_losses_states_and_logs_are_the_same_with_and_without(runs: Runs, often) -> None:
    """Also with dropout, whose random numbers torch draws."""
    runs.fit(dropout=0.2, sample_tokens=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TIME_FRACTION", 0.0)
        runs.fit("without", dropout=0.2, sample_tokens=10)
    assert steps_of(runs / "run")[-1] == 12
    assert not (runs / "without" / NAME).exists()
    assert_same(runs / "run", runs / "without")


@pytest.mark.slow
def test_a_resumed_run_has_each_snapshot_once(runs: Runs, often) -> None:
    """Those after the last save are cut: their steps are repeated."""
    runs.fit("whole")
    runs.fit_until(6)
    later = (runs / "whole" / NAME).read_bytes().splitlines(keepends=True)[-2:]
    with (runs / "run" / NAME).open("ab") as file:
        file.write(b"".join(later) + b'{"step": 13')
    runs.resume()
    assert steps_of(runs / "run") == steps_of(runs / "whole")
    both = (read_snapshots(runs / name / NAME)[0] for name in ("run", "whole"))
    for one, other in zip(*both, strict=True):
        assert (one.loss, one.kinds, one.sample) == (other.loss, other.kinds, other.sample)


@pytest.mark.slow
def test_a_rollback_cuts_the_snapshots_too(runs: Runs, often) -> None:
    plant(runs.patch, lambda call: float("nan") if 7 <= call < 17 else 1.0)
    runs.fit(eval_every=0)
    steps = steps_of(runs / "run")
    assert steps == sorted(set(steps))
    assert steps[-1] == 12


@pytest.mark.slow
def test_a_new_run_in_the_folder_has_none_of_the_old_ones(runs: Runs, often) -> None:
    runs.fit()
    module._TIME_FRACTION = 0.0
    runs.fit(overwrite=True, steps=3)
    assert not (runs / "run" / NAME).exists()


def test_the_file_is_thinned_when_it_gets_too_long(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_module, "_MOST_SNAPSHOT_BYTES", 1000)
    run = RunFolder.at(tmp_path)
    for step in range(1, 201):
        run.append_snapshot(json.dumps({"step": step, "text": 50 * "x"}).encode() + b"\n")
        assert run.snapshots_path.stat().st_size <= 1000
    steps = [json.loads(line)["step"] for line in run.snapshots_path.read_bytes().splitlines()]
    assert (steps[0], steps[-1]) == (1, 200)
    assert steps == sorted(set(steps))
    assert len(steps) > 5


class Timed:
    """`Snapshots` of a made-up run, with a clock that each snapshot moves by `cost_s`."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, cost_s: float) -> None:
        self.taken: list[int] = []
        self.now = 0.0
        self.cost_s = cost_s
        patch.setattr(module.time, "perf_counter", lambda: self.now)
        self.snapshots = object.__new__(Snapshots)
        known: dict[str, Any] = {
            "_run": RunFolder.at(folder), "_problem": "", "_cost_s": None, "_spent_s": 0.0,
            "_taken_step": -1, "_record": self.record, "_sample_tokens": 0,
        }  # fmt: skip
        vars(self.snapshots).update(known)

    def record(self, step: int) -> dict[str, Any]:
        self.now += self.cost_s
        self.taken.append(step)
        return {}

    def run(self, seconds: float, steps: int) -> None:
        """All snapshots that are due in a run of so many seconds."""
        for share in (*module.FRACTIONS, 1.0):
            step = max(1, round(share * steps))
            progress = Progress(step=step, elapsed_s=seconds * step / steps)
            self.snapshots.take(progress, share, seconds)


@pytest.mark.parametrize("cost_s", [0.001, 0.01, 0.03, 0.1, 0.3])
def test_snapshots_take_at_most_a_hundredth_of_the_time(tmp_path, monkeypatch, cost_s) -> None:
    """The last one is always among them, and the others are spread from the beginning on."""
    timed = Timed(monkeypatch, tmp_path, cost_s)
    timed.run(120.0, 6000)
    assert timed.now <= 0.01 * 120
    assert timed.taken[-1] == 6000
    assert timed.taken[0] < 600
    assert len(timed.taken) >= min(40, 1.2 / cost_s - 2)


def test_a_run_without_a_snapshot_says_why(tmp_path, monkeypatch) -> None:
    timed = Timed(monkeypatch, tmp_path, 5.0)
    timed.run(120.0, 20)  # a step takes 6 s
    found, why = read_snapshots(tmp_path / NAME)
    assert (timed.taken, found) == ([], [])
    assert why == "one takes about 6 s, and all together may take 1% of the training's 120 s"


def test_a_short_run_has_none_and_says_nothing(tmp_path, monkeypatch) -> None:
    timed = Timed(monkeypatch, tmp_path, 0.02)
    timed.run(1.0, 100)
    assert (timed.taken, (tmp_path / NAME).exists()) == ([], False)


def test_lines_that_are_no_snapshots_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_text('{"step": 1}\nnonsense\n[1]\n{"step": 2, "lens": "x"}\n{"ste')
    assert read_snapshots(path) == ([], "")
    assert read_snapshots(tmp_path / "missing") == ([], "")
