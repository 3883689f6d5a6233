"""Damaged, missing and older files: a run resumes from what is intact, and nothing good is lost."""

from __future__ import annotations

import errno
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import mygpt
from mygpt.checkpoint.container import read_arrays, write_arrays
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.training.events import Finished
from mygpt.training.run import RunFolder
from paths import GOLDEN
from training_runs import Runs, assert_same, damage, log, notes, progress_of, refusal

pytestmark = pytest.mark.slow

FORMAT_1 = GOLDEN / "format-1"
STATE = "last.state.safetensors"


def provenance(path: Path) -> dict[str, Any]:
    return read_checkpoint(path).provenance


def files_of(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in run.iterdir() if p.name != ".lock"}


def test_a_model_of_format_1_is_read() -> None:
    """Written by version 0.1.0 as it was first landed; greedy, it says what it said then."""
    writer = mygpt.load(FORMAT_1 / "best.safetensors")
    assert writer.generate("hello", 20, temperature=0) == "hello" + 20 * "o"
    assert provenance(FORMAT_1 / "best.safetensors")["mygpt"] == "0.1.0"


def test_a_run_of_format_1_resumes(runs: Runs) -> None:
    """Its state knows nothing of threads, guards and plans, and its step counts are rows."""
    run = shutil.copytree(FORMAT_1, runs / "run")
    (runs / "hello.txt").write_text("hello world, hello model\n" * 40)
    assert isinstance(runs.resume(files=[runs / "hello.txt"], steps=6)[-1], Finished)
    assert [r["step"] for r in log(run) if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert progress_of(run)["best_val_loss"] < 2.4835180610117287


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(damage, "is damaged: tensor"), (Path.unlink, "does not exist: resuming from the state")],
)
def test_a_run_resumes_from_the_state_before_the_last(runs: Runs, spoil, said: str) -> None:
    """On a file system without links a death can leave only the state before the last."""
    run = runs.copy()
    spoil(run / STATE)
    before, repeated = notes(runs.resume()).splitlines()
    assert repeated == "the steps after the last save, up to 12, are repeated"
    assert f"{STATE} {said}" in before
    assert before.endswith("resuming from the state before it, of step 8")
    assert_same(run, runs.finished)
    assert (run / f"damaged.{STATE}").exists() == (spoil is damage)


def test_with_both_states_damaged_nothing_is_touched(runs: Runs) -> None:
    run = runs.copy()
    for name in (STATE, "previous.state.safetensors"):
        damage(run / name)
    before = files_of(run)
    assert "the state before it too" in refusal(runs.resume)
    assert "the state before it too" in refusal(runs.fit, resume="auto")
    assert files_of(run) == before


def test_a_damaged_best_is_put_aside_and_rewritten(runs: Runs) -> None:
    best = runs.copy() / "best.safetensors"
    damage(best)
    assert "best.safetensors is damaged" in notes(runs.resume(steps=20))
    assert best.with_name("damaged.best.safetensors").exists()
    assert provenance(best)["step"] > 12


def test_damaged_json_in_a_state_is_refused_by_name(runs: Runs) -> None:
    run = runs.copy()
    arrays, parts = read_arrays(run / STATE)
    (run / "previous.state.safetensors").unlink()
    del parts["tensors"]
    for name, value in [
        ("course", {"step": "x"}),
        ("course", {"step": -1}),
        ("course", {"step": 10**30}),
        ("course", {"steps": 3}),
        ("course", {"elapsed_s": math.inf}),
        ("settings", {**parts["settings"], "files": "/etc/passwd"}),
        ("settings", {**parts["settings"], "threads": 10**9}),
        ("training", {**parts["training"], "momentum": 1}),
        ("training", {**parts["training"], "batch_size": "4"}),
        ("provenance", {}),
    ]:
        write_arrays(run / STATE, arrays, {**parts, name: value})
        assert STATE in refusal(runs.resume)


def test_only_damage_falls_back(runs: Runs) -> None:
    """A state that could not be opened for another reason was renamed as damaged."""
    run, inner = runs.copy(), os.open

    def busy(path: Any, *args: Any, **options: Any) -> int:
        if str(path).endswith(STATE):
            raise OSError(errno.EMFILE, "Too many open files")
        return inner(path, *args, **options)

    with runs.patch.context() as patch:
        patch.setattr("mygpt.file_access.os.open", busy)
        assert "cannot be read: Too many open files" in refusal(RunFolder(run).load_state)
    assert (run / STATE).exists()


def test_a_truncated_log_is_reported_and_not_continued_within_a_line(runs: Runs) -> None:
    """The next record was appended to the cut line."""
    run = runs.copy()
    os.truncate(run / "log.jsonl", 150)
    assert "log.jsonl is shorter than it was" in notes(runs.resume(steps=14))
    assert log(run)[-1]["step"] == 14


def test_a_better_model_of_a_lost_future_is_not_given_up(runs: Runs) -> None:
    """Killed after a validation and before the save that would have known of it."""
    runs.fit(steps=8)
    run, late = runs / "run", shutil.copytree(runs / "run", runs / "late")
    runs.resume("late", steps=40)
    shutil.copy(late / "best.safetensors", run / "best.safetensors")
    future = provenance(run / "best.safetensors")
    assert future["step"] > 8
    runs.resume(steps=12)
    kept = provenance(run / "best.safetensors")
    assert kept["val_loss"] == future["val_loss"] == progress_of(run)["best_val_loss"]


def test_a_best_model_of_another_run_is_not_taken_for_ones_own(runs: Runs) -> None:
    """Killed when `--overwrite` had committed the new run and not yet removed the old best."""
    run = runs / "run"
    runs.fit(steps=0, eval_every=100)
    shutil.copy(runs.finished / "best.safetensors", run / "best.safetensors")
    runs.resume(steps=4)
    best = provenance(run / "best.safetensors")
    assert best["step"] == 4
    assert best["val_loss"] == progress_of(run)["best_val_loss"]


def test_best_and_the_users_file_are_each_restored_from_the_other(runs: Runs) -> None:
    """Killed between writing best and ckpt.pt, or with ckpt.pt deleted, it stayed as it was; with
    best damaged, the only good copy of it was written over by the last model."""
    runs.fit("ckpt.pt")
    file, run = runs / "ckpt.pt", runs / "ckpt.pt.run"
    best = provenance(run / "best.safetensors")
    assert mygpt.load(file).generate("far", 5, seed=0).startswith("far")
    for spoil in (
        file.unlink,
        lambda: shutil.copy(run / "last.safetensors", file),
        lambda: damage(run / "best.safetensors"),
    ):
        spoil()
        found = notes(runs.resume("ckpt.pt"))
        assert provenance(file) == provenance(run / "best.safetensors") == best
    assert "kept as damaged.best.safetensors" in found
