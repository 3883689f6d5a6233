"""Signals, crashes and new lengths: a run that ends early is saved, and resumes where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import mygpt
from mygpt import training
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.decode.writer import Writer
from mygpt.errors import Interrupted
from mygpt.signals import Abandonable
from mygpt.training.events import Event, Finished, StepDone
from training_runs import TINY, Dead, fit, log, notes, progress_of, resume

pytestmark = pytest.mark.slow


def test_steps_that_are_repeated_after_a_crash_are_reported(text: str, tmp_path: Path) -> None:
    """Killed at step 11, a run resumed from step 8 without a note."""

    def die(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 11:
            raise SystemError

    with pytest.raises(SystemError):
        mygpt.train(text, output=tmp_path / "run", listener=die, **TINY)
    assert "up to 11, are repeated" in notes(resume(tmp_path / "run"))
    assert "are repeated" not in notes(resume(tmp_path / "run", steps=14))


def signal_at(step: int, *numbers: int) -> Callable[[Event], None]:
    """A listener that sends signals to this process after a step."""

    def listener(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    return listener


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_signals_end_with_a_save_and_say_so(name: str, text: str, tmp_path: Path) -> None:
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"no {name} here")
    heard: list[Event] = []

    send = signal_at(6, number)
    with pytest.raises(KeyboardInterrupt) as left:
        mygpt.train(
            text, output=tmp_path / "run", listener=lambda e: (heard.append(e), send(e)), **TINY
        )
    if number == signal.SIGINT:  # Python itself ends with 130 for this very class alone
        assert type(left.value) is KeyboardInterrupt
    else:
        assert isinstance(left.value, Interrupted)
        assert left.value.signal == number
    assert f"{name}: ending after this step" in notes(heard)
    assert progress_of(tmp_path / "run")["step"] == 6


def test_a_signal_while_a_samples_kernels_are_compiled_skips_the_sample(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited for the compiler, ten seconds and more."""

    def compile_first(*_: object, **__: object) -> str:
        with Abandonable():
            os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError

    monkeypatch.setattr(Writer, "generate", compile_first)
    with pytest.raises(Interrupted):
        mygpt.train(text, output=tmp_path / "run", **{**TINY, "sample_tokens": 5})
    step = progress_of(tmp_path / "run")["step"]
    assert 0 < step < TINY["steps"]
    assert not any("sample" in record for record in log(tmp_path / "run"))
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert progress_of(tmp_path / "run")["step"] == TINY["steps"]


def test_an_ignored_signal_stays_ignored(text: str, tmp_path: Path) -> None:
    """`nohup mygpt train ...` outlives its terminal."""
    if not hasattr(signal, "SIGHUP"):
        pytest.skip("no SIGHUP here")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        listener = signal_at(6, signal.SIGHUP)
        mygpt.train(text, output=tmp_path / "run", listener=listener, **TINY)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert progress_of(tmp_path / "run")["step"] == 12


SLOW_STEP = """
import sys, threading, time
from mygpt.cli import main
from mygpt.training.gradients import ParallelGradients
inner = ParallelGradients._share
def slow(self, *args):
    if threading.current_thread() is not threading.main_thread():
        print("in a step", flush=True)
        time.sleep(60)
    return inner(self, *args)
ParallelGradients._share = slow
ParallelGradients.suitable_threads = staticmethod(lambda *_: 2)
main(["train", *sys.argv[1:]])
"""


@pytest.mark.processes
def test_a_second_signal_leaves_at_once(text: str, tmp_path: Path) -> None:
    shape = ["--embed-dim", "24", "--steps", "3"]  # which torch itself computes
    command = [sys.executable, "-c", SLOW_STEP, text, "--preset", "nano", *shape]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while "in a step" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=30)
        assert process.stderr is not None
        shown = process.stderr.read()
    assert time.monotonic() - began < 10
    assert code == 128 + signal.SIGTERM
    assert shown == (
        "ended at once; resume from the last save with: mygpt train --resume runs/times\n"
    )
    assert progress_of(tmp_path / "runs" / "times").get("step") == 0


def test_two_hangups_are_one(text: str, tmp_path: Path) -> None:
    """A shell and the system each send SIGHUP when a terminal closes; the second lost the run."""
    if not hasattr(signal, "SIGHUP"):
        pytest.skip("no SIGHUP here")
    listener = signal_at(6, signal.SIGHUP, signal.SIGHUP)
    with pytest.raises(KeyboardInterrupt):
        training.train(text, output=tmp_path / "run", listener=listener, **TINY)
    assert progress_of(tmp_path / "run")["step"] == 6


@pytest.mark.processes
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
    reached = progress_of(run)["step"]
    assert reached >= 5
    records = (run / "log.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["step"] <= reached


def test_a_signal_in_the_last_validation_still_ends_the_program(text: str, tmp_path: Path) -> None:
    """The run was finished, and the script continued with its next one."""
    listener = signal_at(12, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        training.train(text, output=tmp_path / "run", listener=listener, **TINY)
    assert progress_of(tmp_path / "run")["validated_step"] == 12


def test_a_new_length_is_saved_at_once(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengthened and killed before its first save, the run was finished again."""
    run = tmp_path / "run"
    fit(text, run)
    with monkeypatch.context() as patch:
        patch.setattr("mygpt.training.lifecycle._train", lambda *_: (_ for _ in ()).throw(Dead))
        with pytest.raises(Dead):
            resume(run, steps=20)
    end = resume(run)[-1]
    assert isinstance(end, Finished)
    assert end.step == 20


def test_a_crash_in_the_last_validation_does_not_lose_it(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved at its last step without validation, a run was resumed as if validated."""

    class Crash(Exception):
        pass

    def crash(*_: object, **__: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr("mygpt.training.trainer.evaluate", crash)
        with pytest.raises(Crash):
            fit(text, tmp_path / "cut", save_every=1, eval_every=100)
    assert not (tmp_path / "cut" / "best.safetensors").exists()
    resume(tmp_path / "cut")
    assert (tmp_path / "cut" / "log.jsonl").read_text().count("val_loss") == 1
    assert read_checkpoint(tmp_path / "cut" / "best.safetensors").provenance["step"] == 12
