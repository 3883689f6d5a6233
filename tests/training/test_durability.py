"""A run loses nothing: damage, blow-ups, signals, other writers, other threads, older formats."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mygpt
from mygpt import training
from mygpt.checkpoint import read_checkpoint
from mygpt.container import read_arrays, write_arrays
from mygpt.errors import (
    CheckpointError,
    DivergedError,
    InputError,
    Interrupted,
    StorageError,
)
from mygpt.locks import RunLock
from mygpt.signals import Abandonable
from mygpt.training.events import (
    Evaluated,
    Event,
    Finished,
    LeftOut,
    Note,
    Spiked,
    StepDone,
    WentBack,
)
from mygpt.training.gradients import Gradients
from mygpt.training.guard import LEFT_OUT_BEFORE_GOING_BACK, TRIES, Guard
from mygpt.training.loop import Trainer
from paths import GOLDEN

TEXT = "".join(f"{n} times {n} is {n * n}, as far as anybody knows. " for n in range(200))
TINY: dict[str, Any] = {
    "preset": "nano",
    "embed_dim": 8,
    "num_heads": 2,
    "num_layers": 1,
    "max_seq_len": 16,
    "batch_size": 4,
    "steps": 12,
    "print_every": 1,
    "eval_every": 4,
    "save_every": 4,
    "sample_tokens": 0,
}
FORMAT_1 = GOLDEN / "format-1"


def silent(event: Event) -> None:
    """Hears nothing."""


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "times.txt"
    path.write_text(TEXT)
    return str(path)


def fit(text: str, output: Path, **options: Any) -> list[Event]:
    heard: list[Event] = []
    mygpt.train(text, output=output, listener=heard.append, **{**TINY, **options})
    return heard


def go_on(run: Path, **options: Any) -> list[Event]:
    heard: list[Event] = []
    training.resume(run, listener=heard.append, **options)
    return heard


def notes(heard: list[Event]) -> str:
    return "\n".join(event.text for event in heard if isinstance(event, Note))


def log(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "elapsed_s"} for record in records]


def course(run: Path) -> dict[str, Any]:
    return read_arrays(run / "last.state.safetensors")[1]["course"]


def assert_same(one: Path, other: Path) -> None:
    a, b = (read_arrays(run / "last.state.safetensors")[0] for run in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert log(one) == log(other)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Trainer.fit
    monkeypatch.setattr(
        Trainer, "fit", lambda self, should_stop: inner(self, lambda: self.course.step >= step)
    )


# --- older formats -------------------------------------------------------------------------


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
    heard = go_on(run, files=[tmp_path / "hello.txt"], steps=6)
    assert isinstance(heard[-1], Finished)
    records = [r["step"] for r in log(run) if "loss" in r]
    assert records == [1, 2, 3, 4, 5, 6]
    assert course(run)["best_val_loss"] < 2.4835180610117287


# --- damage --------------------------------------------------------------------------------


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def test_going_on_from_the_previous_state(text: str, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    fit(text, whole)
    fit(text, run)
    damage(run / "last.state.safetensors")
    heard = go_on(run)
    told = notes(heard).splitlines()
    assert len(told) == 2
    assert told[1] == "what came after the last save, up to step 12, is made again"
    assert "last.state.safetensors is damaged: tensor" in told[0]
    assert told[0].endswith("going on from the state before it, of step 8")
    assert_same(run, whole)
    assert (run / "damaged.last.state.safetensors").exists()


def test_with_both_states_damaged_nothing_is_touched(text: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(text, run)
    for name in ("last.state.safetensors", "previous.state.safetensors"):
        damage(run / name)
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.name != ".lock"}
    with pytest.raises(CheckpointError, match="and so is the state before it"):
        go_on(run)
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.name != ".lock"} == before


def test_a_damaged_best_is_put_aside_and_made_again(text: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(text, run)
    damage(run / "best.safetensors")
    heard = go_on(run, steps=20)
    assert "best.safetensors is damaged" in notes(heard)
    assert (run / "damaged.best.safetensors").exists()
    assert read_checkpoint(run / "best.safetensors").provenance["step"] > 12


def test_a_state_that_is_missing_is_the_previous_one(text: str, tmp_path: Path) -> None:
    """On a file system without links a death can leave only the one before."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    fit(text, whole)
    fit(text, run)
    (run / "last.state.safetensors").unlink()
    assert "does not exist: going on from the state before it" in notes(go_on(run))
    assert_same(run, whole)


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
            go_on(run)


# --- the best model ------------------------------------------------------------------------


def test_a_better_model_of_a_lost_future_is_not_given_up(text: str, tmp_path: Path) -> None:
    """Killed after a validation and before the save that would have known of it."""
    run = tmp_path / "run"
    fit(text, run, steps=8)
    late = tmp_path / "late"
    shutil.copytree(run, late)
    go_on(late, steps=40)
    shutil.copy(late / "best.safetensors", run / "best.safetensors")
    future = read_checkpoint(run / "best.safetensors").provenance
    assert future["step"] > 8
    go_on(run, steps=12)
    kept = read_checkpoint(run / "best.safetensors").provenance
    assert kept["val_loss"] == future["val_loss"] == course(run)["best_val_loss"]


def test_a_best_model_of_another_run_is_not_taken_for_ones_own(text: str, tmp_path: Path) -> None:
    """Killed when `--overwrite` had committed the new run and not yet removed the old best."""
    run, old = tmp_path / "run", tmp_path / "old"
    fit(text, old, steps=40)
    fit(text, run, steps=0, eval_every=100)
    shutil.copy(old / "best.safetensors", run / "best.safetensors")
    go_on(run, steps=4)
    best = read_checkpoint(run / "best.safetensors").provenance
    assert best["step"] == 4
    assert best["val_loss"] == course(run)["best_val_loss"]


# --- blow-ups ------------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], float]) -> None:
    """Multiply the loss of call number n (from 1) by `bad(n)`."""
    inner, calls = Gradients.__call__, [0]

    def call(self: Gradients, *arguments: Any) -> torch.Tensor:
        calls[0] += 1
        return inner(self, *arguments) * bad(calls[0])

    monkeypatch.setattr(Gradients, "__call__", call)


def test_after_some_in_a_row_the_run_goes_back_and_halves_the_rate(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = 7
    last = first + LEFT_OUT_BEFORE_GOING_BACK - 1
    plant(monkeypatch, lambda n: math.nan if first <= n <= last else 1.0)
    run = tmp_path / "run"
    heard = fit(text, run, steps=20)
    went = [event for event in heard if isinstance(event, WentBack)]
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
    assert course(run)["tries"] == 0, "it has passed the place of trouble"


def test_a_run_that_went_back_goes_on_with_its_lower_rate(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lambda n: math.nan if 7 <= n < 7 + LEFT_OUT_BEFORE_GOING_BACK else 1.0)
    fit(text, tmp_path / "whole", steps=20)
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        plant(patch, lambda n: math.nan if 7 <= n < 7 + LEFT_OUT_BEFORE_GOING_BACK else 1.0)
        stop_at(14, patch)
        fit(text, tmp_path / "run", steps=20)
    go_on(tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_weights_saved_just_after_the_bad_update_are_no_good_state(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last state was saved between the update that spoilt it and the first NaN."""
    spoilt = 6
    inner = Guard.step

    def spoiling(self: Guard, lr: float) -> None:
        inner(self, lr)
        if self.progress.step == spoilt and self.progress.lr_scale == 1.0:
            parameter = next(self.optimizer.model.parameters())
            parameter.data.fill_(1e30)  # finite, and no loss comes of it

    monkeypatch.setattr(Guard, "step", spoiling)
    run = tmp_path / "run"
    heard = fit(text, run, save_every=1, eval_every=100)
    went = [event for event in heard if isinstance(event, WentBack)]
    assert [w.step for w in went] == [spoilt - 1]
    assert isinstance(heard[-1], Finished)
    assert math.isfinite(heard[-1].loss)


def test_what_blows_up_again_and_again_ends_with_code_5_and_its_best(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lambda n: math.nan if n > 9 else 1.0)
    run = tmp_path / "run"
    heard: list[Event] = []
    with pytest.raises(
        DivergedError, match=rf"going back {TRIES} times with half the rate"
    ) as left:
        mygpt.train(text, output=run, listener=heard.append, **{**TINY, "steps": 30})
    assert left.value.exit_code == 5
    assert [e.lr_scale for e in heard if isinstance(e, WentBack)] == [0.5, 0.25, 0.125]
    lowest = min(e.result.loss for e in heard if isinstance(e, Evaluated))
    assert read_checkpoint(run / "best.safetensors").provenance["val_loss"] == lowest
    assert all(
        np.isfinite(a).all() for a in read_arrays(run / "last.state.safetensors")[0].values()
    )


def test_a_validation_that_is_no_number_goes_back_too(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mygpt.evaluation import Evaluation
    from mygpt.training import loop

    calls = []

    def evaluated(*args: Any, **options: Any) -> Evaluation:
        calls.append(args)
        return Evaluation(math.nan, 1, math.nan) if len(calls) == 2 else inner(*args, **options)

    inner = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", evaluated)
    heard = fit(text, tmp_path / "run")
    assert [e.problem for e in heard if isinstance(e, WentBack)] == ["the validation loss is nan"]
    assert isinstance(heard[-1], Finished)


def test_a_jump_of_the_loss_is_told_with_step_and_batch(
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


def test_a_step_that_is_left_out_is_told_with_its_batch(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lambda n: math.inf if n == 5 else 1.0)
    heard = fit(text, tmp_path / "run")
    told = [event for event in heard if isinstance(event, LeftOut)]
    assert [(e.step, e.loss, e.count, len(e.batch)) for e in told] == [(5, math.inf, 1, 4)]
    assert [e.step for e in heard if isinstance(e, StepDone)] == [*range(1, 5), *range(6, 13)]


# --- one writer ----------------------------------------------------------------------------


def test_a_run_that_is_being_trained_is_refused(text: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(text, run)
    before = (run / "last.state.safetensors").read_bytes()
    with RunLock(run):
        for begin in (
            lambda: go_on(run, steps=20),
            lambda: fit(text, run, overwrite=True),
            lambda: training.replay(run, output=run, overwrite=True, listener=silent),
        ):
            with pytest.raises(InputError, match="is being trained by process"):
                begin()
    assert (run / "last.state.safetensors").read_bytes() == before


def test_a_run_that_cannot_be_written_names_a_way_that_resume_takes(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It recommended another --output, which is refused beside --resume."""
    run = tmp_path / "run"
    fit(text, run)

    def refused(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mygpt.locks.open_descriptor", refused)
    with pytest.raises(StorageError, match="Permission denied: copy the run and resume the copy"):
        go_on(run, steps=20)


def test_two_that_begin_at_once(text: str, tmp_path: Path) -> None:
    """Both saw a free folder; the one that comes second to the lock sees the first's run."""
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
    assert course(run)["step"] == 12


def test_what_a_dead_run_left_is_cleared_at_the_next_start(text: str, tmp_path: Path) -> None:
    output = tmp_path / "ckpt.pt"
    fit(text, output)
    run = tmp_path / "ckpt.pt.run"
    from mygpt import storage

    mine, inside, foreign = (
        storage.temporary_name(path)
        for path in (output, run / "last.state.safetensors", tmp_path / "other.pt")
    )
    for path in (mine, inside, foreign):
        path.write_bytes(b"half")
    go_on(output, steps=14)
    assert not mine.exists()
    assert not inside.exists()
    assert foreign.exists(), "somebody else may be writing it"


def test_what_is_made_again_after_a_crash_is_told(text: str, tmp_path: Path) -> None:
    """Killed at step 11, a run went on from step 8 without a word."""

    def die(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 11:
            raise SystemError

    with pytest.raises(SystemError):
        mygpt.train(text, output=tmp_path / "run", listener=die, **TINY)
    assert "up to step 11, is made again" in notes(go_on(tmp_path / "run"))
    assert "is made again" not in notes(go_on(tmp_path / "run", steps=14))


# --- signals -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_signals_end_with_a_save_and_say_so(name: str, text: str, tmp_path: Path) -> None:
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"no {name} here")
    heard: list[Event] = []

    def listener(event: Event) -> None:
        heard.append(event)
        if isinstance(event, StepDone) and event.step == 6:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt) as left:
        mygpt.train(text, output=tmp_path / "run", listener=listener, **TINY)
    if number == signal.SIGINT:  # Python itself ends with 130 for this very class alone
        assert type(left.value) is KeyboardInterrupt
    else:
        assert isinstance(left.value, Interrupted)
        assert left.value.signal == number
    assert f"{name}: ending after this step" in notes(heard)
    assert course(tmp_path / "run")["step"] == 6


def test_a_signal_while_a_samples_kernels_are_compiled_skips_the_sample(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited for the compiler, ten seconds and more."""

    from mygpt.training import loop

    def compile_first(*_: object) -> str:
        with Abandonable():
            os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError

    monkeypatch.setattr(loop, "write_sample", compile_first)
    with pytest.raises(Interrupted):
        mygpt.train(text, output=tmp_path / "run", **{**TINY, "sample_tokens": 5})
    step = course(tmp_path / "run")["step"]
    assert 0 < step < TINY["steps"]
    assert not any("sample" in record for record in log(tmp_path / "run"))
    monkeypatch.undo()
    go_on(tmp_path / "run")
    assert course(tmp_path / "run")["step"] == TINY["steps"]


def test_an_ignored_signal_stays_ignored(text: str, tmp_path: Path) -> None:
    """`nohup mygpt train ...` outlives its terminal."""
    if not hasattr(signal, "SIGHUP"):
        pytest.skip("no SIGHUP here")

    def listener(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 6:
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        mygpt.train(text, output=tmp_path / "run", listener=listener, **TINY)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert course(tmp_path / "run")["step"] == 12


SLOW_STEP = """
import sys, threading, time
from mygpt.cli import main
from mygpt.training.gradients import Gradients
inner = Gradients._share
def slow(self, *args):
    if threading.current_thread() is not threading.main_thread():
        print("in a step", flush=True)
        time.sleep(60)
    return inner(self, *args)
Gradients._share = slow
Gradients.suitable_threads = staticmethod(lambda *_: 2)
main(["train", *sys.argv[1:]])
"""


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
        told = process.stderr.read()
    assert time.monotonic() - began < 10
    assert code == 128 + signal.SIGTERM
    assert told == (
        "left at once; go on from the last save with: mygpt train --resume runs/times\n"
    )
    assert course(tmp_path / "runs" / "times").get("step") == 0


# --- exactness -----------------------------------------------------------------------------


def test_the_number_of_threads_is_kept(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums are shared between threads: with another number they would round otherwise."""
    torch.set_num_threads(3)
    try:
        fit(text, tmp_path / "whole")
        with monkeypatch.context() as patch:
            stop_at(6, patch)
            fit(text, tmp_path / "run")
        torch.set_num_threads(1)
        go_on(tmp_path / "run")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    assert_same(tmp_path / "run", tmp_path / "whole")
    fit(text, tmp_path / "other")
    assert log(tmp_path / "other") != log(tmp_path / "whole"), "or this test would see nothing"


def test_a_longer_run_says_what_happens_to_its_schedule(text: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(text, run)
    assert "is finished, nothing to do: `mygpt report" in notes(go_on(run))
    heard = go_on(run, steps=24)
    assert "the schedule is stretched to 24 steps: the learning rate, " in notes(heard)
    rates = [r["lr"] for r in log(run) if "lr" in r]
    assert f"before, is {rates[12]:.3g} now" in notes(heard)
    settings = tomllib.loads((run / "config.toml").read_text())
    assert settings["training"]["steps"] == 24, "what people read says the same"


def test_new_minutes_count_what_the_sitting_takes_before_its_first_step(
    text: str, tmp_path: Path
) -> None:
    """Going on to a minute in all took as long as beginning it again, on top."""
    run = tmp_path / "run"
    fit(text, run)
    for spent_s, least_s in ((1.0, 1.0), (50.0, 2.0)):
        began = time.monotonic() - spent_s
        training.resume(run, minutes=4.0 * least_s / 60, began=began, listener=silent)
        kept = read_arrays(run / "last.state.safetensors")[1]["training"]
        assert least_s <= kept["reserve_s"] <= 2 * least_s, "and half of it at most"


def test_a_run_by_the_clock_can_be_made_again(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rates followed the clock; the plan it kept gives the same rates, losses and weights."""
    run, again = tmp_path / "run", tmp_path / "again"
    fit(text, run, steps=None, minutes=0.01, eval_every=50, save_every=0)
    training.replay(run, output=again, listener=silent)
    assert log(run) == log(again)
    ours, theirs = (read_arrays(r / "last.state.safetensors")[0] for r in (run, again))
    np.testing.assert_array_equal(ours["plan"], theirs.pop("given_plan"))
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    third = tmp_path / "third"
    with monkeypatch.context() as patch:
        stop_at(7, patch)
        training.replay(again, output=third, listener=silent)
    go_on(third)
    assert log(third) == log(run)


def test_a_run_that_was_lengthened_and_went_back_can_be_made_again(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps, then the clock, then steps again, and a blow-up on the way."""
    run, again = tmp_path / "run", tmp_path / "again"
    with monkeypatch.context() as patch:
        plant(patch, lambda n: math.nan if 7 <= n < 7 + LEFT_OUT_BEFORE_GOING_BACK else 1.0)
        fit(text, run)
    go_on(run, minutes=course(run)["elapsed_s"] / 60 + 0.002)
    go_on(run, steps=course(run)["step"] + 10)
    training.replay(run, output=again, listener=silent)
    ours, theirs = (read_arrays(r / "last.state.safetensors")[0] for r in (run, again))
    theirs.pop("given_plan")
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    losses = [{r["step"]: r["loss"] for r in log(r) if "loss" in r} for r in (run, again)]
    assert losses[0] == losses[1]


def test_a_run_of_an_older_version_cannot_be_made_again(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kept no plan of its steps"):
        training.replay(FORMAT_1, output=tmp_path / "again", listener=silent)
    assert not (FORMAT_1 / ".lock").exists()


def test_a_replay_needs_the_same_text(text: str, tmp_path: Path) -> None:
    fit(text, tmp_path / "run")
    Path(text).write_text("another")
    with pytest.raises(InputError, match="has changed"):
        training.replay(tmp_path / "run", output=tmp_path / "again", listener=silent)
    assert not (tmp_path / "again").exists()
