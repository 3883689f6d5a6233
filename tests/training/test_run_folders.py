"""A run's folder: one process writes it, and no other file or run is lost or mistaken for it."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import mygpt
from mygpt import training
from mygpt.checkpoint.locks import RunLock
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.errors import CheckpointError, InputError, StorageError
from mygpt.training.events import Event, StepDone
from mygpt.training.run import RunFolder
from training_runs import (
    TEXT,
    TINY,
    assert_same,
    damage,
    fit,
    log,
    notes,
    progress_of,
    resume,
    silent,
    stop_at,
)

pytestmark = pytest.mark.slow


def test_a_run_that_is_being_trained_is_refused(text: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(text, run)
    before = (run / "last.state.safetensors").read_bytes()
    with RunLock(run):
        for begin in (
            lambda: resume(run, steps=20),
            lambda: fit(text, run, overwrite=True),
            lambda: training.replay(run, output=run, overwrite=True, listener=silent),
        ):
            with pytest.raises(InputError, match="is being trained by process"):
                begin()
    assert (run / "last.state.safetensors").read_bytes() == before


def test_a_run_that_cannot_be_written_names_a_remedy_that_resume_has(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It recommended another --output, which is refused with --resume."""
    run = tmp_path / "run"
    fit(text, run)

    def refused(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mygpt.checkpoint.locks.open_descriptor", refused)
    with pytest.raises(StorageError, match="Permission denied: copy the run and resume the copy"):
        resume(run, steps=20)


def test_two_runs_that_begin_at_once(text: str, tmp_path: Path) -> None:
    """Both saw a free folder; the second to get the lock sees the first one's run."""
    run = tmp_path / "run"

    inner = RunLock.__enter__

    def late(self: RunLock) -> RunLock:
        if not (run / "last.state.safetensors").exists():
            RunLock.__enter__ = inner  # type: ignore[method-assign]
            fit(text, run)
        return inner(self)

    RunLock.__enter__ = late  # type: ignore[method-assign]
    try:
        with pytest.raises(InputError, match="already holds a run"):
            fit(text, run)
    finally:
        RunLock.__enter__ = inner  # type: ignore[method-assign]
    assert progress_of(run)["step"] == 12


def test_a_killed_runs_temporary_files_are_removed_at_the_next_start(
    text: str, tmp_path: Path
) -> None:
    output = tmp_path / "ckpt.pt"
    fit(text, output)
    run = tmp_path / "ckpt.pt.run"
    from mygpt.checkpoint import durable as storage

    state, others = run / "last.state.safetensors", (tmp_path / "other.pt", run / "x.pt")
    mine, inside, *foreign = map(storage.temporary_name, (output, state, *others))
    for path in (mine, inside, *foreign):
        path.write_bytes(b"half")
    resume(output, steps=14)
    assert not mine.exists()
    assert not inside.exists()
    assert all(path.exists() for path in foreign), "another run may be writing it"


def test_a_file_in_another_runs_folder_means_its_own_run(text: str, tmp_path: Path) -> None:
    """`--resume d/ckpt.pt`, as it printed itself, resumed the run in d."""
    fit(text, tmp_path / "d")
    fit(text, tmp_path / "d" / "ckpt.pt", steps=4)
    resume(tmp_path / "d" / "ckpt.pt", steps=6)
    assert progress_of(tmp_path / "d")["step"] == 12
    assert progress_of(tmp_path / "d" / "ckpt.pt.run")["step"] == 6
    resume(tmp_path / "d" / "best.safetensors", steps=14)
    assert progress_of(tmp_path / "d")["step"] == 14


def test_a_folder_without_a_run_gets_no_lock(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run to resume"):
        training.resume(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_run_whose_folder_is_renamed_ends_with_its_state_there(text: str, tmp_path: Path) -> None:
    """Another run was begun under the old name, and both wrote into that folder."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    fit(text, tmp_path / "whole")

    def rename(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 7:
            run.rename(moved)
            run.mkdir()

    with pytest.raises(StorageError, match=r"run was renamed to .*moved while .* ended at step 7"):
        mygpt.train(text, output=run, listener=rename, **TINY)
    assert os.listdir(run) == []
    assert RunFolder(moved).load_state()[0].progress.step == 7
    resume(moved)
    assert_same(moved, tmp_path / "whole")
    assert log(moved) == log(tmp_path / "whole")


def test_a_run_whose_folder_is_removed_writes_nothing(text: str, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def remove(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 7:
            shutil.rmtree(run)
            run.mkdir()

    with pytest.raises(StorageError, match="was removed or moved away"):
        mygpt.train(text, output=run, listener=remove, **TINY)
    assert os.listdir(run) == []


@pytest.mark.parametrize("path", [3, b"x", [], math.nan, ""])
def test_an_impossible_name_is_not_a_checkpoint(path: Any) -> None:
    with pytest.raises(InputError, match="must be the name of a file or folder"):
        mygpt.load(path)


def test_resuming_by_the_folders_name_still_writes_the_users_file(
    text: str, tmp_path: Path
) -> None:
    """`--resume ckpt.pt.run` continued training and did not update ckpt.pt."""
    fit(text, tmp_path / "ckpt.pt")
    resume(tmp_path / "ckpt.pt.run", steps=20)
    assert read_checkpoint(tmp_path / "ckpt.pt").provenance["step"] == 20


def test_overwrite_keeps_the_old_run_until_the_new_one_is_there(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old run was deleted first, and a full disk then left neither."""
    fit(text, tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError):
            fit(text, tmp_path / "run", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_a_foreign_file_of_a_runs_name_is_not_deleted(text: str, tmp_path: Path) -> None:
    """`--overwrite` took any config.toml for an old run's."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.toml").write_text("precious = true")
    with pytest.raises(InputError, match=r"config\.toml does not belong to a run"):
        fit(text, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "config.toml").read_text() == "precious = true"


def test_a_folder_that_holds_runs_can_be_trained_on_again(text: str, tmp_path: Path) -> None:
    """The run's own log and settings were read as text, so it could not be resumed."""
    run = tmp_path / "runs" / "a"
    fit(str(Path(text).parent), run, steps=2)
    resume(run, steps=3)
    assert progress_of(run)["step"] == 3


def test_a_moved_validation_file_can_be_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("as far as anybody knows")
    fit(text, tmp_path / "run", val_file=tmp_path / "val.txt")
    moved = (tmp_path / "val.txt").rename(tmp_path / "moved.txt")
    resume(tmp_path / "run", steps=14, val_file=moved)
    assert progress_of(tmp_path / "run")["step"] == 14


def test_an_empty_output_is_not_the_current_folder(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="output='' must be the name"):
        mygpt.train(text, output="", listener=silent, **TINY)


def test_resume_auto_begins_a_run_and_then_resumes_it(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command, repeated after a crash, ends in the weights of an undisturbed run."""
    run = tmp_path / "run"
    fit(text, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(6, patch)
        assert "resuming it" not in notes(fit(text, run, resume="auto"))
    assert "is a run already: resuming it" in notes(fit(text, run, resume="auto"))
    assert_same(run, tmp_path / "whole")
    assert "is finished, nothing to do" in notes(fit(text, run, resume="auto"))
    fit(text, run, resume="auto", steps=14)
    assert progress_of(run)["step"] == 14


def test_resume_auto_keeps_what_the_first_command_chose(text: str, tmp_path: Path) -> None:
    """A window that was shrunk to the text, and a length, are not changed by the same options."""
    Path(text).write_text("a short text, a short text")
    options = {"max_seq_len": 512, "resume": "auto"}
    fit(text, tmp_path / "run", **options)
    assert "is finished" in notes(fit(text, tmp_path / "run", **options))


def test_resume_auto_refuses_another_run_in_one_line(text: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(text, run, resume="auto")
    other = tmp_path / "other.txt"
    other.write_text(TEXT[:2000])
    for files, options, said in (
        (text, {"lr": 0.5}, "lr=0.5 cannot change when a run is resumed, and this one has 0.004"),
        (text, {"tokenizer": "byte"}, "tokenizer=byte cannot change"),
        (text, {"steps": 3}, "steps=3 counts from the run's start, and the run has had 12"),
        (text, {"val_file": other}, "has changed since the run began"),
        (str(other), {}, "other has changed since the run began"),
        (text, {"overwrite": True}, "never replaces a run: leave out overwrite"),
        (text, {"resume": "run"}, "resume='run' must be 'auto'"),
    ):
        with pytest.raises(InputError, match=said) as refused:
            fit(files, run, **{"resume": "auto", **options})
        assert "\n" not in str(refused.value)
    for name in ("last", "previous"):
        damage(run / f"{name}.state.safetensors")
    with pytest.raises(CheckpointError, match="the state before it too"):
        fit(text, run, resume="auto")
