"""Odd input, closed pipes and narrow encodings end in one line at most, never in a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mygpt
from mygpt import training
from shell import Shell
from training_runs import progress_of, silent

TEXT = "the quick brown fox jumps over the lazy dog. " * 40


@pytest.mark.processes
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


def test_info_of_a_file_with_little_provenance(tmp_path: Path, shell: Shell) -> None:
    """Whatever is in the provenance, `info` shows the entries that it knows."""
    model, tokenizer = mygpt.GPT(3, 8, 2, 1), mygpt.CharTokenizer("abc")
    for odd in ({"command": "x"}, {"step": 5}, {"corpus": {}}, {"loss": "low"}, {"val_loss": []}):
        mygpt.save_checkpoint(tmp_path / "x.pt", model, tokenizer, odd)
        assert "parameters" in shell.printed("info", tmp_path / "x.pt"), odd


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: Shell, args: list[str]
) -> None:
    """Each of these ended with a traceback, or read the whole folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fox.txt").write_text(TEXT)
    (tmp_path / "plain").mkdir()
    model, tokenizer = mygpt.GPT(3, 8, 2, 1), mygpt.CharTokenizer("abc")
    mygpt.save_checkpoint(tmp_path / "plain" / "last.state.safetensors", model, tokenizer)
    shell.refused(*args)


@pytest.mark.processes
def test_a_closed_standard_output_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "fox.txt").write_text(TEXT)
    options = {"preset": "nano", "embed_dim": 16, "max_seq_len": 16, "steps": 2}
    mygpt.train(tmp_path / "fox.txt", output=tmp_path / "run", listener=silent, **options)
    command = f"{sys.executable} -m mygpt generate -c run -p the --seed 1 -n 2 >&-"
    done = subprocess.run(
        command, cwd=tmp_path, shell=True, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_program_that_calls_main_survives_a_broken_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: Shell
) -> None:
    """`generate` let a broken pipe end the process, and whoever had called `main` with it."""
    before = signal.getsignal(signal.SIGPIPE)
    monkeypatch.chdir(tmp_path)
    shell.refused("generate", "--prompt", "a")
    assert signal.getsignal(signal.SIGPIPE) is before


@pytest.mark.kernels
def test_a_resumed_demo_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: Shell
) -> None:
    """It still counted as a demo, and the next demo deleted it."""
    monkeypatch.chdir(tmp_path)
    shell.printed("demo", "--minutes", 0.01)
    had_s = progress_of(Path("runs/demo"))["elapsed_s"]  # more on a busy machine
    training.resume("runs/demo", minutes=had_s / 60 + 0.01, listener=silent)
    assert "already holds a run" in shell.refused("demo", "--minutes", 0.01)
