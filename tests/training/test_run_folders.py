"""A run's folder and texts: one process writes it, no other file or run is lost or mistaken for it,
and a file that only a state names is read only if it has the size that the run found."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mygpt
from mygpt import training
from mygpt.checkpoint import durable
from mygpt.checkpoint.container import read_arrays, write_arrays
from mygpt.checkpoint.locks import RunLock
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.errors import StorageError
from mygpt.training.events import Event, Started, StepDone
from mygpt.training.run import RunFolder
from mygpt.views.run import read_run
from training_runs import (
    TEXT,
    TINY,
    Runs,
    assert_same,
    full_disk,
    notes,
    progress_of,
    refusal,
    silent,
)

pytestmark = pytest.mark.slow


def files_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir()}


def test_a_run_that_is_being_trained_is_refused(runs: Runs) -> None:
    run = runs.copy()
    before = (run / "last.state.safetensors").read_bytes()
    with RunLock(run):
        for begin in (
            lambda: runs.resume(steps=20),
            lambda: runs.fit(overwrite=True),
            lambda: runs.replay(output="run", overwrite=True),
        ):
            assert "is in use by process" in refusal(begin)
    assert (run / "last.state.safetensors").read_bytes() == before


def test_a_run_that_cannot_be_written_names_a_remedy_that_resume_has(runs: Runs) -> None:
    """It recommended another --output, which is refused with --resume."""
    runs.copy()

    def refused(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    runs.patch.setattr("mygpt.checkpoint.locks.open_descriptor", refused)
    said = refusal(runs.resume, steps=20)
    assert "Permission denied: copy the run and resume the copy" in said


def test_two_runs_that_begin_at_once(runs: Runs) -> None:
    """Both saw a free folder; the second to get the lock sees the first one's run."""
    inner = RunLock.__enter__

    def late(self: RunLock) -> RunLock:
        runs.patch.setattr(RunLock, "__enter__", inner)
        runs.fit()
        return inner(self)

    runs.patch.setattr(RunLock, "__enter__", late)
    assert "already holds a run" in refusal(runs.fit)
    assert progress_of(runs / "run")["step"] == 12


def test_a_file_as_output_has_its_own_run_beside_it(runs: Runs) -> None:
    """`--resume d/ckpt.pt`, as it printed itself, resumed the run in d; `--resume ckpt.pt.run` did
    not update ckpt.pt; a killed run's temporary files stayed."""
    run = runs.copy("d")
    file, own = run / "ckpt.pt", run / "ckpt.pt.run"
    runs.fit("d/ckpt.pt", steps=4)
    written = own / "last.state.safetensors"
    paths = (file, written, runs / "other.pt", own / "x.pt")
    mine, inside, *foreign = map(durable.temporary_name, paths)
    for path in (mine, inside, *foreign):
        path.write_bytes(b"half")
    runs.resume("d/ckpt.pt", steps=6)
    assert not mine.exists()
    assert not inside.exists()
    assert all(path.exists() for path in foreign), "another run may be writing it"
    assert (progress_of(run)["step"], progress_of(own)["step"]) == (12, 6)
    runs.resume("d/best.safetensors", steps=14)
    assert progress_of(run)["step"] == 14
    runs.resume("d/ckpt.pt.run", steps=20)
    assert read_checkpoint(file).provenance["step"] == 20


def test_resuming_removes_what_a_killed_run_had_half_written(runs: Runs) -> None:
    """The half-written drafts.safetensors of a killed run stayed for ever."""
    run = runs.copy()
    files = [path for path in run.iterdir() if path.is_file() and not path.name.startswith(".")]
    assert {"drafts.safetensors", "log.jsonl", "config.toml"} < {path.name for path in files}
    for path in files:
        durable.temporary_name(path).write_bytes(b"half")
    runs.resume(steps=14)
    left = durable.temporary_files(run)
    report = durable.temporary_files(run, "report.html")
    assert left == report, "another process may be writing the report"


def test_a_folder_without_a_run_gets_no_lock(tmp_path: Path) -> None:
    assert "holds no run to resume" in refusal(training.resume, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_run_whose_folder_is_renamed_or_removed_writes_nothing_there(runs: Runs) -> None:
    """Another run was begun under the old name, and both wrote into that folder."""
    run, moved = runs / "run", runs / "moved"

    def train_and(away: Any) -> str:
        def listener(event: Event) -> None:
            if isinstance(event, StepDone) and event.step == 7:
                away()
                run.mkdir()

        said = refusal(mygpt.train, runs.text, output=run, listener=listener, **TINY)
        assert os.listdir(run) == []
        run.rmdir()
        return said

    assert "run was removed or moved away" in train_and(lambda: shutil.rmtree(run))
    said = train_and(lambda: run.rename(moved))
    assert f"run was renamed to {moved}" in said.replace("'", "")
    assert "ended at step 7" in said
    assert RunFolder(moved).load_state()[0].progress.step == 7
    runs.resume("moved")
    assert_same(moved, runs.finished)


@pytest.mark.parametrize("path", [3, b"x", [], math.nan, ""])
def test_an_impossible_name_is_not_a_checkpoint(path: Any) -> None:
    assert "must be the name of a file or folder" in refusal(mygpt.load, path)


def test_an_empty_output_is_not_the_current_folder(text: str) -> None:
    said = refusal(mygpt.train, text, output="", listener=silent, **TINY)
    assert "output='' must be the name" in said


def test_overwrite_keeps_the_old_run_until_the_new_one_is_there(runs: Runs) -> None:
    """The old run was deleted first, and a full disk then left neither."""
    run = runs.copy()
    before = files_of(run)
    with runs.patch.context() as patch:
        full_disk(patch)
        with pytest.raises(StorageError):
            runs.fit(overwrite=True)
    assert files_of(run) == before


def test_a_foreign_file_of_a_runs_name_is_not_deleted(runs: Runs) -> None:
    """`--overwrite` took any config.toml for an old run's."""
    (runs / "mine").mkdir()
    (runs / "mine" / "config.toml").write_text("precious = true")
    said = refusal(runs.fit, "mine", overwrite=True)
    assert "config.toml does not belong to a run" in said
    assert (runs / "mine" / "config.toml").read_text() == "precious = true"


def test_a_folder_that_holds_runs_can_be_trained_on_again(runs: Runs) -> None:
    """The run's own log and settings were read as text, so it could not be resumed."""
    runs.fit("runs/a", files=str(runs.folder), steps=2)
    runs.resume("runs/a", steps=3)
    assert progress_of(runs / "runs" / "a")["step"] == 3


def test_resume_auto_begins_a_run_and_then_resumes_it(runs: Runs) -> None:
    """The same command, repeated after a crash, ends in the weights of an undisturbed run."""
    runs.fit_until(6, resume="auto")
    assert "is a run already: resuming it" in notes(runs.fit(resume="auto"))
    assert_same(runs / "run", runs.finished)
    assert "is finished, nothing to do" in notes(runs.fit(resume="auto"))
    runs.fit(resume="auto", steps=14)
    assert progress_of(runs / "run")["step"] == 14


def test_resume_auto_keeps_what_the_first_command_chose(runs: Runs) -> None:
    """A window that was shrunk to the text, and a length, are not changed by the same options."""
    Path(runs.text).write_text("a short text, a short text")
    options = {"max_seq_len": 512, "resume": "auto"}
    assert "resuming it" not in notes(runs.fit(**options))
    assert "is finished" in notes(runs.fit(**options))


def test_resume_auto_refuses_another_run_in_one_line(runs: Runs) -> None:
    runs.copy()
    other = runs / "other.txt"
    other.write_text(TEXT[:2000])
    for options, said in (
        ({"lr": 0.5}, "lr=0.5 cannot change when a run is resumed, and this one has 0.004"),
        ({"tokenizer": "byte"}, "tokenizer=byte cannot change"),
        ({"steps": 3}, "steps=3 counts from the run's start, and the run has had 12"),
        ({"val_file": other}, "has changed since the run began"),
        ({"files": str(other)}, "other has changed since the run began"),
        ({"overwrite": True}, "never replaces a run: omit overwrite"),
        ({"resume": "run"}, "resume='run' must be 'auto'"),
    ):
        assert said in refusal(runs.fit, **{"resume": "auto", **options})


# Files that only a state names


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of the user that no run has read; reading it fails the test."""
    secret = tmp_path / "elsewhere" / "secret.txt"
    secret.parent.mkdir()
    secret.write_text("precious " * 100)
    read: list[str] = []
    inner = os.open

    def watched(path: Any, *args: Any, **options: Any) -> int:
        read.append(os.fspath(path))
        return inner(path, *args, **options)

    monkeypatch.setattr(os, "open", watched)
    yield secret
    assert str(secret) not in read


@pytest.mark.parametrize("kind", ["files", "val_file", "folder", "pattern", "older"])
def test_a_file_that_only_a_state_names_is_not_read(runs: Runs, other: Path, kind: str) -> None:
    """--resume, reproduce and report read any file that somebody else's state named."""
    run = runs.copy("far/run")
    named = {"folder": str(other.parent), "pattern": f"{other.parent}/*.txt"}.get(kind, str(other))
    arrays, parts = read_arrays(run / "last.state.safetensors")
    del parts["tensors"]
    assert parts["settings"]["seen"]
    parts["settings"] |= {"val_file": named} if kind == "val_file" else {"files": [named]}
    if kind == "older":
        parts["settings"]["seen"] = None
    write_arrays(run / "last.state.safetensors", arrays, parts)
    (runs / "work").mkdir()
    runs.patch.chdir(runs / "work")
    for act, remedy in ((runs.resume, "--resume"), (runs.replay, "--text")):
        said = refusal(act, "far/run")
        assert f"{other.parent}" in said
        assert "is not read unless it is named: " in said
        assert remedy in said.partition("is not read")[2]
    read_run(RunFolder(run))


def test_changed_texts_are_refused_and_moved_ones_can_be_named(runs: Runs) -> None:
    (runs / "val.txt").write_text("as far as anybody knows")
    runs.fit(val_file=runs / "val.txt")
    Path(runs.text).write_text(TEXT.replace("knows", "knew!"))
    assert "has changed since the run began" in refusal(runs.resume, steps=14)
    Path(runs.text).write_text(TEXT)
    moved = Path(runs.text).rename(runs / "moved.txt")
    runs.replay(files=[moved])
    val_file = (runs / "val.txt").rename(runs / "moved-val.txt")
    runs.resume(files=[moved], steps=14, val_file=val_file)
    started = next(event for event in runs.resume(steps=16) if isinstance(event, Started))
    assert str(started).startswith(f"text: {moved}\n")
    assert progress_of(runs / "run")["step"] == 16
