"""A run's log and state as anybody may have written them: invalid records are ignored."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mygpt.checkpoint.container import read_arrays, write_arrays
from mygpt.cli import main
from mygpt.cli.reproduce import read_losses
from mygpt.json_objects import LOG_LINE, read_records
from mygpt.training.history import Validation, diagnose, read_log
from mygpt.training.run import RunFolder
from mygpt.training.state import read_state
from training_runs import Runs, refusal

ODD = [
    b'{"step": 1e999, "loss": 2.0}',
    b'{"step": -1, "loss": 2.0}',
    b'{"step": ' + b"9" * 400 + b', "loss": 2.0}',
    b'{"step": null, "val_loss": 2.0}',
    b'{"step": true, "val_loss": 2.0}',
    b'{"step": "x", "val_loss": 2.0}',
    b'{"val_loss": 2.0}',
    b'{"step": 3, "loss": 1' + b"0" * 400 + b"}",
    *(b'{"step": 3, "%s": %s}' % (kind, value)
      for kind in (b"loss", b"val_loss") for value in (b"1e999", b'"two"', b"null", b"NaN")),
    b'{"step": 3, "loss": "2"' + b" " * 40 + b"}}",
    b'{"step": 3, "step": 4, "loss": 2.0}',
    b'{"step": 3, "lo',
    b"[" * 9000,
    b'{"a":' * 9000 + b"1" + b"}" * 9000,
    b"\xff\xfe\x00",
    b"\x00" * 40,
    b"",
    b"7",
    b"null",
    b"[1, 2]",
    b'"a loss in words"',
    b'{"step": 3, "loss": 2.0, "x": "' + b"x" * LOG_LINE.most_bytes + b'"}',
    b'{"step": 3, "loss": 2.0, "x": [' + b"{}," * LOG_LINE.most_values + b"{}]}",
]  # fmt: skip
GOOD = [
    b'{"step": 50, "loss": 2.5, "lr": 0.1, "tokens": 9, "elapsed_s": 1}',
    b'{"step": 100, "val_loss": 2.4}',
    b'{"step": 150, "loss": 1.5}',
    b'{"step": 200, "val_loss": 1.4}',
]


@pytest.mark.parametrize("odd", ODD, ids=[str(line[:30]) for line in ODD])
def test_every_reader_of_a_log_ignores_invalid_records(tmp_path: Path, odd: bytes) -> None:
    """The diagnosis comes at the very end of a run: no log may make it fail."""
    log = tmp_path / "log.jsonl"
    good = [json.loads(line) for line in GOOD]
    for place in range(len(GOOD) + 1):
        log.write_bytes(b"\n".join([*GOOD[:place], odd, *GOOD[place:], b""]))
        assert [record for record in read_records(log) if record in good] == good
        assert read_losses(log)[50, "loss"] == 2.5
        found = read_log(log)
        assert found.reports[0].loss == 2.5
        wanted = [Validation(100, 2.4, 2.5), Validation(200, 1.4, 1.5)]
        assert repr(found.validations) == repr(wanted), place  # NaN is not equal to itself
        assert diagnose(found.validations, steps=200, epochs=1.0, ended_early=False)
    log.write_bytes(GOOD[0] + b"\n" + odd + b"\n")
    assert "are repeated" in str(RunFolder.at(tmp_path).cut_log(0))


def test_a_history_from_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    records = [
        {"step": 1, "loss": 4.0},
        {"step": 50, "loss": 2.0},
        {"step": 50, "spike": 9.0, "usual": 2.0, "batch": []},
        {"step": 60, "left_out": "nan", "steps": 1, "batch": []},
        {"step": 100, "val_loss": 2.5, "val_bits_per_byte": 3.0},
        {"step": 200, "val_loss": 2.0, "val_bits_per_byte": 3.0},
        {"step": 250, "loss": 1.5},
        {"step": 300, "val_loss": 1.9, "val_bits_per_byte": None, "val_standard_error": 0.25},
    ]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    first, second, third = read_log(log).validations
    assert (first.step, first.val_loss, first.loss, first.error) == (100, 2.5, 3.0, 0.0)
    assert (third.step, third.val_loss, third.loss, third.error) == (300, 1.9, 1.5, 0.25)
    assert second.step == 200
    assert math.isnan(second.loss)


def exit_code(args: list[str]) -> object:
    with pytest.raises(SystemExit) as ended:
        main(args)
    return ended.value.code


@pytest.mark.slow
def test_commands_on_a_run_with_an_odd_log_end_with_a_line(runs: Runs, capsys) -> None:
    """{"step": 1e999} was a traceback."""
    run = runs.copy()
    with open(run / "log.jsonl", "ab") as log:
        log.write(b"\n".join([*ODD, b""]))
    for command in ("report", "info", "doctor", "train --resume"):
        assert exit_code([*command.split(), str(run)]) in (0, 2)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err


@pytest.mark.slow
def test_a_state_with_an_impossible_file_name_is_refused(runs: Runs, capsys) -> None:
    """A lone surrogate in the names was a traceback."""
    path = runs.copy() / "last.state.safetensors"
    arrays, parts = read_arrays(path)
    parts.pop("tensors")
    for name in ("a\0b", "\ud800.txt"):
        origin = {"path": name, "sha256": "0" * 64}
        for change in {"val_file": name}, {"encoding": name}, {"from": origin}, {"files": [name]}:
            write_arrays(path, arrays, parts | {"settings": parts["settings"] | change})
            assert "cannot be the name of a file" in refusal(read_state, path)
    assert exit_code(["doctor", str(path.parent)]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err
