"""Ways in which a run once lost something, found in review; each docstring tells its story."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_durability import (
    TINY,
    assert_same,
    course,
    damage,
    fit,
    go_on,
    log,
    notes,
    plant,
    stop_at,
    text,
)

import mygpt
from mygpt import training
from mygpt.checkpoint import read_checkpoint
from mygpt.container import read_arrays
from mygpt.errors import CheckpointError, InputError, StorageError
from mygpt.training.events import Event, Finished, LeftOut, StepDone, WentBack
from mygpt.training.guard import LEFT_OUT_BEFORE_GOING_BACK, Guard
from mygpt.training.keeper import Keeper
from mygpt.training.run import RunFolder

__all__ = ["text"]  # a fixture


class Dead(BaseException):
    """The process dies here."""


def spoil(guard: Guard) -> None:
    """Weights from which no loss comes, and yet finite."""
    with torch.no_grad():
        next(guard.optimizer.model.parameters()).fill_(1e30)


def test_going_back_twice_never_goes_forward(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back at the previous state, the spoilt last one was kept as previous, and gone to next."""
    inner, spoilt = Guard.step, 6

    def spoiling(self: Guard, lr: float) -> None:
        inner(self, lr)
        if self.progress.step == spoilt and self.progress.lr_scale > 0.25:
            spoil(self)

    monkeypatch.setattr(Guard, "step", spoiling)
    run = tmp_path / "run"
    heard = fit(text, run, save_every=1, eval_every=100)
    assert [(e.step, e.lr_scale) for e in heard if isinstance(e, WentBack)] == [(5, 0.5), (5, 0.25)]
    assert [r["step"] for r in log(run) if "loss" in r] == list(range(1, 13)), "and no line is cut"


def test_a_death_while_going_back_leaves_no_hole_in_the_log(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log was cut for the state gone back to while the state that had more still held."""
    inner = Guard.step

    def spoiling(self: Guard, lr: float) -> None:
        inner(self, lr)
        if self.progress.step == 6:
            spoil(self)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Guard, "step", spoiling)
        commits = []
        commit = Keeper._commit

        def dying(self: Keeper, at: Any, *, keep: bool) -> None:
            if at.lr_scale < 1:
                raise Dead
            commits.append(at.step)
            commit(self, at, keep=keep)

        patch.setattr(Keeper, "_commit", dying)
        with pytest.raises(Dead):
            fit(text, run, save_every=1, eval_every=100)
    assert commits[-1] == 6
    state, _ = RunFolder(run).load_state()
    assert (run / "log.jsonl").stat().st_size >= state.course.log_bytes


def test_an_overwritten_runs_state_is_not_gone_back_to(
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
    plant(monkeypatch, lambda n: math.nan if n <= LEFT_OUT_BEFORE_GOING_BACK else 1.0)
    heard = go_on(run)
    assert [e.step for e in heard if isinstance(e, WentBack)] == [0]
    assert course(run)["step"] == 12


def test_the_users_file_is_made_again_from_the_best(text: str, tmp_path: Path) -> None:
    """Killed between writing best and ckpt.pt, or with ckpt.pt deleted, it stayed as it was."""
    file = tmp_path / "ckpt.pt"
    fit(text, file)
    best = read_checkpoint(tmp_path / "ckpt.pt.run" / "best.safetensors")
    file.unlink()
    go_on(file)
    assert read_checkpoint(file).provenance == best.provenance
    shutil.copy(tmp_path / "ckpt.pt.run" / "last.safetensors", file)
    go_on(file)
    assert read_checkpoint(file).provenance == best.provenance


def test_the_best_is_made_again_from_the_users_file(text: str, tmp_path: Path) -> None:
    """With best damaged, the only good copy of it was written over by the last model."""
    file = tmp_path / "ckpt.pt"
    fit(text, file)
    best = tmp_path / "ckpt.pt.run" / "best.safetensors"
    before = read_checkpoint(best).provenance
    damage(best)
    assert "kept as damaged.best.safetensors" in notes(go_on(file))
    assert read_checkpoint(best).provenance == before
    assert read_checkpoint(file).provenance == before


def test_a_file_in_another_runs_folder_means_its_own_run(text: str, tmp_path: Path) -> None:
    """`--resume d/ckpt.pt`, the line it printed itself, went on with the run that d is."""
    fit(text, tmp_path / "d")
    fit(text, tmp_path / "d" / "ckpt.pt", steps=4)
    go_on(tmp_path / "d" / "ckpt.pt", steps=6)
    assert course(tmp_path / "d")["step"] == 12
    assert course(tmp_path / "d" / "ckpt.pt.run")["step"] == 6
    go_on(tmp_path / "d" / "best.safetensors", steps=14)
    assert course(tmp_path / "d")["step"] == 14


def test_a_new_length_is_not_forgotten(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengthened and killed before its first save, the run was finished again."""
    run = tmp_path / "run"
    fit(text, run)
    with monkeypatch.context() as patch:
        patch.setattr("mygpt.training.going_on.sit", lambda *_: (_ for _ in ()).throw(Dead))
        with pytest.raises(Dead):
            go_on(run, steps=20)
    end = go_on(run)[-1]
    assert isinstance(end, Finished)
    assert end.step == 20


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


def test_a_run_that_ends_in_left_out_steps_keeps_good_weights(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer than it takes to go back: the spoilt weights were the run's result."""
    inner = Guard.step

    def spoiling(self: Guard, lr: float) -> None:
        inner(self, lr)
        if self.progress.step == 10 and self.progress.lr_scale == 1.0:
            spoil(self)

    monkeypatch.setattr(Guard, "step", spoiling)
    heard = fit(text, tmp_path / "run", val_fraction=0.0)
    assert [e.step for e in heard if isinstance(e, WentBack)] == [8]
    arrays = read_checkpoint(tmp_path / "run" / "last.safetensors").arrays
    assert max(np.abs(array).max() for array in arrays.values()) < 1e3


def test_a_device_that_is_not_waited_for_is_looked_at_before_a_save(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA: the fused update looks itself; spoilt weights were saved between two looks."""
    inner = Guard.__init__

    def unread(self: Guard, *args: Any) -> None:
        inner(self, *args)
        self.reads_every_step = False

    monkeypatch.setattr(Guard, "__init__", unread)
    whole, run = tmp_path / "whole", tmp_path / "run"
    fit(text, whole)
    plant(monkeypatch, lambda n: math.nan if n in (6, 7) else 1.0)
    heard = fit(text, run)
    told = [(e.step, e.count) for e in heard if isinstance(e, LeftOut)]
    assert told == [(8, 2)]
    steps = read_arrays(run / "last.state.safetensors")[0]
    assert steps["optimizer/step/final_norm.weight"] == 10, "two of twelve were left out"
    monkeypatch.undo()
    monkeypatch.setattr(Guard, "__init__", unread)
    inner_step = Guard.step

    def spoiling(self: Guard, lr: float) -> None:
        inner_step(self, lr)
        if self.progress.step == 9 and self.progress.lr_scale == 1.0:
            spoil(self)

    monkeypatch.setattr(Guard, "step", spoiling)
    heard = fit(text, tmp_path / "spoilt", steps=40, eval_every=100)
    assert [e.step for e in heard if isinstance(e, WentBack)] == [8]


def test_strays_of_another_run_are_left(text: str, tmp_path: Path) -> None:
    """A run whose folder holds another run's file cleared what that one was writing."""
    from mygpt import storage

    fit(text, tmp_path / "c")
    other = storage.temporary_name(tmp_path / "c" / "x.pt")
    other.write_bytes(b"half")
    go_on(tmp_path / "c", steps=14)
    assert other.exists()


def test_a_folder_without_a_run_gets_no_lock(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run to go on with"):
        training.resume(tmp_path)
    assert os.listdir(tmp_path) == []


def test_two_hangups_are_one(text: str, tmp_path: Path) -> None:
    """A shell and the system each send SIGHUP when a terminal closes; the second lost the run."""
    if not hasattr(signal, "SIGHUP"):
        pytest.skip("no SIGHUP here")

    def listener(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 6:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)

    with pytest.raises(KeyboardInterrupt):
        training.train(text, output=tmp_path / "run", listener=listener, **TINY)
    assert course(tmp_path / "run")["step"] == 6


def test_a_terminal_that_closes_ends_in_a_save(text: str, tmp_path: Path) -> None:
    """Writing to it failed first: exit code 3, and all since the last save was lost."""
    pty = pytest.importorskip("pty")
    options = ["--preset", "nano", "--embed-dim", "8", "--num-heads", "2", "--steps", "1000000"]
    reports = ["--print-every", "5", "--eval-every", "10000000"]
    run = tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "mygpt", "train", text, *options, *reports]
        os.execve(
            command[0],
            [*command, "--output", str(run)],
            {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"},
        )
    shown, until = b"", time.monotonic() + 60
    while b"step 5" not in shown and time.monotonic() < until:
        shown += os.read(terminal, 65536)
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 128 + signal.SIGHUP
    reached = course(run)["step"]
    assert reached >= 5
    records = (run / "log.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["step"] <= reached


def test_stopped_while_steps_are_left_out_good_weights_are_saved(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped twice in the middle of trouble, both states were spoilt and the run was lost."""
    inner = Guard.step

    def spoiling(self: Guard, lr: float) -> None:
        inner(self, lr)
        if self.progress.step == 6 and self.progress.lr_scale == 1.0:
            spoil(self)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Guard, "step", spoiling)
        stop_at(8, patch)
        fit(text, run, eval_every=100)
    end = go_on(run)[-1]
    assert isinstance(end, Finished)
    assert math.isfinite(end.loss)


def test_a_log_that_was_cut_is_told_and_not_written_into(text: str, tmp_path: Path) -> None:
    """The next record went on in the middle of the cut line."""
    run = tmp_path / "run"
    fit(text, run)
    os.truncate(run / "log.jsonl", 150)
    heard = go_on(run, steps=14)
    assert "log.jsonl is shorter than the run left it" in notes(heard)
    assert log(run)[-1]["step"] == 14


def test_a_signal_in_the_last_validation_still_ends_the_program(text: str, tmp_path: Path) -> None:
    """The run was finished, and the script went on to its next one."""

    def listener(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 12:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        training.train(text, output=tmp_path / "run", listener=listener, **TINY)
    assert course(tmp_path / "run")["validated_step"] == 12


def test_worse_than_guessing_is_said(text: str, tmp_path: Path) -> None:
    """With --lr 100 a run ended in "done", with a loss of 225."""
    end = fit(text, tmp_path / "run")[-1]
    assert isinstance(end, Finished)
    assert "worse than guessing" not in str(end)
    told = "worse than guessing: train again with a lower --lr"
    assert told in str(replace(end, best_val_loss=224.9))
    assert told in str(replace(end, best_val_loss=None, loss=224.9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": "5"}, "steps='5' must be a number"),
        ({"lr": "x"}, "lr='x' must be a number"),
        ({"dropout": "0.1"}, "dropout='0.1' must be a number"),
        ({"beta1": None, "minutes": "1", "steps": None}, "minutes='1' must be a number"),
        ({"output": 3}, "output=3 must be the name of a file or folder"),
        ({"output": "a\0b"}, "must be the name of a file or folder"),
        ({"listener": None}, "listener=None must be callable"),
        ({"files": 3}, "files=3 must be a name or several"),
        ({"files": b"x.txt"}, "files=b'x.txt' must be a name or several"),
    ],
)
def test_wrong_types_are_told_in_one_line(
    text: str, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """They were raw TypeErrors from within."""
    given = {**TINY, "files": text, "output": tmp_path / "run", **options}
    with pytest.raises(InputError) as caught:
        training.train(**given)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", [3, b"x", [], math.nan, ""])
def test_what_is_no_name_is_no_checkpoint(path: Any) -> None:
    with pytest.raises(InputError, match="must be the name of a file or folder"):
        mygpt.load(path)


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
    assert RunFolder(moved).load_state()[0].course.step == 7
    go_on(moved)
    assert_same(moved, tmp_path / "whole")
    assert log(moved) == log(tmp_path / "whole")


def test_a_run_whose_folder_is_removed_writes_into_no_other(text: str, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def remove(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 7:
            shutil.rmtree(run)
            run.mkdir()

    with pytest.raises(StorageError, match="was removed or moved away"):
        mygpt.train(text, output=run, listener=remove, **TINY)
    assert os.listdir(run) == []
