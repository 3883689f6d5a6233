"""Bugs that were found by review, each told in its docstring."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mygpt
from mygpt import training
from mygpt.checkpoint import read_checkpoint
from mygpt.cli import main
from mygpt.container import read_arrays
from mygpt.core.data import ShuffledWindows
from mygpt.errors import DivergedError, InputError, StorageError
from mygpt.training.events import Event, Finished, StepDone, WentBack

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
TINY: dict[str, Any] = {
    "preset": "nano",
    "embed_dim": 16,
    "num_layers": 1,
    "max_seq_len": 16,
    "batch_size": 4,
    "sample_tokens": 0,
}


def silent(event: Event) -> None:
    """Hears nothing."""


def fit(folder: Path, output: str, **options: Any) -> list[Event]:
    text = folder / "fox.txt"
    text.write_text(TEXT)
    heard: list[Event] = []
    options = {"steps": 4, "listener": heard.append, **TINY, **options}
    mygpt.train(text, output=folder / output, **options)
    return heard


def state_arrays(run: Path) -> dict[str, Any]:
    return read_arrays(run / "last.state.safetensors")[0]


def test_going_on_by_the_folders_name_still_writes_the_users_file(tmp_path: Path) -> None:
    """`--resume ckpt.pt.run` trained on and left ckpt.pt as it was."""
    fit(tmp_path, "ckpt.pt")
    training.resume(tmp_path / "ckpt.pt.run", steps=8, listener=silent)
    assert read_checkpoint(tmp_path / "ckpt.pt").provenance["step"] == 8


def test_overwrite_keeps_the_old_run_until_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old run was deleted first, and a full disk then left neither."""
    fit(tmp_path, "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError):
            fit(tmp_path, "run", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_a_demo_that_was_gone_on_with_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It still counted as a demo, and the next demo deleted it."""
    monkeypatch.chdir(tmp_path)
    for expected in (0, 2):
        with pytest.raises(SystemExit) as left:
            main(["demo", "--minutes", "0.01"])
        assert left.value.code == expected
        training.resume("runs/demo", minutes=0.02, listener=silent)
    assert "already holds a run" in capsys.readouterr().err


def test_weights_that_are_no_numbers_are_never_saved(tmp_path: Path) -> None:
    """The loss of a step is from before its update: it was finite, and the weights were not."""
    heard: list[Event] = []
    options = {"lr": 1e38, "grad_clip": 0.0, "save_every": 1, "schedule": "constant"}
    with pytest.raises(DivergedError):
        fit(tmp_path, "run", listener=heard.append, **options)
    problems = {event.problem for event in heard if isinstance(event, WentBack)}
    assert "the largest weight is inf" in problems
    kept = state_arrays(tmp_path / "run")
    assert all(np.isfinite(array).all() for array in kept.values())


def test_a_crash_in_the_last_validation_does_not_lose_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved at its last step and not validated, a run was taken for validated when gone on with."""

    class Crash(Exception):
        pass

    def crash(*_: object, **__: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr("mygpt.training.loop.evaluate", crash)
        with pytest.raises(Crash):
            fit(tmp_path, "cut", save_every=1)
    assert not (tmp_path / "cut" / "best.safetensors").exists()
    training.resume(tmp_path / "cut", listener=silent)
    assert (tmp_path / "cut" / "log.jsonl").read_text().count("val_loss") == 1
    assert read_checkpoint(tmp_path / "cut" / "best.safetensors").provenance["step"] == 4


def test_the_loss_at_the_end_is_the_last_steps(tmp_path: Path) -> None:
    """With the last step validated but not printed, the first step's loss was told."""
    end = fit(tmp_path, "run", steps=10, eval_every=10, print_every=1000)[-1]
    seen = [e for e in fit(tmp_path, "all", steps=10, print_every=1) if isinstance(e, StepDone)]
    assert isinstance(end, Finished)
    assert end.loss == seen[-1].loss


def test_every_token_of_the_text_is_learned_at_some_time() -> None:
    """The windows' offsets stopped short of the last tokens, a third of a small text."""
    for length, seq_len in ((191, 64), (1000, 64), (100, 50), (65, 64)):
        windows = ShuffledWindows(np.arange(length), seq_len, seed=0)
        seen = {int(t) for step in range(3000) for t in windows.batch(step, 1)[0, 1:]}
        assert seen == set(range(1, length))


def test_a_folder_that_holds_runs_can_be_trained_on_again(tmp_path: Path) -> None:
    """The run's own log and settings were read as text, so it could not go on."""
    (tmp_path / "fox.txt").write_text(TEXT)
    mygpt.train(tmp_path, output=tmp_path / "runs" / "a", steps=2, listener=silent, **TINY)
    training.resume(tmp_path / "runs" / "a", steps=3, listener=silent)


def test_a_foreign_file_of_a_runs_name_is_not_deleted(tmp_path: Path) -> None:
    """`--overwrite` took any config.toml for an old run's."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.toml").write_text("precious = true")
    with pytest.raises(InputError, match=r"config\.toml is no run's"):
        fit(tmp_path, "mine", overwrite=True)
    assert (tmp_path / "mine" / "config.toml").read_text() == "precious = true"


def test_a_moved_validation_file_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("the lazy fox")
    fit(tmp_path, "run", val_file=tmp_path / "val.txt")
    moved = (tmp_path / "val.txt").rename(tmp_path / "moved.txt")
    training.resume(tmp_path / "run", steps=5, val_file=moved, listener=silent)


def test_the_callers_random_numbers_stay_their_own(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fit(tmp_path, "run")
    assert torch.equal(torch.rand(3), expected)


def test_a_narrow_encoding_does_not_end_a_training(tmp_path: Path) -> None:
    """Samples of Russian text killed the run where stdout was ASCII."""
    (tmp_path / "text.txt").write_text("Все счастливые семьи похожи друг на друга. " * 40)
    command = [sys.executable, "-m", "mygpt", "train", "text.txt", "--preset", "nano"]
    command += ["--steps", "2", "--eval-every", "1", "--max-seq-len", "16"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_info_of_a_file_that_tells_little(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever stands in the provenance, `info` shows what it understands."""
    model, tokenizer = mygpt.GPT(3, 8, 2, 1), mygpt.CharTokenizer("abc")
    for odd in ({"command": "x"}, {"step": 5}, {"corpus": {}}, {"loss": "low"}, {"val_loss": []}):
        mygpt.save_checkpoint(tmp_path / "x.pt", model, tokenizer, odd)
        with pytest.raises(SystemExit) as left:
            main(["info", str(tmp_path / "x.pt")])
        assert left.value.code == 0, odd
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args",
    [
        ["train", "fox.txt", "--encoding", "hex"],
        ["train", "x" * 300],
        ["train", ""],
        ["generate", "-p", "x", "-c", "x" * 300],
        ["train", "fox.txt", "--tokenizer", "x" * 300],
        ["train", "--resume", "plain"],
    ],
)
def test_odd_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
) -> None:
    """Each of these ended with a traceback, or read the whole folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fox.txt").write_text(TEXT)
    (tmp_path / "plain").mkdir()
    model, tokenizer = mygpt.GPT(3, 8, 2, 1), mygpt.CharTokenizer("abc")
    mygpt.save_checkpoint(tmp_path / "plain" / "last.state.safetensors", model, tokenizer)
    with pytest.raises(SystemExit) as left:
        main(args)
    out, err = capsys.readouterr()
    assert (left.value.code, out, err.count("\n")) == (2, "", 1), err


def test_options_of_another_kind_are_refused(tmp_path: Path) -> None:
    """They were taken, and silently meant something else."""
    for options in ({"schedule": "square"}, {"data_order": "random"}, {"print_every": 1.5}):
        with pytest.raises(InputError, match=next(iter(options))):
            fit(tmp_path, "run", **options)


def test_the_largest_seed_trains(tmp_path: Path) -> None:
    fit(tmp_path, "run", seed=2**64 - 1)


def test_bytes_are_not_learned_without_a_word(tmp_path: Path) -> None:
    """A Latin-1 file quietly became a byte model."""
    (tmp_path / "latin.txt").write_bytes(TEXT.encode() + b"caf\xe9")
    heard: list[Event] = []
    options = {**TINY, "steps": 1, "listener": heard.append}
    mygpt.train(tmp_path / "latin.txt", output=tmp_path / "run", **options)
    assert "latin.txt is not text in UTF-8, so its bytes are learned" in str(heard[0])


def test_going_on_with_a_finished_run_says_so(tmp_path: Path) -> None:
    fit(tmp_path, "run")
    heard: list[Event] = []
    training.resume(tmp_path / "run", listener=heard.append)
    assert "is finished" in str(heard[0])


def test_an_empty_output_is_not_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "fox.txt").write_text(TEXT)
    with pytest.raises(InputError, match="output='' must be the name"):
        mygpt.train(tmp_path / "fox.txt", output="", steps=1, listener=silent, **TINY)


def test_a_closed_standard_output_is_no_traceback(tmp_path: Path) -> None:
    fit(tmp_path, "run")
    command = f"{sys.executable} -m mygpt generate -c run -p the --seed 1 -n 2 >&-"
    done = subprocess.run(
        command, cwd=tmp_path, shell=True, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_program_that_calls_main_survives_a_broken_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`generate` let a broken pipe end the process, and whoever had called `main` with it."""
    before = signal.getsignal(signal.SIGPIPE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["generate", "--prompt", "a"])
    assert signal.getsignal(signal.SIGPIPE) is before
