"""Steps that fit into a run's minutes: batches are cut, budgets refused, long steps announced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mygpt.cli import main
from mygpt.core.config import GPTConfig
from mygpt.scaling.presets import SHAPES
from mygpt.training import planning
from mygpt.training.config import TrainConfig, preset_options
from mygpt.training.planning import fit_budget, long_steps, shown_s, step_flops
from mygpt.training.recipe import Budget, choose
from training_runs import planner_of, refusal

SPEED = 1e11  # operations a second
LARGE = GPTConfig(63, **SHAPES["large"])


def recipe(**options: object) -> TrainConfig:
    return TrainConfig(**preset_options("large", dict(options))[1])


def test_a_batch_that_takes_a_large_part_of_the_minutes_is_cut() -> None:
    """`--preset large --minutes 1` ran past 6 minutes."""
    config = recipe(minutes=5.0, stages=((0.5, 1024, 4),))
    fitting, notes = fit_budget(LARGE, config, SPEED, least_batch=1)
    assert (fitting.batch_size, fitting.stages) == (4, ((0.5, 1024, 2),))
    assert step_flops(LARGE, fitting) / SPEED <= 30
    assert notes == ["batches of 4, not 8: a step of 8 windows takes about 46 seconds here"]
    assert fit_budget(LARGE, config, 10 * SPEED, least_batch=1) == (config, [])


def test_minutes_that_no_run_of_the_model_has_time_in_are_refused() -> None:
    said = refusal(fit_budget, LARGE, recipe(minutes=1.0), SPEED, least_batch=1)
    assert said.startswith("minutes=1 is too short for a model of 85,003,776")
    assert "one step (1 window of 1,024 tokens) takes about 6 seconds here" in said
    assert "choose --minutes 2 or more" in said
    fit_budget(LARGE, recipe(minutes=2.0), SPEED, least_batch=1)
    # However short the run, short steps are not refused: it ends a step late.
    config = recipe(minutes=0.001)
    assert fit_budget(LARGE, config, 100 * SPEED, least_batch=1) == (config, [])


def test_a_batch_that_was_asked_for_is_refused_and_not_cut() -> None:
    said = refusal(fit_budget, LARGE, recipe(minutes=5.0), SPEED, least_batch=None)
    assert "8 windows of 1,024 tokens" in said
    assert "a smaller --batch-size" in said
    config = recipe(minutes=10.0)
    assert fit_budget(LARGE, config, SPEED, least_batch=None) == (config, [])


def test_a_long_step_is_announced_where_the_clock_does_not_end_the_run() -> None:
    notes = long_steps(LARGE, recipe(steps=100), lambda: SPEED)
    assert notes == [
        "one step (8 windows of 1,024 tokens) takes about 46 seconds here, the run about 77 "
        "minutes: a smaller --max-seq-len, --batch-size or model has shorter ones"
    ]
    assert long_steps(LARGE, recipe(steps=100), lambda: 10 * SPEED) == []

    def measure() -> float:
        raise AssertionError("measured, where no step can be long")

    assert long_steps(GPTConfig(63, **SHAPES["nano"]), recipe(steps=9, seq_len=64), measure) == []


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.5, "0.5 seconds"), (90, "90 seconds"), (150, "2 minutes"), (9000, "2 hours")],
)
def test_durations_in_words(seconds: float, expected: str) -> None:
    assert shown_s(seconds) == expected


def test_a_window_longer_than_the_text_makes_no_batch_of_millions() -> None:
    """`--max-seq-len 999999` took batches of 32 windows of 54,008: 9 minutes a step, 14 GB."""
    asked = {"max_seq_len": 999_999}
    found = choose(54_009, 6000, 63, Budget(steps=3), asked=asked)
    assert found.training["batch_size"] == 1
    assert found.tokens == 3 * 54_009
    found = choose(10**6, 6000, 63, Budget(steps=3), asked={"max_seq_len": 8192})
    assert found.training["batch_size"] == 8
    asked |= {"batch_size": 32}
    found = choose(54_009, 6000, 63, Budget(steps=3), asked=asked)
    assert found.training["batch_size"] == 32


def test_train_says_how_long_a_step_takes_or_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speeds = {"float32": SPEED}
    monkeypatch.setattr(planning, "training_speeds", lambda threads, formats: speeds)
    text = tmp_path / "poems.txt"
    text.write_text("The fox is quick.\n" * 3000)
    with pytest.raises(SystemExit) as left:
        main(["train", str(text), "--steps", "3", "--max-seq-len", "999999", "--dry-run"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert "note: one step (1 window of 48,600 tokens) takes about" in out
    with pytest.raises(SystemExit) as left:
        main(["train", str(text), "-o", f"{text}.run", "--preset", "large", "--minutes", "1"])
    out, err = capsys.readouterr()
    assert (left.value.code, out, err.count("\n")) == (2, "", 1)
    assert "choose --minutes 2 or more" in err
    assert list(tmp_path.iterdir()) == [text]


def test_validation_of_a_named_preset_fits_into_its_minutes() -> None:
    """Validating on all of the validation text took longer than the run."""

    def validated(minutes: float, speed: float) -> int:
        planner = planner_of("large", {"minutes": minutes}, speed)
        plan = planner.plan(np.zeros(300_000, np.uint8), 30_000, 63)
        return plan.training.get("val_tokens", 0)

    assert validated(60.0, SPEED) == 0, "all of it"
    assert 4096 <= validated(2.0, SPEED) < 30_000
