"""Signals, crashes and new lengths: a run that ends early is saved, and resumes where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from mygpt import training
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.decode.writer import Writer
from mygpt.errors import Interrupted
from mygpt.signals import Abandonable
from mygpt.training.events import Event, Finished, StepDone
from training_runs import TINY, Dead, Runs, assert_same, dying_at, log, notes, progress_of

pytestmark = pytest.mark.slow

needs_hangups = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")


def signal_at(step: int, *numbers: int) -> Callable[[Event], None]:
    """A listener that sends signals to this process after a step."""

    def listener(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    return listener


def test_steps_that_are_repeated_after_a_crash_are_reported(runs: Runs) -> None:
    """Killed at step 11, a run resumed from step 8 without a note."""
    with pytest.raises(Dead):
        training.train(runs.text, output=runs / "run", listener=dying_at(11), **TINY)
    assert "up to 11, are repeated" in notes(runs.resume())
    assert "are repeated" not in notes(runs.resume(steps=14))


@pytest.mark.parametrize(
    ("names", "step"),
    [
        ("SIGINT", 6),
        ("SIGTERM", 6),
        ("SIGUSR1", 6),
        # A shell and the system each send it when a terminal closes; the second lost the run.
        ("SIGHUP SIGHUP", 6),
        # In the last validation: the run was finished, and the script continued with its next one.
        ("SIGINT", 12),
    ],
)
def test_signals_end_a_run_with_a_save_and_say_so(runs: Runs, names: str, step: int) -> None:
    numbers = [getattr(signal, name, None) for name in names.split()]
    if None in numbers:
        pytest.skip(f"no {names} here")
    heard: list[Event] = []
    send, run = signal_at(step, *numbers), runs / "run"
    before = signal.getsignal(numbers[0])
    with pytest.raises(KeyboardInterrupt) as left:
        training.train(runs.text, output=run, listener=lambda e: (heard.append(e), send(e)), **TINY)
    assert signal.getsignal(numbers[0]) is before
    if numbers[0] == signal.SIGINT:  # Python itself ends with 130 for this very class alone
        assert type(left.value) is KeyboardInterrupt
    else:
        assert isinstance(left.value, Interrupted)
        assert left.value.signal == numbers[0]
    progress, end = progress_of(run), heard[-1]
    assert progress["step"] == step
    if step == 12:
        assert progress["validated_step"] == 12
        return
    assert f"{names.split()[0]}: ending after this step" in notes(heard)
    assert isinstance(end, Finished)
    assert end.signal == numbers[0]
    assert f"mygpt train --resume {run}" in str(end)
    runs.resume()
    assert_same(run, runs.finished)


def test_a_signal_while_a_samples_kernels_are_compiled_skips_the_sample(runs: Runs) -> None:
    """It waited for the compiler, ten seconds and more."""

    def compile_first(*_: object, **__: object) -> str:
        with Abandonable():
            os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError

    with runs.patch.context() as patch:
        patch.setattr(Writer, "generate", compile_first)
        with pytest.raises(Interrupted):
            runs.fit(sample_tokens=5)
    assert 0 < progress_of(runs / "run")["step"] < TINY["steps"]
    assert not any("sample" in record for record in log(runs / "run"))
    runs.resume()
    assert progress_of(runs / "run")["step"] == TINY["steps"]


@needs_hangups
def test_an_ignored_signal_stays_ignored(runs: Runs) -> None:
    """`nohup mygpt train ...` outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        listener = signal_at(6, signal.SIGHUP)
        training.train(runs.text, output=runs / "run", listener=listener, **TINY)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert progress_of(runs / "run")["step"] == 12


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
def test_a_second_signal_leaves_at_once(runs: Runs) -> None:
    shape = ["--embed-dim", "24", "--steps", "3"]  # which torch itself computes
    command = [sys.executable, "-c", SLOW_STEP, runs.text, "--preset", "nano", *shape]
    with subprocess.Popen(
        command, cwd=runs.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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
    assert progress_of(runs / "runs" / "times").get("step") == 0


@needs_hangups
@pytest.mark.processes
def test_a_terminal_that_closes_ends_in_a_save(runs: Runs) -> None:
    """Writing to it failed first: exit code 3, and all since the last save was lost."""
    pty = pytest.importorskip("pty")
    options = ["--preset", "nano", "--embed-dim", "8", "--num-heads", "2", "--steps", "1000000"]
    reports = ["--print-every", "5", "--eval-every", "10000000"]
    run = runs / "run"
    command = [sys.executable, "-m", "mygpt", "train", runs.text, *options, *reports]
    pid, terminal = pty.fork()
    if pid == 0:
        environment = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
        os.execve(command[0], [*command, "--output", str(run)], environment)
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


def dead(*_: object, **__: object) -> None:
    raise Dead


def test_a_new_length_is_saved_at_once(runs: Runs) -> None:
    """Lengthened and killed before its first save, the run was finished again."""
    runs.copy()
    with runs.patch.context() as patch:
        patch.setattr("mygpt.training.lifecycle._train", dead)
        with pytest.raises(Dead):
            runs.resume(steps=20)
    end = runs.resume()[-1]
    assert isinstance(end, Finished)
    assert end.step == 20


def test_a_crash_in_the_last_validation_does_not_lose_it(runs: Runs) -> None:
    """Saved at its last step without validation, a run was resumed as if validated."""
    run = runs / "run"
    with runs.patch.context() as patch:
        patch.setattr("mygpt.training.trainer.evaluate", dead)
        with pytest.raises(Dead):
            runs.fit(save_every=1, eval_every=100)
    assert not (run / "best.safetensors").exists()
    runs.resume()
    assert (run / "log.jsonl").read_text().count("val_loss") == 1
    assert read_checkpoint(run / "best.safetensors").provenance["step"] == 12
