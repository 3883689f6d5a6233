"""A run is reproduced exactly: its threads, its schedule by the clock, and its text."""

from __future__ import annotations

import math
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from mygpt import training
from mygpt.checkpoint.container import read_arrays
from mygpt.errors import InputError
from mygpt.training.non_finite import SKIPS_BEFORE_ROLLBACK
from paths import GOLDEN
from training_runs import assert_same, fit, log, notes, plant, progress_of, resume, silent, stop_at

pytestmark = pytest.mark.slow

FORMAT_1 = GOLDEN / "format-1"


def test_the_number_of_threads_is_kept(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads share sums: with another number of threads they round differently."""
    torch.set_num_threads(3)
    try:
        fit(text, tmp_path / "whole")
        with monkeypatch.context() as patch:
            stop_at(6, patch)
            fit(text, tmp_path / "run")
        torch.set_num_threads(1)
        resume(tmp_path / "run")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    assert_same(tmp_path / "run", tmp_path / "whole")
    fit(text, tmp_path / "other")
    assert log(tmp_path / "other") != log(tmp_path / "whole"), "or this test would see nothing"


def test_a_longer_run_reports_the_change_of_its_schedule(text: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(text, run)
    assert "is finished, nothing to do: `mygpt report" in notes(resume(run))
    heard = resume(run, steps=24)
    assert "the schedule is stretched to 24 steps: the learning rate, " in notes(heard)
    rates = [r["lr"] for r in log(run) if "lr" in r]
    assert f"before, is {rates[12]:.3g} now" in notes(heard)
    settings = tomllib.loads((run / "config.toml").read_text())
    assert settings["training"]["steps"] == 24, "what people read says the same"


def test_new_minutes_include_the_time_before_the_sessions_first_step(
    text: str, tmp_path: Path
) -> None:
    """Resuming a run to a minute in all took longer by the time of its beginning."""
    run = tmp_path / "run"
    fit(text, run)
    for spent_s, least_s in ((1.0, 1.0), (50.0, 2.0)):
        began = time.monotonic() - spent_s
        training.resume(run, minutes=4.0 * least_s / 60, began=began, listener=silent)
        kept = read_arrays(run / "last.state.safetensors")[1]["training"]
        assert least_s <= kept["reserve_s"] <= 2 * least_s, "and half of it at most"


@pytest.mark.kernels
def test_a_timed_run_can_be_replayed(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rates followed the clock; its step log gives the same rates, losses and weights."""
    run, again = tmp_path / "run", tmp_path / "again"
    fit(text, run, steps=None, minutes=0.01, eval_every=50, save_every=0)
    training.replay(run, output=again, listener=silent)
    assert log(run) == log(again)
    ours, theirs = (read_arrays(r / "last.state.safetensors")[0] for r in (run, again))
    np.testing.assert_array_equal(ours["plan"], theirs.pop("given_plan"))
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    third = tmp_path / "third"
    with monkeypatch.context() as patch:
        stop_at(7, patch)
        training.replay(again, output=third, listener=silent)
    resume(third)
    assert log(third) == log(run)


def test_a_run_that_was_lengthened_and_rolled_back_can_be_replayed(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps, then the clock, then steps again, and a rollback in between."""
    run, again = tmp_path / "run", tmp_path / "again"
    with monkeypatch.context() as patch:
        plant(patch, lambda n: math.nan if 7 <= n < 7 + SKIPS_BEFORE_ROLLBACK else 1.0)
        fit(text, run)
    resume(run, minutes=progress_of(run)["elapsed_s"] / 60 + 0.002)
    resume(run, steps=progress_of(run)["step"] + 10)
    training.replay(run, output=again, listener=silent)
    ours, theirs = (read_arrays(r / "last.state.safetensors")[0] for r in (run, again))
    theirs.pop("given_plan")
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    losses = [{r["step"]: r["loss"] for r in log(r) if "loss" in r} for r in (run, again)]
    assert losses[0] == losses[1]


def test_a_run_of_an_older_version_cannot_be_replayed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kept no log of its steps"):
        training.replay(FORMAT_1, output=tmp_path / "again", listener=silent)
    assert not (FORMAT_1 / ".lock").exists()


def test_a_replay_needs_the_same_text(text: str, tmp_path: Path) -> None:
    fit(text, tmp_path / "run")
    Path(text).write_text("another")
    with pytest.raises(InputError, match="has changed"):
        training.replay(tmp_path / "run", output=tmp_path / "again", listener=silent)
    assert not (tmp_path / "again").exists()
