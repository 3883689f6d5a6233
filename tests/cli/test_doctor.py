"""`mygpt doctor`: all kinds of damage are reported by name with a remedy; nothing is changed."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mygpt
from mygpt.checkpoint import container
from mygpt.checkpoint.locks import RunLock
from mygpt.checkpoint.model_file import read_checkpoint, write_checkpoint
from mygpt.cli import doctor as environment
from mygpt.cli.doctor import Environment, Torch, advice
from mygpt.errors import CheckpointError
from mygpt.training import checkup, replay
from mygpt.training.checkup import Finding, check
from mygpt.training.run import RunFolder
from mygpt.views.report import write_report
from shell import Shell

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
STATE, PREVIOUS = "last.state.safetensors", "previous.state.safetensors"
BEST, LAST = "best.safetensors", "last.safetensors"
FILES = [STATE, PREVIOUS, BEST, LAST, "config.toml", "log.jsonl"]


def train(output: Path) -> None:
    text = output.with_name("fox.txt")
    text.write_text(TEXT)
    mygpt.train(
        text,
        output=output,
        preset="nano",
        embed_dim=16,
        num_layers=2,
        max_seq_len=16,
        batch_size=4,
        steps=12,
        print_every=2,
        eval_every=5,
        save_every=5,
        sample_tokens=0,
        engine="torch",  # machine code would be compiled, also for the fast tests
        listener=lambda event: None,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, and one beside its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder / "run")
    train(folder / "ckpt.pt")
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage, in the folder of the working directory."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return Path(shutil.copytree(trained, tmp_path / "runs"))


@pytest.fixture
def run(place: Path) -> Path:
    return place / "run"


def by_name(found: list[Finding]) -> dict[str, Finding]:
    names = {one.file.name: one for one in found}
    assert len(names) == len(found), "a line a file"
    return names


def wrong(found: list[Finding]) -> dict[str, str]:
    return {name: one.verdict for name, one in by_name(found).items() if one.verdict != "ok"}


def flip(path: Path, place: int = -9) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change arrays and parts and give them digests that match."""
    arrays, parts = container.read_arrays(path)
    change(arrays, parts)
    container.write_arrays(path, arrays, parts)


# --- files ---------------------------------------------------------------------------------


def test_every_file_of_a_healthy_run_is_reported(run: Path) -> None:
    found = by_name(check(run))
    assert list(found) == [*FILES, "run"]
    assert wrong(check(run)) == {}
    assert not any(one.remedy for one in found.values())
    size = (run / STATE).stat().st_size
    state = rf"{size:,} bytes, step 12, loss \d\.\d{{4}}, best validation loss \d\.\d{{4}} at step"
    assert re.match(state, found[STATE].text)
    assert ", step 10, loss" in found[PREVIOUS].text
    assert re.search(r", step 1\d?, loss \d\.\d+, validation loss \d\.\d{4}$", found[BEST].text)
    assert re.search(r", step 12, loss \d\.\d{4}$", found[LAST].text)
    lines = (run / "log.jsonl").read_text().count("\n")
    assert found["log.jsonl"].text.endswith(f" bytes, {lines} records")
    assert found["run"].text == "no process trains it"


@pytest.mark.parametrize("name", ["ckpt.pt", "ckpt.pt.run"])
def test_the_users_own_file_belongs_to_its_run(place: Path, name: str) -> None:
    found = check(place / name)
    assert [one.file.name for one in found] == [*FILES[:4], "ckpt.pt", *FILES[4:], "ckpt.pt.run"]
    assert wrong(found) == {}
    assert by_name(found)["ckpt.pt"].text == by_name(found)[BEST].text


REMEDIES = {
    STATE: r"`mygpt train --resume \S+/ckpt.pt` resumes from previous.state.saf\S+ \(step 10\)",
    PREVIOUS: r"nothing is lost: the next save replaces it",
    BEST: r"the same model: cp \S+/ckpt.pt \S+/best.safetensors",
    LAST: r"`mygpt train --resume \S+/ckpt.pt` writes the newest model again",
    "ckpt.pt": r"the same model: cp \S+/best.safetensors \S+/ckpt.pt",
}


@pytest.mark.parametrize("harm", [flip, cut])
@pytest.mark.parametrize("name", REMEDIES)
def test_a_damaged_file_is_named_with_its_tensor_and_remedy(
    place: Path, name: str, harm: Callable[[Path], None]
) -> None:
    path = place / name if name == "ckpt.pt" else place / "ckpt.pt.run" / name
    harm(path)
    found = check(place / "ckpt.pt")
    assert wrong(found) == {name: "damaged"}
    one = by_name(found)[name]
    assert re.match(REMEDIES[name], one.remedy)
    assert str(path) not in one.text
    if harm is cut:
        assert "truncated" in one.text
    else:
        assert re.match(r"tensor \S+ does not match its digest", one.text)


def test_what_the_remedy_for_a_state_says_is_what_resuming_does(run: Path) -> None:
    flip(run / STATE)
    state, note = RunFolder.at(run).load_state()
    assert state.path == run / PREVIOUS
    assert f"step {state.progress.step})" in by_name(check(run))[STATE].remedy
    assert note is not None
    assert by_name(check(run))["log.jsonl"].text.endswith(" newer than the state")


def test_without_the_best_the_newest_model_is_to_be_used(run: Path) -> None:
    """Where `--output` named a folder nobody else has the best model."""
    flip(run / BEST)
    remedy = f"use the newest model: `mygpt generate --checkpoint {run / LAST}`"
    assert by_name(check(run))[BEST].remedy == remedy
    (run / BEST).unlink()
    assert by_name(check(run))[BEST].remedy == remedy


def test_without_a_good_state_a_model_can_still_write(run: Path) -> None:
    flip(run / STATE)
    flip(run / PREVIOUS)
    found = by_name(check(run))
    assert found[STATE].remedy.endswith(f"`mygpt generate --checkpoint {run / BEST}`")
    flip(run / BEST)
    found = by_name(check(run))
    assert found[STATE].remedy.endswith(f"`mygpt generate --checkpoint {run / LAST}`")
    flip(run / LAST)
    found = by_name(check(run))
    assert "cannot be resumed" in found[STATE].remedy
    assert found[LAST].remedy == found[BEST].remedy == "restore it from a copy"


@pytest.mark.parametrize(
    ("name", "verdict", "text"),
    [
        (STATE, "warning", "is missing"),
        (PREVIOUS, None, ""),  # a run that was saved once has none
        (BEST, "warning", r"is missing: step \d+ was the best"),
        (LAST, "warning", "is missing"),
        ("ckpt.pt", "warning", "is missing"),
        ("config.toml", "warning", "is missing"),
        ("log.jsonl", "damaged", r"is missing: it had [\d,]+ bytes when the state was"),
    ],
)
def test_a_missing_file_is_reported(place: Path, name: str, verdict: str | None, text: str) -> None:
    path = place / name if name == "ckpt.pt" else place / "ckpt.pt.run" / name
    path.unlink()
    found = check(place / "ckpt.pt")
    assert wrong(found) == ({} if verdict is None else {name: verdict})
    if verdict is not None:
        assert re.match(text, by_name(found)[name].text)
        assert by_name(found)[name].remedy


def test_a_model_behind_its_state_is_reported(run: Path) -> None:
    """A crash between the two: the state is newer than what `generate` would take."""
    rewrite(run / LAST, lambda arrays, parts: parts["provenance"].update(step=10))
    assert wrong(check(run)) == {LAST: "warning"}
    assert "behind the state (step 12)" in by_name(check(run))[LAST].text
    with RunLock(run):  # a training is about to write it
        assert wrong(check(run)) == {}


def test_the_users_own_file_behind_the_best_is_reported(place: Path) -> None:
    rewrite(place / "ckpt.pt", lambda arrays, parts: parts["provenance"].update(step=1))
    with RunLock(place / "ckpt.pt.run"):  # a training is about to write it
        assert wrong(check(place / "ckpt.pt")) == {}
    found = by_name(check(place / "ckpt.pt"))["ckpt.pt"]
    assert found.verdict == "warning"
    assert re.search(r"best.safetensors is of step 1\d?, a save was cut short", found.text)


def test_files_of_an_earlier_run_are_reported(run: Path) -> None:
    """An --overwrite that was cut short after its first state."""
    rewrite(run / BEST, lambda arrays, parts: parts["provenance"].update(run_id="0123"))
    assert wrong(check(run)) == {BEST: "warning"}
    assert by_name(check(run))[BEST].text.endswith(": of an earlier run")


def put_nan(arrays: dict[str, Any], parts: dict[str, Any]) -> None:
    name = next(name for name in arrays if "token" in name and "optimizer" not in name)
    arrays[name] = np.full_like(arrays[name], np.nan)


def drop_last(arrays: dict[str, Any], parts: dict[str, Any]) -> None:
    name = next(name for name in arrays if "token" in name and "optimizer" not in name)
    arrays[name] = arrays[name][:-1]


@pytest.mark.parametrize("name", [STATE, LAST])
@pytest.mark.parametrize(
    ("harm", "text"),
    [(put_nan, r"tensor \S+ has infinite or NaN values"), (drop_last, r"tensor \S+ has sh")],
)
def test_digests_that_match_are_not_enough(
    run: Path, name: str, harm: Callable[[dict[str, Any], dict[str, Any]], None], text: str
) -> None:
    rewrite(run / name, harm)
    assert wrong(check(run)) == {name: "damaged"}
    assert re.search(text, by_name(check(run))[name].text)


def test_a_tokenizer_of_another_model_is_reported(run: Path) -> None:
    found, other = read_checkpoint(run / LAST), mygpt.CharTokenizer.from_text("abc")
    write_checkpoint(run / LAST, found.arrays, found.config, other, found.provenance)
    assert wrong(check(run))[LAST] == "damaged"
    assert "its tokenizer has 3 tokens" in by_name(check(run))[LAST].text


def test_files_with_ngram_tables_are_reported_as_of_another_version(run: Path) -> None:
    """The remedy was to restore a copy, but the files are intact."""
    for name in (STATE, PREVIOUS, BEST, LAST):
        rewrite(run / name, lambda arrays, parts: parts["config"].update(ngram_rows=[64]))
    assert wrong(check(run)) == dict.fromkeys((STATE, PREVIOUS, BEST, LAST), "warning")
    for found in (by_name(check(run))[STATE], *check(shutil.copy(run / BEST, run.parent / "x"))):
        text = "was made by a version with n-gram input tables and cannot be loaded"
        remedy = "train it again, or use the mygpt version that wrote it"
        assert (found.text, found.remedy) == (text, remedy)


def test_a_state_under_a_models_name_is_reported(run: Path) -> None:
    shutil.copy(run / STATE, run / LAST)
    assert wrong(check(run)) == {LAST: "damaged"}
    shutil.copy(run / BEST, run / STATE)
    assert wrong(check(run))[STATE] == "damaged"


def test_settings_that_do_not_parse_are_reported(run: Path) -> None:
    (run / "config.toml").write_text("files = [\n")
    assert wrong(check(run)) == {"config.toml": "damaged"}
    assert by_name(check(run))["config.toml"].text.startswith("is not TOML: ")
    (run / "config.toml").write_bytes(b"\xff\xfe")
    assert wrong(check(run)) == {"config.toml": "damaged"}


def test_a_file_larger_than_memory_is_not_checked(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (run / BEST).stat().st_size
    monkeypatch.setattr("mygpt.machine.free_memory_bytes", lambda: size)
    found = by_name(check(run))
    assert wrong(list(found.values())) == {STATE: "warning", PREVIOUS: "warning"}
    assert found[STATE].text.startswith("not checked: ")
    assert found[STATE].remedy == "close other programs, then check again"


def test_too_little_space_for_the_next_save_is_reported(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = sum((run / name).stat().st_size for name in (STATE, LAST))
    usage = shutil.disk_usage(run)
    for free, warned in ((need - 1, True), (need, False)):
        monkeypatch.setattr(
            checkup.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free)
        )
        found = [one for one in check(run) if one.verdict == "warning"]
        assert [f"a save takes {need:,}" in one.text for one in found] == [True] * warned


def test_leftovers_are_reported_unless_a_training_may_need_them(place: Path) -> None:
    run = place / "ckpt.pt.run"
    with RunLock(run):
        pass
    stray = run / ".mygpt-0123abcd-456789.tmp"
    stray.write_bytes(b"half")
    damaged = run / f"damaged.{STATE}"
    damaged.write_bytes(b"")
    assert wrong(check(run)) == {stray.name: "warning", damaged.name: "warning"}
    assert by_name(check(run))[stray.name].text == "4 bytes of a save that was cut short"
    with RunLock(run):
        assert wrong(check(run)) == {}
        assert f"trained now by process {os.getpid()}" in by_name(check(run))[run.name].text


# --- the log -------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[list[bytes]], None]) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    change(lines)
    path.write_bytes(b"".join(lines))


def garble(lines: list[bytes]) -> None:
    lines[2] = b"\0" * (len(lines[2]) - 1) + b"\n"


def listed(lines: list[bytes]) -> None:
    for number in (2, 4):
        lines[number] = b"[" + b" " * (len(lines[number]) - 3) + b"]\n"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (garble, "line 3 is not a JSON object"),
        (listed, r"line 3 is not a JSON object \(and 1 more\)"),
        (lambda lines: lines.pop(), r"has [\d,]+ bytes, not [\d,]+ as at the last save: its end"),
        (
            lambda lines: lines.__setitem__(-1, lines[-1][:-1]),
            r"has [\d,]+ bytes, not [\d,]+ as at",
        ),
        (lambda lines: lines.insert(0, b"{}\n"), r"line \d+ is not a JSON object"),
    ],
)
def test_a_damaged_log_is_reported_with_its_line(
    run: Path, change: Callable[[list[bytes]], None], text: str
) -> None:
    edit(run / "log.jsonl", change)
    assert wrong(check(run)) == {"log.jsonl": "damaged"}
    assert re.match(text, by_name(check(run))["log.jsonl"].text)


def test_a_log_may_run_ahead_of_its_state(run: Path) -> None:
    """What a killed training had logged since its last save is dropped by --resume."""
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 14, "loss": 1.0}\n')
    assert wrong(check(run)) == {}
    assert by_name(check(run))["log.jsonl"].text.endswith(", 1 of them newer than the state")
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 1')
    assert wrong(check(run)) == {"log.jsonl": "warning"}
    found = by_name(check(run))["log.jsonl"]
    assert re.match(r"\d+ bytes after the last save are not all records", found.text)
    assert found.remedy == f"`mygpt train --resume {run}` drops them"


# --- single files, and what is none ---------------------------------------------------------


@pytest.mark.parametrize("name", [BEST, STATE])
def test_a_single_file_is_checked_by_its_content(run: Path, tmp_path: Path, name: str) -> None:
    alone = tmp_path / "alone"
    shutil.copy(run / name, alone)
    (found,) = check(alone)
    assert (found.file, found.verdict) == (alone, "ok")
    assert ", step 1" in found.text
    flip(alone)
    (found,) = check(alone)
    assert found.verdict == "damaged"
    assert found.text.startswith("tensor ")
    assert "restore it from a copy" in found.remedy
    flip(run / name)
    (found,) = check(run / name)
    assert found.remedy == f"`mygpt doctor {run}` shows what else is in its run"


def test_what_is_no_checkpoint_is_reported(tmp_path: Path) -> None:
    for content, text in (
        (pickle.dumps([1]), "not a mygpt checkpoint"),
        (b"Call me Ishmael. Some years ago", "not a mygpt checkpoint"),
        (b"", "truncated"),
    ):
        (tmp_path / "x.pt").write_bytes(content)
        (found,) = check(tmp_path / "x.pt")
        assert found.verdict == "damaged"
        assert text in found.text


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere does not exist: name a run's folder"):
        check(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no run"):
        check(tmp_path)


# --- the environment ------------------------------------------------------------------------

GIB = 2**30
TORCH = Torch("2.13.0", "CPU", "AVX2", 8, (), "")
HEALTHY = Environment(
    python="3.12.1",
    system="Linux 6.1, x86_64",
    cpu="A CPU",
    vectors=("avx2", "fma"),
    threads=16,
    cores=8.0,
    quota=None,
    load=0.2,
    memory_bytes=16 * GIB,
    free_memory_bytes=9 * GIB,
    mygpt="0.1.0",
    torch=TORCH,
    torch_error="",
    numba="0.61.0",
    compiled=True,
    cache="/home/u/.cache/mygpt",
    cache_writable=True,
    disk_free_bytes=99 * GIB,
    nvidia=False,
    variables={},
)


@pytest.mark.parametrize(
    "here",
    [
        HEALTHY,
        replace(HEALTHY, cache_writable=False),  # what is kept there is enough
        replace(HEALTHY, system="Darwin 23", cores=10.0),  # torch leaves slow cores out
        replace(HEALTHY, torch=replace(TORCH, threads=16)),  # two on a core
        replace(HEALTHY, variables={"OMP_NUM_THREADS": "8"}),
        replace(HEALTHY, variables={"NUMBA_DISABLE_JIT": "0"}, load=30.0),
        replace(HEALTHY, cores=1.5, quota=1.5, torch=replace(TORCH, threads=2)),
        replace(HEALTHY, nvidia=True, torch=replace(TORCH, devices=(("H200", 1),))),
        replace(HEALTHY, memory_bytes=None, free_memory_bytes=None, load=None),
    ],
)
def test_nothing_wrong_gives_no_advice(here: Environment) -> None:
    assert list(advice(here)) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"torch": replace(TORCH, threads=1)},
            "threads of torch: 1, cores of this process: 8: export OMP_NUM_THREADS=8",
        ),
        (
            {"cores": 1.5, "quota": 1.5},
            "threads of torch: 8, cores of this process: 2: export OMP_NUM_THREADS=2",
        ),
        (
            {"torch": replace(TORCH, threads=64)},
            "threads of torch: 64, cores of this process: 8: export OMP_NUM_THREADS=8",
        ),
        (
            {"compiled": False},
            "the decoding loop is not compiled: run `mygpt warmup` once, it takes 15 seconds",
        ),
        (
            {"compiled": False, "cache_writable": False},
            "/home/u/.cache/mygpt is not writable, so each start compiles the decoding loop: "
            "set MYGPT_CACHE to a writable folder",
        ),
        (
            {"numba": None},
            "the NumPy engine is used instead of machine code, which needs Numba on a 64-bit "
            "POSIX system (on Windows: WSL): pip install numba",
        ),
        (
            {"torch": None, "torch_error": "libgomp.so.1 is missing"},
            "torch cannot be imported (libgomp.so.1 is missing): reinstall it",
        ),
        (
            {"nvidia": True},
            "there is an NVIDIA GPU, but torch is the CPU build: install the CUDA build "
            "(https://pytorch.org/get-started/locally/)",
        ),
        (
            {
                "nvidia": True,
                "torch": replace(TORCH, build="CUDA 12.8"),
                "variables": {"CUDA_VISIBLE_DEVICES": ""},
            },
            "CUDA_VISIBLE_DEVICES hides the GPU: unset it",
        ),
        (
            {"nvidia": True, "torch": replace(TORCH, build="CUDA 12.8", problem="too old")},
            "torch cannot use the NVIDIA GPU: update its driver (too old)",
        ),
        (
            {"free_memory_bytes": GIB // 4},
            "268.4 MB of memory is free: close other programs, or use a smaller model",
        ),
        (
            {"disk_free_bytes": GIB // 2},
            "536.8 MB of disk is free where runs/ is: delete files, or train with --output on "
            "another disk",
        ),
    ],
)
def test_what_is_wrong_gets_one_line_with_its_remedy(changes: dict[str, Any], line: str) -> None:
    assert list(advice(replace(HEALTHY, **changes))) == [line]


# --- the command ----------------------------------------------------------------------------


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """On a healthy machine; the real one is checked in another process."""
    monkeypatch.setattr(environment, "inspect_environment", lambda: HEALTHY)
    monkeypatch.setattr("mygpt.machine.memory_bandwidth", lambda budget_s: 31.44)
    monkeypatch.setattr("mygpt.machine.gemm_rate", lambda budget_s: 456.78)
    return Shell(capsys, "doctor")


def test_a_healthy_run_ends_with_no_problems_found(doctor: Shell, run: Path) -> None:
    code, out, err = doctor(run)
    assert (code, err) == (0, "")
    assert "cores:       8 usable, 16 hardware threads; load 0.2\n" in out
    assert "torch:       2.13.0 (CPU build, AVX2, 8 threads)\n" in out
    speeds = "memory bandwidth (GB/s) 31.4, float32 matrix products (GFLOP/s) 456.8"
    assert f"speed:       {speeds}\n" in out
    assert re.search(r"^last\.state\.safetensors      ok       [\d,]+ bytes, step 12,", out, re.M)
    assert out.endswith("\n\nno problems found\n")


def test_damage_is_shown_with_its_remedy_and_exit_code_2(doctor: Shell, run: Path) -> None:
    flip(run / STATE)
    code, out, _ = doctor(run, "--no-probe")
    assert code == 2
    remedy = rf"`mygpt train --resume {run}` resumes from previous.state.safetensors \(step 10\)"
    name = r"^last\.state\.safetensors      damaged  tensor \S+ does not match its digest\n"
    assert re.search(rf"{name} +{remedy}$", out, re.M)
    assert "speed:" not in out
    assert "no problems found" not in out


def test_advice_alone_is_exit_code_0(doctor: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        environment, "inspect_environment", lambda: replace(HEALTHY, compiled=False)
    )
    code, out, _ = doctor()
    assert code == 0
    assert "\n\nadvice:      the decoding loop is not compiled: run `mygpt warmup`" in out
    assert "no problems found" not in out


def test_json_contains_everything(doctor: Shell, run: Path) -> None:
    flip(run / BEST)
    code, out, _ = doctor(run, "--json")
    printed = json.loads(out)
    assert code == 2
    assert set(printed) == {"environment", "probe", "advice", "files"}
    assert printed["environment"]["torch"]["threads"] == 8
    assert printed["probe"] == {"memory_gb_per_s": 31.44, "float32_gflop_per_s": 456.78}
    verdicts = {Path(one["file"]).name: one["verdict"] for one in printed["files"]}
    assert verdicts == {**dict.fromkeys((*FILES, "run"), "ok"), BEST: "damaged"}


def test_a_wrong_path_is_refused_before_anything_is_shown(doctor: Shell) -> None:
    message = doctor.refused("nowhere")
    assert message == "mygpt: nowhere does not exist: name a run's folder or a checkpoint\n"


def test_torch_that_cannot_be_imported_is_reported(
    doctor: Shell, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found, error = environment._inspect_torch()
    assert found is None
    assert "torch" in error
    broken = replace(HEALTHY, torch=None, torch_error=error)
    monkeypatch.setattr(environment, "inspect_environment", lambda: broken)
    code, out, _ = doctor()
    assert code == 0
    assert f"torch:       cannot be imported: {error}\n" in out
    assert "speed:" not in out
    code, out, err = doctor(run)
    assert (code, out) == (2, "")
    assert "is not checked, because torch cannot be imported" in err


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.stat().st_mode,
            b"" if path.is_dir() else path.read_bytes(),
        )
        for path in sorted([folder, *folder.rglob("*")])
    }


@pytest.mark.processes
@pytest.mark.parametrize("damaged", [[], [STATE, "log.jsonl"], [STATE, PREVIOUS, BEST, LAST]])
def test_nothing_is_ever_changed(place: Path, damaged: list[str]) -> None:
    """The real command, probe and all, in a working directory and with a cache of its own."""
    run = place / "ckpt.pt.run"
    for name in damaged:
        flip(run / name)
    (run / ".mygpt-0123abcd-456789.tmp").write_bytes(b"half")
    before = snapshot(place.parent)
    env = {**os.environ, "MYGPT_CACHE": str(place.parent / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mygpt", "doctor", str(place / "ckpt.pt"), "--json"]
    command += ["--no-probe"] * bool(damaged)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == (2 if damaged else 0), done.stderr
    assert snapshot(place.parent) == before
    printed = json.loads(done.stdout)
    here = printed["environment"]
    assert here["mygpt"] == mygpt.__version__
    assert here["variables"]["OMP_NUM_THREADS"] == "1"
    assert here["torch"]["threads"] == 1
    assert here["cores"] >= 0.5
    assert (here["compiled"], here["cache_writable"]) == (False, True)
    assert any("`mygpt warmup`" in line for line in printed["advice"])
    assert all(value > 0 for value in printed["probe"].values())
    assert len(printed["probe"]) == (0 if damaged else 2 + bool(here["torch"]["devices"]))


# --- files that are none -------------------------------------------------------------------

NAMES = [*FILES, "report.html", ".lock"]


def become(path: Path, kind: str, victim: Path) -> None:
    """Put a link or a pipe where a file is."""
    path.unlink(missing_ok=True)
    path.symlink_to(victim) if kind == "link" else os.mkfifo(path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_link_or_a_pipe_in_a_run_is_named_and_nothing_is_written(
    place: Path, run: Path, kind: str, name: str
) -> None:
    """Report and --resume wrote through links to the user's files; pipes waited for ever."""
    if kind == "pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names")
    victim = place / "victim"
    victim.write_bytes(b"precious")
    become(run / name, kind, victim)
    before = {path.name: path.lstat().st_mtime_ns for path in run.iterdir()}
    what = (
        "is a symbolic link" if kind == "link" else "is a device or a pipe, and a file is expected"
    )
    for action in (
        lambda: write_report(run, overwrite=True),
        lambda: mygpt.training.resume(run, steps=14, listener=lambda event: None),
        lambda: replay(run, output=place / "again", listener=lambda event: None),
    ):
        with pytest.raises(CheckpointError, match=f"{re.escape(name)} {what}"):
            action()
    assert what.removeprefix("is ") in by_name(check(run))[name].text
    assert victim.read_bytes() == b"precious"
    assert {path.name: path.lstat().st_mtime_ns for path in run.iterdir()} == before
    assert not (place / "again").exists()


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_new_training_refuses_a_folder_whose_lock_is_not_a_file(
    tmp_path: Path, kind: str
) -> None:
    """A clone with a link runs/poems/.lock: plain `mygpt train poems.txt` emptied its target."""
    if kind == "pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names")
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "run").mkdir()
    become(tmp_path / "run/.lock", kind, victim)
    with pytest.raises(CheckpointError, match=r"\.lock is"):
        train(tmp_path / "run")
    assert victim.read_bytes() == b"precious"
    assert os.listdir(tmp_path / "run") == [".lock"]


def test_a_folder_of_shards_that_is_a_link_is_neither_read_nor_emptied(
    place: Path, run: Path
) -> None:
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "__0_0.distcp").write_bytes(b"precious")
    (run / "shards-00000001-aaaaaaaa").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="shards-00000001-aaaaaaaa is a symbolic link"):
        mygpt.training.resume(run, steps=14, listener=lambda event: None)
    assert (elsewhere / "__0_0.distcp").read_bytes() == b"precious"


def test_a_run_folder_that_is_itself_a_link_may_be_named(place: Path, run: Path) -> None:
    (place / "named").symlink_to(run)
    mygpt.training.resume(place / "named", steps=14, listener=lambda event: None)
    assert check(run)[0].text.startswith(f"{(run / STATE).stat().st_size:,} bytes, step 14")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_or_a_device_that_is_named_is_called_so(tmp_path: Path) -> None:
    """It was said not to exist."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(CheckpointError, match="is a device or a pipe, and a file is expected"):
            check(path)
