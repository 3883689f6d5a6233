"""Losses and weights that are not finite: steps are skipped, the run is rolled back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import mygpt
from mygpt.checkpoint.container import read_arrays
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.errors import DivergedError
from mygpt.training import trainer
from mygpt.training.checkpointing import Checkpointer
from mygpt.training.events import Evaluated, Event, Finished, RolledBack, Spiked, StepsSkipped
from mygpt.training.non_finite import MOST_ROLLBACKS, SKIPS_BEFORE_ROLLBACK, NonFiniteGuard
from mygpt.training.run import RunFolder
from training_runs import TEXT, TINY, Dead, Runs, assert_same, log, plant, progress_of

pytestmark = pytest.mark.slow


def spoil_after(patch: pytest.MonkeyPatch, step: int, *, above: float) -> None:
    """After the update of this step all weights of one tensor are 1e30: finite, but no loss is.

    Only while the learning rate is scaled by more than `above`; each return to an earlier state
    halves that scale.
    """
    inner = NonFiniteGuard.step

    def spoiling(self: NonFiniteGuard, lr: float) -> None:
        inner(self, lr)
        if self.progress.step == step and self.progress.lr_scale > above:
            with torch.no_grad():
                next(self.optimizer.model.parameters()).fill_(1e30)

    patch.setattr(NonFiniteGuard, "step", spoiling)


def rollbacks(heard: list[Event]) -> list[tuple[int, float]]:
    """The step and the scale of the rate of each."""
    return [(event.step, event.lr_scale) for event in heard if isinstance(event, RolledBack)]


def diverging(run: Any, **options: Any) -> tuple[DivergedError, list[Event]]:
    """The error of a run that diverges, whose state is finite, and its events."""
    heard: list[Event] = []
    with pytest.raises(DivergedError) as left:
        mygpt.train(run.with_name("times.txt"), output=run, listener=heard.append, **TINY | options)
    kept = read_arrays(run / "last.state.safetensors")[0]
    assert all(np.isfinite(array).all() for array in kept.values())
    return left.value, heard


def test_after_some_in_a_row_the_run_is_rolled_back_and_the_rate_halved(runs: Runs) -> None:
    """And a run that was rolled back is resumed with its lower rate."""
    first, last = 7, 7 + SKIPS_BEFORE_ROLLBACK - 1
    runs.fit("plain", steps=20)

    def bad(number: int) -> float:
        return math.nan if first <= number <= last else 1.0

    with runs.patch.context() as patch:
        plant(patch, bad)
        heard = runs.fit(steps=20)
    (went,) = [event for event in heard if isinstance(event, RolledBack)]
    assert (went.step, went.failed_step, went.lr_scale) == (4, last, 0.5)
    assert "the loss is nan; back to step 4, with 0.5 times the learning rate" in str(went)
    records = log(runs / "run")
    assert [r for r in records if "went_back_from" in r] == [
        {"step": 4, "went_back_from": last, "lr_scale": 0.5}
    ]
    ours, rates = (
        {r["step"]: r["lr"] for r in log(runs / name) if "lr" in r} for name in ("run", "plain")
    )
    assert list(ours) == list(range(1, 21))
    assert all(ours[step] == rates[step] / (2 if step > 4 else 1) for step in rates)
    assert progress_of(runs / "run")["tries"] == 0, "it has passed the place of trouble"
    with runs.patch.context() as patch:
        plant(patch, bad)
        runs.fit_until(14, "cut", steps=20)
    runs.resume("cut")
    assert_same(runs / "cut", runs / "run")


@pytest.mark.parametrize(
    ("step", "above", "options", "expected"),
    [
        # Saved between the update that spoilt the weights and the first NaN. Back at the previous
        # state, the spoilt last one was kept as previous, and gone to next.
        (6, 0.25, {"save_every": 1, "eval_every": 100}, [(5, 0.5), (5, 0.25)]),
        # Fewer skipped steps than it takes to go back: the spoilt weights were the run's result.
        (10, 0.5, {"val_fraction": 0.0}, [(8, 0.5)]),
    ],
)
def test_spoilt_weights_are_not_rolled_back_to(runs: Runs, step, above, options, expected) -> None:
    spoil_after(runs.patch, step, above=above)
    heard = runs.fit(**options)
    assert rollbacks(heard) == expected
    assert isinstance(heard[-1], Finished)
    assert math.isfinite(heard[-1].loss)
    assert [r["step"] for r in log(runs / "run") if "loss" in r] == list(range(1, 13))
    arrays = read_checkpoint(runs / "run" / "last.safetensors").arrays
    assert max(np.abs(array).max() for array in arrays.values()) < 1e3


def test_a_run_that_diverges_repeatedly_ends_with_code_5_and_its_best_model(runs: Runs) -> None:
    plant(runs.patch, lambda n: math.nan if n > 9 else 1.0)
    error, heard = diverging(runs / "run", steps=30)
    assert f"after {MOST_ROLLBACKS} rollbacks with half the learning rate" in str(error)
    assert "the loss is nan at step" in str(error)
    assert error.exit_code == 5
    assert [scale for _, scale in rollbacks(heard)] == [0.5, 0.25, 0.125]
    lowest = min(e.result.loss for e in heard if isinstance(e, Evaluated))
    assert read_checkpoint(runs / "run" / "best.safetensors").provenance["val_loss"] == lowest


def test_weights_that_are_no_numbers_are_never_saved(runs: Runs) -> None:
    """The loss of a step is from before its update: it was finite, and the weights were not."""
    options = {"lr": 1e38, "grad_clip": 0.0, "save_every": 1, "schedule": "constant"}
    _, heard = diverging(runs / "run", **options)
    problems = {event.problem for event in heard if isinstance(event, RolledBack)}
    assert "the largest weight is inf" in problems


def test_a_validation_loss_that_is_not_finite_leads_to_a_rollback(runs: Runs) -> None:
    from mygpt.evaluation.losses import Evaluation

    calls, inner = [], trainer.evaluate

    def evaluated(*args: Any, **options: Any) -> Evaluation:
        calls.append(args)
        return Evaluation(math.nan, 1, math.nan) if len(calls) == 2 else inner(*args, **options)

    runs.patch.setattr(trainer, "evaluate", evaluated)
    heard = runs.fit()
    assert [e.problem for e in heard if isinstance(e, RolledBack)] == ["the validation loss is nan"]
    assert isinstance(heard[-1], Finished)


def test_spikes_and_skipped_steps_are_reported_with_step_and_batch(runs: Runs) -> None:
    plant(runs.patch, lambda n: {5: math.inf, 350: 3.0}.get(n, 1.0))
    heard = runs.fit(steps=360, eval_every=400, save_every=400)
    (skipped,) = [event for event in heard if isinstance(event, StepsSkipped)]
    assert (skipped.step, skipped.loss, skipped.count, len(skipped.batch)) == (5, math.inf, 1, 4)
    records = log(runs / "run")
    assert [r["step"] for r in records if "loss" in r][:8] == [1, 2, 3, 4, 6, 7, 8, 9]
    (spike,) = [event for event in heard if isinstance(event, Spiked)]
    assert spike.step == 350
    assert spike.loss > 2 * spike.usual
    tokens = read_checkpoint(runs / "run" / "last.safetensors").tokenizer.encode_array(TEXT)
    assert len(spike.batch) == 4
    assert all(0 <= start < len(tokens) - 16 for start in spike.batch)
    assert f"begin at tokens {spike.batch[0]:,}" in str(spike)
    assert [r["batch"] for r in records if "spike" in r] == [spike.batch]


def test_a_crash_during_a_rollback_leaves_no_gap_in_the_log(runs: Runs) -> None:
    """The log was cut for the state gone back to while the state that had more still held."""
    commits, commit = [], Checkpointer._commit

    def dying(self: Checkpointer, at: Any, *, keep: bool) -> None:
        if at.lr_scale < 1:
            raise Dead
        commits.append(at.step)
        commit(self, at, keep=keep)

    spoil_after(runs.patch, 6, above=0.0)
    runs.patch.setattr(Checkpointer, "_commit", dying)
    with pytest.raises(Dead):
        runs.fit(save_every=1, eval_every=100)
    assert commits[-1] == 6
    state, _ = RunFolder(runs / "run").load_state()
    assert (runs / "run" / "log.jsonl").stat().st_size >= state.progress.log_bytes


def test_an_overwritten_runs_state_is_not_rolled_back_to(runs: Runs) -> None:
    """`--overwrite` died after its first state, and went back to the old run's previous one."""
    run = runs.copy()

    def dead(self: RunFolder, files: list[str]) -> None:
        raise Dead

    with runs.patch.context() as patch:
        patch.setattr(RunFolder, "clear_derived", dead)
        with pytest.raises(Dead):
            runs.fit(overwrite=True, seed=7)
    assert (run / "previous.state.safetensors").exists()
    plant(runs.patch, lambda n: math.nan if n <= SKIPS_BEFORE_ROLLBACK else 1.0)
    assert rollbacks(runs.resume()) == [(0, 0.5)]
    assert progress_of(run)["step"] == 12


def test_a_device_without_synchronization_is_checked_before_a_save(runs: Runs) -> None:
    """As on CUDA: the fused update checks itself; broken weights were saved between two checks."""
    runs.patch.setattr("mygpt.training.trainer.FRACTIONS", ())  # nor before a snapshot
    inner = NonFiniteGuard.__init__

    def unread(self: NonFiniteGuard, *args: Any) -> None:
        inner(self, *args)
        self.reads_every_step = False

    runs.patch.setattr(NonFiniteGuard, "__init__", unread)
    with runs.patch.context() as patch:
        plant(patch, lambda n: math.nan if n in (6, 7) else 1.0)
        heard = runs.fit()
    assert [(e.step, e.count) for e in heard if isinstance(e, StepsSkipped)] == [(8, 2)]
    steps = read_arrays(runs / "run" / "last.state.safetensors")[0]
    assert steps["optimizer/step/final_norm.weight"] == 10, "two of twelve were skipped"
    spoil_after(runs.patch, 9, above=0.5)
    assert rollbacks(runs.fit("spoilt", steps=40, eval_every=100)) == [(8, 0.5)]


def test_stopped_while_steps_are_skipped_good_weights_are_saved(runs: Runs) -> None:
    """Stopped twice in the middle of trouble, both states were spoilt and the run was lost."""
    with runs.patch.context() as patch:
        spoil_after(patch, 6, above=0.5)
        runs.fit_until(8, eval_every=100)
    end = runs.resume()[-1]
    assert isinstance(end, Finished)
    assert math.isfinite(end.loss)
