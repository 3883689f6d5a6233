"""A run's log and state as anybody may have written them: invalid records are ignored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mygpt import train
from mygpt.checkpoint.container import read_arrays, write_arrays
from mygpt.cli import main
from mygpt.cli.reproduce import read_losses
from mygpt.errors import CheckpointError
from mygpt.json_objects import LOG_LINE, read_records
from mygpt.training.checkpointing import read_state
from mygpt.training.history import read_log
from mygpt.training.run import RunFolder

ODD = [
    b'{"step": 1e999, "loss": 2.0}',
    b'{"step": -1, "loss": 2.0}',
    b'{"step": ' + b"9" * 400 + b', "loss": 2.0}',
    b'{"step": null, "val_loss": 2.0}',
    b'{"step": true, "val_loss": 2.0}',
    b'{"step": 3, "loss": 1' + b"0" * 400 + b"}",
    b'{"step": 3, "loss": 1e999}',
    b'{"step": 3, "loss": "2"' + b" " * 40 + b"}}",
    b'{"step": 3, "step": 4, "loss": 2.0}',
    b"[" * 9000,
    b'{"a":' * 9000 + b"1" + b"}" * 9000,
    b"\xff\xfe",
    b"",
    b"7",
    b'{"step": 3, "loss": 2.0, "x": "' + b"x" * LOG_LINE.most_bytes + b'"}',
    b'{"step": 3, "loss": 2.0, "x": [' + b"{}," * LOG_LINE.most_values + b"{}]}",
]
GOOD = [
    b'{"step": 1, "loss": 3.5, "lr": 0.1, "tokens": 9, "elapsed_s": 1}',
    b'{"step": 2, "val_loss": 3.25}',
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    (folder / "text.txt").write_text("the cat sat on the mat\n" * 60)
    train([folder / "text.txt"], output=folder / "run", steps=2, embed_dim=8, num_heads=1)
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("odd", ODD, ids=[str(line[:30]) for line in ODD])
def test_every_reader_of_a_log_ignores_invalid_records(tmp_path: Path, odd: bytes):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"\n".join([GOOD[0], odd, GOOD[1], b""]))
    assert [r for r in read_records(log) if r in map(json.loads, GOOD)] == list(
        map(json.loads, GOOD)
    )
    assert read_losses(log)[1, "loss"] == 3.5
    history = read_log(log)
    assert [report.loss for report in history.reports][:1] == [3.5]
    assert history.validations[-1].val_loss == 3.25
    log.write_bytes(GOOD[0] + b"\n" + odd + b"\n")
    assert "are repeated" in str(RunFolder.at(tmp_path).cut_log(0))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["report", "info", "doctor", "train --resume"])
def test_commands_on_a_run_with_an_odd_log_end_with_a_line(run: Path, capsys, command):
    """{"step": 1e999} was a traceback."""
    with open(run / "log.jsonl", "ab") as log:
        log.write(b"\n".join([*ODD, b""]))
    code = exit_code([*command.split(), str(run)])
    out, err = capsys.readouterr()
    assert code in (0, 2)
    assert "Traceback" not in out + err


def exit_code(args: list[str]) -> object:
    with pytest.raises(SystemExit) as ended:
        main(args)
    return ended.value.code


@pytest.mark.slow
@pytest.mark.parametrize("name", ["\ud800.txt", "a\0b"])
@pytest.mark.parametrize("place", ["files", "val_file", "encoding", "from"])
def test_a_state_with_an_impossible_file_name_is_refused(run: Path, name, place, capsys):
    """A lone surrogate in the names was a traceback."""
    path = run / "last.state.safetensors"
    arrays, parts = read_arrays(path)
    value = {"files": [name], "from": {"path": name, "sha256": "0" * 64}}.get(place, name)
    parts["settings"][place] = value
    parts.pop("tensors")
    write_arrays(path, arrays, parts)
    with pytest.raises(CheckpointError, match="cannot be the name of a file"):
        read_state(path)
    if place == "files":
        assert exit_code(["doctor", str(run)]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err
