"""Damaged, missing and older files: a run resumes from what is intact, and nothing good is lost."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mygpt
from mygpt.checkpoint.container import read_arrays, write_arrays
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.errors import CheckpointError
from mygpt.training.events import Finished
from mygpt.training.run import RunFolder
from paths import GOLDEN
from training_runs import assert_same, damage, fit, log, notes, progress_of, resume

pytestmark = pytest.mark.slow

FORMAT_1 = GOLDEN / "format-1"


def test_a_model_of_format_1_is_read() -> None:
    """Written by version 0.1.0 as it was first landed; greedy, it says what it said then."""
    writer = mygpt.load(FORMAT_1 / "best.safetensors")
    assert writer.generate("hello", 20, temperature=0) == "hello" + 20 * "o"
    assert read_checkpoint(FORMAT_1 / "best.safetensors").provenance["mygpt"] == "0.1.0"


def test_a_run_of_format_1_goes_on(tmp_path: Path) -> None:
    """Its state knows nothing of threads, guards and plans, and its step counts are rows."""
    run = tmp_path / "run"
    shutil.copytree(FORMAT_1, run)
    (tmp_path / "hello.txt").write_text("hello world, hello model\n" * 40)
    events = resume(run, files=[tmp_path / "hello.txt"], steps=6)
    assert isinstance(events[-1], Finished)
    records = [r["step"] for r in log(run) if "loss" in r]
    assert records == [1, 2, 3, 4, 5, 6]
    assert progress_of(run)["best_val_loss"] < 2.4835180610117287


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(damage, "is damaged: tensor"), (Path.unlink, "does not exist: resuming from the state")],
)
def test_a_run_resumes_from_the_state_before_the_last(
    text: str, tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    """On a file system without links a death can leave only the state before the last."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    fit(text, whole)
    fit(text, run)
    spoil(run / "last.state.safetensors")
    before, repeated = notes(resume(run)).splitlines()
    assert repeated == "the steps after the last save, up to 12, are repeated"
    assert f"last.state.safetensors {said}" in before
    assert before.endswith("resuming from the state before it, of step 8")
    assert_same(run, whole)
    assert (run / "damaged.last.state.safetensors").exists() == (spoil is damage)


def test_with_both_states_damaged_nothing_is_touched(text: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(text, run)
    for name in ("last.state.safetensors", "previous.state.safetensors"):
        damage(run / name)
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.name != ".lock"}
    with pytest.raises(CheckpointError, match="the state before it too"):
        resume(run)
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.name != ".lock"} == before


def test_a_damaged_best_is_put_aside_and_made_again(text: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(text, run)
    damage(run / "best.safetensors")
    events = resume(run, steps=20)
    assert "best.safetensors is damaged" in notes(events)
    assert (run / "damaged.best.safetensors").exists()
    assert read_checkpoint(run / "best.safetensors").provenance["step"] > 12


def test_damaged_json_in_a_state_is_refused_by_name(text: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(text, run)
    path = run / "last.state.safetensors"
    arrays, parts = read_arrays(path)
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
        write_arrays(path, arrays, {**parts, name: value})
        with pytest.raises(CheckpointError, match=r"last\.state\.safetensors"):
            resume(run)


def test_only_damage_falls_back(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that could not be opened for another reason was renamed as damaged."""
    run = tmp_path / "run"
    fit(text, run)
    inner = os.open

    def busy(path: Any, *args: Any, **options: Any) -> int:
        if str(path).endswith("last.state.safetensors"):
            raise OSError(errno.EMFILE, "Too many open files")
        return inner(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("mygpt.file_access.os.open", busy)
        with pytest.raises(CheckpointError, match="cannot be read: Too many open files"):
            RunFolder(run).load_state()
    assert (run / "last.state.safetensors").exists()


def test_a_truncated_log_is_reported_and_not_continued_within_a_line(
    text: str, tmp_path: Path
) -> None:
    """The next record was appended to the cut line."""
    run = tmp_path / "run"
    fit(text, run)
    os.truncate(run / "log.jsonl", 150)
    events = resume(run, steps=14)
    assert "log.jsonl is shorter than it was" in notes(events)
    assert log(run)[-1]["step"] == 14


def test_a_better_model_of_a_lost_future_is_not_given_up(text: str, tmp_path: Path) -> None:
    """Killed after a validation and before the save that would have known of it."""
    run = tmp_path / "run"
    fit(text, run, steps=8)
    late = tmp_path / "late"
    shutil.copytree(run, late)
    resume(late, steps=40)
    shutil.copy(late / "best.safetensors", run / "best.safetensors")
    future = read_checkpoint(run / "best.safetensors").provenance
    assert future["step"] > 8
    resume(run, steps=12)
    kept = read_checkpoint(run / "best.safetensors").provenance
    assert kept["val_loss"] == future["val_loss"] == progress_of(run)["best_val_loss"]


def test_a_best_model_of_another_run_is_not_taken_for_ones_own(text: str, tmp_path: Path) -> None:
    """Killed when `--overwrite` had committed the new run and not yet removed the old best."""
    run, old = tmp_path / "run", tmp_path / "old"
    fit(text, old, steps=40)
    fit(text, run, steps=0, eval_every=100)
    shutil.copy(old / "best.safetensors", run / "best.safetensors")
    resume(run, steps=4)
    best = read_checkpoint(run / "best.safetensors").provenance
    assert best["step"] == 4
    assert best["val_loss"] == progress_of(run)["best_val_loss"]


def test_the_users_file_is_made_again_from_the_best(text: str, tmp_path: Path) -> None:
    """Killed between writing best and ckpt.pt, or with ckpt.pt deleted, it stayed as it was."""
    file = tmp_path / "ckpt.pt"
    fit(text, file)
    best = read_checkpoint(tmp_path / "ckpt.pt.run" / "best.safetensors")
    file.unlink()
    resume(file)
    assert read_checkpoint(file).provenance == best.provenance
    shutil.copy(tmp_path / "ckpt.pt.run" / "last.safetensors", file)
    resume(file)
    assert read_checkpoint(file).provenance == best.provenance


def test_the_best_is_made_again_from_the_users_file(text: str, tmp_path: Path) -> None:
    """With best damaged, the only good copy of it was written over by the last model."""
    file = tmp_path / "ckpt.pt"
    fit(text, file)
    best = tmp_path / "ckpt.pt.run" / "best.safetensors"
    before = read_checkpoint(best).provenance
    damage(best)
    assert "kept as damaged.best.safetensors" in notes(resume(file))
    assert read_checkpoint(best).provenance == before
    assert read_checkpoint(file).provenance == before
