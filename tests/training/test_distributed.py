"""Training in several processes equals training in one: gradients, losses, files, errors, kills.

Gradients are compared, since AdamW hides a wrong scale. What the processes do is in
`distributed_steps`; each launch of them serves several tests.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mygpt
from distributed_steps import (
    FIRST_STEPS,
    HUNDRED_STEPS,
    LENGTH,
    LIKE_TORCHRUN,
    SHARDED,
    THREE_STEPS,
    begin_and_fail,
    end_runs,
    take_steps,
)
from mygpt import training
from mygpt.checkpoint.container import read_arrays
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.training.state import read_state
from ranks import COUNTS, run_ranks
from torchruns import ranks_of, torchrun, torchrun_started
from training_runs import assert_arrays, log, silent

pytestmark = pytest.mark.processes

Found = dict[str, Any]


def distance(got: np.ndarray, want: np.ndarray) -> float:
    """Of two arrays, relative to the second one's norm."""
    apart = np.linalg.norm(got.astype(np.float64) - want.astype(np.float64))
    return float(apart / max(np.linalg.norm(want.astype(np.float64)), 1e-30))


def assert_near(got: dict[str, Any], want: dict[str, Any], within: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert np.linalg.norm(want[name]) > 0, name
        assert distance(got[name], want[name]) < within, name


@pytest.fixture(scope="module")
def groups() -> dict[int, list[Found]]:
    """What each process of 1, of 2 and of 4 found."""
    found = run_ranks(sum(COUNTS), take_steps, group=False, timeout_s=240)
    return {size: [f for f in found if f["group"].size == size] for size in COUNTS}


@pytest.mark.parametrize("case", FIRST_STEPS, ids=str)
def test_gradients_are_those_of_one_process(groups: dict[int, list[Found]], case: Any) -> None:
    """Within 1e-5 on 1, 2 and 4 processes, however they are summed and the batch is divided.

    4 processes that share 6 rows in pieces of one make 1 or 2 pieces each: under FSDP they
    once waited for each other's blocks out of step.
    """
    one = groups[1][0]["first step"][str(case)]
    for size in COUNTS[1:]:
        for found in groups[size]:
            several = found["first step"][str(case)]
            assert_near(several["gradients"], one["gradients"])
            assert several["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert several["norm"] == pytest.approx(one["norm"], rel=1e-5)


@pytest.mark.parametrize("case", THREE_STEPS, ids=str)
def test_updates_are_those_of_one_process(groups: dict[int, list[Found]], case: Any) -> None:
    """AdamW and Muon, each on the rows at hand, with decay and clipping."""
    one = groups[1][0]["weights"][str(case)]
    for size in COUNTS[1:]:
        for found in groups[size]:
            assert_near(found["weights"][str(case)], one)


@pytest.mark.parametrize("case", HUNDRED_STEPS, ids=str)
def test_losses_are_those_of_one_process_for_a_hundred_steps(groups, case) -> None:
    """Within 1e-3."""
    one = groups[1][0]["losses"][str(case)]
    assert one[-1] < 0.5 * one[0]
    for size in COUNTS[1:]:
        losses = [found["losses"][str(case)] for found in groups[size]]
        assert all(each == losses[0] for each in losses), "all ranks report the same"
        np.testing.assert_allclose(losses[0], one, atol=1e-3, rtol=0)


# Runs.

ARGUMENTS = [f"--{name.replace('_', '-')}={value}" for name, value in LIKE_TORCHRUN.items()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two texts."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "fox.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    (folder / "other.txt").write_text("the lazy dog jumps over the quick brown fox. " * 40)
    return folder


@pytest.fixture(scope="module")
def first(place: Path) -> list[Found]:
    """What 2 processes were refused; their runs are in `place`."""
    before = set(place.iterdir())
    found: list[Found] = run_ranks(2, begin_and_fail, place, place / "fox.txt", timeout_s=300)
    made = {path.name for path in set(place.iterdir()) - before}
    assert made == {"undisturbed", "sharded", "automatic", "worse", "apart"}
    shutil.copytree(place / "undisturbed", place / "begun")
    return found


def losses(run: Path) -> dict[int, float]:
    """The losses that were logged, each step once."""
    records = [record for record in log(run) if "loss" in record]
    found = {record["step"]: record["loss"] for record in records}
    assert len(found) == len(records)
    return found


def steps(run: Path) -> list[int]:
    return list(losses(run))


def weights(run: Path) -> dict[str, np.ndarray]:
    return dict(read_checkpoint(run / "last.safetensors").arrays)


def shards(run: Path) -> set[str]:
    return {path.name for path in run.glob("shards-*")}


def named_shards(run: Path) -> set[str]:
    """Those that the run's states name."""
    states = (read_state(run / f"{name}.state.safetensors") for name in ("last", "previous"))
    return {state.shards["folder"] for state in states if state.shards is not None}


def test_two_processes_make_one_run(first: list[Found], place: Path, tmp_path: Path) -> None:
    """Logged once; the losses are one process's; what it wrote writes."""
    assert [found["refused"]["nothing"] for found in first] == [None, None]
    run = place / "undisturbed"
    assert steps(run) == list(range(1, LENGTH + 1))
    assert {"best.safetensors", "last.safetensors"} <= {path.name for path in run.iterdir()}
    assert len(mygpt.load(run).generate("the ", max_new_tokens=20, seed=1)) >= 20
    assert read_checkpoint(run / "last.safetensors").provenance["processes"] == 2
    mygpt.train(place / "fox.txt", output=tmp_path / "alone", listener=silent, **LIKE_TORCHRUN)
    assert losses(run) == pytest.approx(losses(tmp_path / "alone"), abs=1e-3, rel=0)


def wait_for(condition: Any, process: subprocess.Popen[bytes], seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.005)


def kill_in_the_middle(run: Path, process: subprocess.Popen[bytes], number: int) -> None:
    """Kill -9 one of the processes once it has saved twice."""
    path = run / "log.jsonl"
    wait_for(lambda: path.exists() and len(path.read_bytes().splitlines()) > 50, process)
    os.kill(ranks_of(process)[number], signal.SIGKILL)


def test_a_killed_worker_costs_what_was_not_saved(first, place, tmp_path) -> None:
    """torchrun restarts all processes, they resume, and the weights are the undisturbed run's.

    The first process is the one whose store and files the others need.
    """
    run = place / "restarted"
    arguments = ("train", place / "fox.txt", "-o", run, "--resume", "auto", *ARGUMENTS)
    options = ("--max-restarts=2",)
    with torchrun_started(2, *arguments, into=tmp_path, options=options) as process:
        kill_in_the_middle(run, process, 0)
        assert process.wait(180) == 0, (tmp_path / "err").read_text()
    out = (tmp_path / "out").read_text()
    assert out.count("is a run already: resuming it") == 1
    assert out.count("2 processes (DDP, gloo)") == 2  # once in each life
    assert steps(run) == list(range(1, LENGTH + 1))
    assert_arrays(weights(run), weights(place / "undisturbed"))


@pytest.fixture(scope="module")
def killed(place: Path) -> tuple[float, str]:
    """A run of which the second process was killed; how long the first one took to end."""
    run = place / "killed"
    (place / "output").mkdir()
    arguments = ("train", place / "fox.txt", "-o", run, *ARGUMENTS)
    with torchrun_started(2, *arguments, into=place / "output") as process:
        kill_in_the_middle(run, process, 1)
        began = time.monotonic()
        process.wait(120)
        seconds = time.monotonic() - began
    assert process.returncode
    return seconds, (place / "output" / "err").read_text()


@pytest.fixture(scope="module")
def second(first: list[Found], killed: tuple[float, str], place: Path) -> list[Any]:
    """1 process resumes the runs, then 2."""
    assert shards(place / "sharded") == named_shards(place / "sharded")
    training.resume(place / "sharded", steps=24, listener=silent)
    training.resume(place / "begun", steps=LENGTH + 20, listener=silent)
    return run_ranks(2, end_runs, place, timeout_s=300)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("there already", r"mygpt: .*undisturbed already holds a run: resume it with --resume .*"),
        ("tutorial", r"mygpt: preset=tutorial draws its batches from one generator, .*"),
        ("too few", r"mygpt: batch_size=1 cannot be shared by 2 processes: choose at least 2"),
        ("stdin", r"mygpt: standard input cannot be read by 2 processes: name a file"),
        ("what cannot change", r"mygpt: lr=1.0 cannot change when a run is resumed, .*"),
    ],
)
def test_an_error_is_printed_once(first: list[Found], name: str, said: str) -> None:
    """By the first process, in a line; the others end with the same exit code, and silent."""
    (code, out, err), (other_code, *other) = (found["refused"][name] for found in first)
    assert re.fullmatch(said + "\n", err), err
    assert out == ""
    assert other == ["", ""]
    assert code == other_code == 2


def test_a_missing_file_is_one_line_among_torchruns(place: Path, tmp_path: Path) -> None:
    done = torchrun(2, "train", place / "nowhere.txt", "-o", tmp_path / "run")
    assert done.returncode
    errors = [line for line in done.stderr.splitlines() if "mygpt:" in line]
    assert len(errors) == 1
    assert errors[0].startswith("mygpt: ")
    assert "nowhere.txt" in errors[0]
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_a_process_with_another_text_names_itself(first: list[Found]) -> None:
    errors = [found["another text"] for found in first]
    assert errors[0] == "PeerError: "
    assert errors[1].startswith(f"InputError: process 1 of 2 on {socket.gethostname()}: ")
    assert "other is another text here than in process 0" in errors[1]


def test_several_processes_resume_the_run_in_their_output(first: list[Found]) -> None:
    """The same command resumes it; other options, or a run elsewhere, are refused in one line."""
    main, other = (found["automatic"] for found in first)
    for name in ("begun", "again"):
        assert main[name][0] is other[name][0] is None
        resumed = any("is a run already: resuming it" in note for note in main[name][1])
        assert resumed == (name == "again")
    said = "lr=0.5 cannot change when a run is resumed, and this one has 0.001"
    assert said in main["other options"][0]
    assert "is a run on another machine and is not here: output" in main["elsewhere"][0]
    assert other["other options"][0] == "PeerError: "


def test_a_sharded_run_with_a_rising_validation_loss_continues(
    first: list[Found], place: Path
) -> None:
    """A validation leaves some weights gathered: process 0 alone wrote a sample then, and all
    hung. At a step that is saved anyway, the newest model was not gathered at the end.
    """
    assert [found["worse"] for found in first] == [None, None]
    records = log(place / "worse")
    losses = [record["val_loss"] for record in records if "val_loss" in record]
    assert losses != sorted(losses, reverse=True), "none got worse: nothing was tried"
    assert not any("sample" in record for record in records)
    assert read_checkpoint(place / "worse" / "last.safetensors").provenance["step"] == 10


def test_a_sharded_run_needs_one_folder_for_all(first: list[Found]) -> None:
    """On machines of their own every save succeeded, and none could be loaded."""
    errors = [found["apart"] for found in first]
    assert errors[0] == "PeerError: "
    assert "was made by process 0 and is not here: output must be a folder" in errors[1]


def test_a_run_resumes_with_any_number_of_processes(second: list[Any], place: Path) -> None:
    """Begun by 2, 20 steps more by 1, 20 more by 2: each step once in the log."""
    assert [found[1][0] for found in second] == [None, None]
    assert steps(place / "begun") == list(range(1, LENGTH + 41))
    assert read_checkpoint(place / "begun" / "last.safetensors").provenance["sittings"] == 3


def test_a_sharded_run_resumes_with_any_number_of_processes(second, place, tmp_path) -> None:
    """Started by 2, resumed by 1 and by 2: the weights are those of one process's run.

    No folder stays that neither the last state nor the one before it names.
    """
    run = place / "sharded"
    assert [found[0][0] for found in second] == [None, None]
    assert steps(run) == list(range(1, 29))
    assert shards(run) == named_shards(run)
    assert len(shards(run)) >= 1
    options = {**SHARDED, "steps": 28}
    mygpt.train(place / "fox.txt", output=tmp_path / "alone", listener=silent, **options)
    assert_near(weights(run), weights(tmp_path / "alone"), within=1e-3)
    whole, parts = read_arrays(run / "last.state.safetensors")
    assert not any(name.startswith("model/") for name in whole)
    assert parts["shards"]["folder"] in shards(run)


def test_a_process_that_lost_the_other_one_ends_and_the_run_resumes(killed, second, place) -> None:
    """Without restarts: no process waits forever, no traceback of mygpt, and nothing is lost."""
    seconds, err = killed
    assert seconds < 30
    assert "PeerError" not in err
    assert "mygpt/training/" not in err  # as in a traceback of ours
    assert [found[2][0] for found in second] == [None, None]
    assert steps(place / "killed") == list(range(1, LENGTH + 1))
    assert_arrays(weights(place / "killed"), weights(place / "undisturbed"))
