"""Losses and weights that are not finite: steps are skipped, the run is rolled back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mygpt
from mygpt.checkpoint.container import read_arrays
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.errors import DivergedError
from mygpt.training.checkpointing import Checkpointer
from mygpt.training.events import (
    Evaluated,
    Event,
    Finished,
    RolledBack,
    Spiked,
    StepDone,
    StepsSkipped,
)
from mygpt.training.non_finite import MOST_ROLLBACKS, SKIPS_BEFORE_ROLLBACK, NonFiniteGuard
from mygpt.training.run import RunFolder
from training_runs import (
    TEXT,
    TINY,
    Dead,
    assert_same,
    fit,
    log,
    plant,
    progress_of,
    resume,
    stop_at,
)

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


def test_after_some_in_a_row_the_run_is_rolled_back_and_the_rate_halved(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = 7
    last = first + SKIPS_BEFORE_ROLLBACK - 1
    plant(monkeypatch, lambda n: math.nan if first <= n <= last else 1.0)
    run = tmp_path / "run"
    heard = fit(text, run, steps=20)
    went = [event for event in heard if isinstance(event, RolledBack)]
    assert [(w.step, w.failed_step, w.lr_scale) for w in went] == [(4, last, 0.5)]
    assert "the loss is nan; back to step 4, with 0.5 times the learning rate" in str(went[0])
    records = log(run)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 21))
    assert [r for r in records if "went_back_from" in r] == [
        {"step": 4, "went_back_from": last, "lr_scale": 0.5}
    ]
    whole = tmp_path / "whole"
    monkeypatch.undo()
    fit(text, whole, steps=20)
    rates = {r["step"]: r["lr"] for r in log(whole) if "lr" in r}
    ours = {r["step"]: r["lr"] for r in records if "loss" in r}
    assert all(ours[step] == rates[step] / (2 if step > 4 else 1) for step in rates)
    assert progress_of(run)["tries"] == 0, "it has passed the place of trouble"


def test_a_run_that_was_rolled_back_is_resumed_with_its_lower_rate(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lambda n: math.nan if 7 <= n < 7 + SKIPS_BEFORE_ROLLBACK else 1.0)
    fit(text, tmp_path / "whole", steps=20)
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        plant(patch, lambda n: math.nan if 7 <= n < 7 + SKIPS_BEFORE_ROLLBACK else 1.0)
        stop_at(14, patch)
        fit(text, tmp_path / "run", steps=20)
    resume(tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_weights_saved_just_after_the_bad_update_are_not_rolled_back_to(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last state was saved between the update that spoilt it and the first NaN."""
    spoilt = 6
    spoil_after(monkeypatch, spoilt, above=0.5)
    run = tmp_path / "run"
    heard = fit(text, run, save_every=1, eval_every=100)
    went = [event for event in heard if isinstance(event, RolledBack)]
    assert [w.step for w in went] == [spoilt - 1]
    assert isinstance(heard[-1], Finished)
    assert math.isfinite(heard[-1].loss)


def test_a_run_that_diverges_repeatedly_ends_with_code_5_and_its_best_model(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lambda n: math.nan if n > 9 else 1.0)
    run = tmp_path / "run"
    heard: list[Event] = []
    with pytest.raises(
        DivergedError, match=rf"after {MOST_ROLLBACKS} rollbacks with half the learning rate"
    ) as left:
        mygpt.train(text, output=run, listener=heard.append, **{**TINY, "steps": 30})
    assert left.value.exit_code == 5
    assert [e.lr_scale for e in heard if isinstance(e, RolledBack)] == [0.5, 0.25, 0.125]
    lowest = min(e.result.loss for e in heard if isinstance(e, Evaluated))
    assert read_checkpoint(run / "best.safetensors").provenance["val_loss"] == lowest
    assert all(
        np.isfinite(a).all() for a in read_arrays(run / "last.state.safetensors")[0].values()
    )


def test_a_validation_loss_that_is_not_finite_leads_to_a_rollback(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mygpt.evaluation.losses import Evaluation
    from mygpt.training import trainer

    calls = []

    def evaluated(*args: Any, **options: Any) -> Evaluation:
        calls.append(args)
        return Evaluation(math.nan, 1, math.nan) if len(calls) == 2 else inner(*args, **options)

    inner = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", evaluated)
    heard = fit(text, tmp_path / "run")
    assert [e.problem for e in heard if isinstance(e, RolledBack)] == ["the validation loss is nan"]
    assert isinstance(heard[-1], Finished)


def test_a_spike_of_the_loss_is_reported_with_step_and_batch(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lambda n: 3.0 if n == 350 else 1.0)
    run = tmp_path / "run"
    heard = fit(text, run, steps=400, eval_every=400, save_every=400, print_every=100)
    spikes = [event for event in heard if isinstance(event, Spiked)]
    assert [s.step for s in spikes] == [350]
    assert spikes[0].loss > 2 * spikes[0].usual
    tokens = read_checkpoint(run / "last.safetensors").tokenizer.encode_array(TEXT)
    assert len(spikes[0].batch) == 4
    assert all(0 <= start < len(tokens) - 16 for start in spikes[0].batch)
    assert f"begin at tokens {spikes[0].batch[0]:,}" in str(spikes[0])
    assert [r["batch"] for r in log(run) if "spike" in r] == [spikes[0].batch]


def test_a_skipped_step_is_reported_with_its_batch(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lambda n: math.inf if n == 5 else 1.0)
    heard = fit(text, tmp_path / "run")
    skipped = [event for event in heard if isinstance(event, StepsSkipped)]
    assert [(e.step, e.loss, e.count, len(e.batch)) for e in skipped] == [(5, math.inf, 1, 4)]
    assert [e.step for e in heard if isinstance(e, StepDone)] == [*range(1, 5), *range(6, 13)]


def test_two_rollbacks_never_go_forward(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back at the previous state, the spoilt last one was kept as previous, and gone to next."""
    spoilt = 6
    spoil_after(monkeypatch, spoilt, above=0.25)
    run = tmp_path / "run"
    heard = fit(text, run, save_every=1, eval_every=100)
    assert [(e.step, e.lr_scale) for e in heard if isinstance(e, RolledBack)] == [
        (5, 0.5),
        (5, 0.25),
    ]
    assert [r["step"] for r in log(run) if "loss" in r] == list(range(1, 13)), "and no line is cut"


def test_a_crash_during_a_rollback_leaves_no_gap_in_the_log(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log was cut for the state gone back to while the state that had more still held."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil_after(patch, 6, above=0.0)
        commits = []
        commit = Checkpointer._commit

        def dying(self: Checkpointer, at: Any, *, keep: bool) -> None:
            if at.lr_scale < 1:
                raise Dead
            commits.append(at.step)
            commit(self, at, keep=keep)

        patch.setattr(Checkpointer, "_commit", dying)
        with pytest.raises(Dead):
            fit(text, run, save_every=1, eval_every=100)
    assert commits[-1] == 6
    state, _ = RunFolder(run).load_state()
    assert (run / "log.jsonl").stat().st_size >= state.progress.log_bytes


def test_an_overwritten_runs_state_is_not_rolled_back_to(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--overwrite` died after its first state, and went back to the old run's previous one."""
    run = tmp_path / "run"
    fit(text, run, steps=40)
    with monkeypatch.context() as patch:

        def dead(self: RunFolder) -> None:
            raise Dead

        patch.setattr(RunFolder, "clear_derived", dead)
        with pytest.raises(Dead):
            fit(text, run, overwrite=True, seed=7)
    assert (run / "previous.state.safetensors").exists()
    plant(monkeypatch, lambda n: math.nan if n <= SKIPS_BEFORE_ROLLBACK else 1.0)
    heard = resume(run)
    assert [e.step for e in heard if isinstance(e, RolledBack)] == [0]
    assert progress_of(run)["step"] == 12


def test_a_run_that_ends_in_skipped_steps_keeps_good_weights(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer than it takes to go back: the spoilt weights were the run's result."""
    spoil_after(monkeypatch, 10, above=0.5)
    heard = fit(text, tmp_path / "run", val_fraction=0.0)
    assert [e.step for e in heard if isinstance(e, RolledBack)] == [8]
    arrays = read_checkpoint(tmp_path / "run" / "last.safetensors").arrays
    assert max(np.abs(array).max() for array in arrays.values()) < 1e3


def test_a_device_that_is_not_waited_for_is_looked_at_before_a_save(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA: the fused update looks itself; spoilt weights were saved between two looks."""
    inner = NonFiniteGuard.__init__

    def unread(self: NonFiniteGuard, *args: Any) -> None:
        inner(self, *args)
        self.reads_every_step = False

    monkeypatch.setattr(NonFiniteGuard, "__init__", unread)
    whole, run = tmp_path / "whole", tmp_path / "run"
    fit(text, whole)
    plant(monkeypatch, lambda n: math.nan if n in (6, 7) else 1.0)
    heard = fit(text, run)
    skipped = [(e.step, e.count) for e in heard if isinstance(e, StepsSkipped)]
    assert skipped == [(8, 2)]
    steps = read_arrays(run / "last.state.safetensors")[0]
    assert steps["optimizer/step/final_norm.weight"] == 10, "two of twelve were skipped"
    monkeypatch.undo()
    monkeypatch.setattr(NonFiniteGuard, "__init__", unread)
    spoil_after(monkeypatch, 9, above=0.5)
    heard = fit(text, tmp_path / "spoilt", steps=40, eval_every=100)
    assert [e.step for e in heard if isinstance(e, RolledBack)] == [8]


def test_stopped_while_steps_are_left_out_good_weights_are_saved(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped twice in the middle of trouble, both states were spoilt and the run was lost."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil_after(patch, 6, above=0.5)
        stop_at(8, patch)
        fit(text, run, eval_every=100)
    end = resume(run)[-1]
    assert isinstance(end, Finished)
    assert math.isfinite(end.loss)


def test_weights_that_are_no_numbers_are_never_saved(text: str, tmp_path: Path) -> None:
    """The loss of a step is from before its update: it was finite, and the weights were not."""
    heard: list[Event] = []
    options = {"lr": 1e38, "grad_clip": 0.0, "save_every": 1, "schedule": "constant"}
    with pytest.raises(DivergedError):
        mygpt.train(text, output=tmp_path / "run", listener=heard.append, **TINY | options)
    problems = {event.problem for event in heard if isinstance(event, RolledBack)}
    assert "the largest weight is inf" in problems
    kept = read_arrays(tmp_path / "run" / "last.state.safetensors")[0]
    assert all(np.isfinite(array).all() for array in kept.values())
