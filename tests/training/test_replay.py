"""A run is reproduced exactly: its threads, its schedule by the clock, and its text."""

from __future__ import annotations

import math
import time
import tomllib
from pathlib import Path

import pytest
import torch

from mygpt import training
from mygpt.checkpoint.container import read_arrays
from mygpt.training.non_finite import SKIPS_BEFORE_ROLLBACK
from paths import GOLDEN
from training_runs import (
    Runs,
    assert_arrays,
    assert_same,
    log,
    notes,
    plant,
    progress_of,
    refusal,
    stop_at,
)

pytestmark = pytest.mark.slow


def test_the_number_of_threads_is_kept(runs: Runs) -> None:
    """Threads share sums: with another number of threads they round differently."""
    torch.set_num_threads(3)
    try:
        runs.fit("whole")
        runs.fit_until(6)
        torch.set_num_threads(1)
        runs.resume()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    assert_same(runs / "run", runs / "whole")
    assert log(runs.finished) != log(runs / "whole"), "or this test would see nothing"


def test_a_longer_run_reports_the_change_of_its_schedule(runs: Runs) -> None:
    run = runs.copy()
    assert "is finished, nothing to do: `mygpt report" in notes(runs.resume())
    heard = runs.resume(steps=24)
    assert "the schedule is stretched to 24 steps: the learning rate, " in notes(heard)
    rates = [r["lr"] for r in log(run) if "lr" in r]
    assert f"before, is {rates[12]:.3g} now" in notes(heard)
    settings = tomllib.loads((run / "config.toml").read_text())
    assert settings["training"]["steps"] == 24, "what people read says the same"


def test_new_minutes_include_the_time_before_the_sessions_first_step(runs: Runs) -> None:
    """Resuming a run to a minute in all took longer by the time of its beginning."""
    run = runs.copy()
    for spent_s, least_s in ((1.0, 1.0), (50.0, 2.0)):
        began = time.monotonic() - spent_s
        runs.resume(minutes=4.0 * least_s / 60, began=began)
        kept = read_arrays(run / "last.state.safetensors")[1]["training"]
        assert least_s <= kept["reserve_s"] <= 2 * least_s, "and half of it at most"


def assert_replayed(run: Path, again: Path) -> None:
    """Its step log gives the same weights; its rates and losses follow from them."""
    ours, theirs = (read_arrays(r / "last.state.safetensors")[0] for r in (run, again))
    assert_arrays(ours | {"given_plan": ours["plan"]}, theirs)


@pytest.mark.kernels
def test_a_timed_run_can_be_replayed(runs: Runs) -> None:
    """Its rates followed the clock; its step log gives the same rates, losses and weights."""
    runs.fit(steps=None, minutes=0.01, eval_every=50, save_every=0)
    runs.replay()
    assert_replayed(runs / "run", runs / "again")
    assert log(runs / "run") == log(runs / "again")
    with runs.patch.context() as patch:
        stop_at(7, patch)
        runs.replay("again", "third")
    runs.resume("third")
    assert log(runs / "third") == log(runs / "run")


def test_a_run_that_was_lengthened_and_rolled_back_can_be_replayed(runs: Runs) -> None:
    """Steps, then the clock, then steps again, and a rollback in between."""
    run, again = runs / "run", runs / "again"
    with runs.patch.context() as patch:
        plant(patch, lambda n: math.nan if 7 <= n < 7 + SKIPS_BEFORE_ROLLBACK else 1.0)
        runs.fit()
    runs.resume(minutes=progress_of(run)["elapsed_s"] / 60 + 0.002)
    runs.resume(steps=progress_of(run)["step"] + 10)
    runs.replay()
    assert_replayed(run, again)
    losses = [{r["step"]: r["loss"] for r in log(r) if "loss" in r} for r in (run, again)]
    assert losses[0] == losses[1]


def test_what_cannot_be_replayed_is_refused(runs: Runs) -> None:
    """A run of an older version; a run whose text has changed."""
    format_1, again = GOLDEN / "format-1", runs / "again"
    assert "kept no log of its steps" in refusal(training.replay, format_1, output=again)
    assert not (format_1 / ".lock").exists()
    runs.fit(steps=1)
    Path(runs.text).write_text("another")
    assert "has changed" in refusal(runs.replay)
    assert not again.exists()
