"""Listeners: a CSV file, TensorBoard, Weights & Biases, and several at once."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mygpt
from mygpt.api.listeners import COLUMNS
from mygpt.errors import InputError
from mygpt.training.events import Event
from training_runs import TINY, log


@pytest.mark.kernels
def test_a_csv_file_has_the_losses_of_the_log(text: str, tmp_path: Path) -> None:
    """Also those of a resumed run, which are appended."""
    path, run = tmp_path / "losses" / "run.csv", tmp_path / "run"
    heard: list[Event] = []
    path.parent.mkdir()
    mygpt.train(text, output=run, listener=[mygpt.CsvListener(path), heard.append], **TINY)
    mygpt.resume(run, steps=14, listener=mygpt.CsvListener(path))
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    found = [(int(row["step"]), float(row["loss"])) for row in rows if row["loss"]]
    assert found == [(line["step"], line["loss"]) for line in log(run) if "loss" in line]
    validated = [(int(row["step"]), float(row["val_loss"])) for row in rows if row["val_loss"]]
    assert validated == [
        (line["step"], line["val_loss"]) for line in log(run) if "val_loss" in line
    ]
    assert len(heard) > 12


def test_another_table_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("name,age\n")
    with pytest.raises(InputError, match=r"mine\.csv is another table: name a new file"):
        mygpt.CsvListener(tmp_path / "mine.csv")
    assert (tmp_path / "mine.csv").read_text() == "name,age\n"


@pytest.mark.kernels
def test_tensorboard_shows_losses_and_samples(text: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    listener = mygpt.TensorBoardListener()
    mygpt.train(text, output=run, listener=listener, **TINY | {"sample_tokens": 8})
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    assert {"loss", "val_loss", "val_bits_per_byte", "lr"} <= set(found.Tags()["scalars"])
    losses = [(event.step, event.value) for event in found.Scalars("loss")]
    wanted = [(line["step"], line["loss"]) for line in log(run) if "loss" in line]
    assert losses == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in wanted]
    assert found.Tags()["tensors"] == ["sample/text_summary"]


class FakeRun:
    """Stands for a W&B run: what was logged, by step."""

    def __init__(self, **given: Any) -> None:
        self.given, self.logged, self.summary = given, [], {}  # type: ignore[var-annotated]
        self.finished = False

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.kernels
def test_weights_and_biases_gets_losses_and_samples(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run of its own, which it ends, or in one of the program's, which it does not."""
    runs: list[FakeRun] = []

    def init(**given: Any) -> FakeRun:
        runs.append(FakeRun(**given))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    run = tmp_path / "run"
    listener = mygpt.WandbListener("poems", config={"note": "mine"})
    mygpt.train(text, output=run, listener=listener, **TINY | {"sample_tokens": 8})
    (own,) = runs
    assert (own.given["project"], own.given["name"]) == ("poems", "run")
    assert (own.given["config"]["vocab_size"], own.given["config"]["note"]) == (29, "mine")
    losses = [(step, values["loss"]) for step, values in own.logged if "loss" in values]
    assert losses == [(line["step"], line["loss"]) for line in log(run) if "loss" in line]
    assert any("sample" in values for _, values in own.logged)
    best = min(line["val_loss"] for line in log(run) if "val_loss" in line)
    assert own.summary == {"best_val_loss": best}
    assert own.finished
    mine = FakeRun()
    mygpt.resume(run, steps=14, listener=mygpt.WandbListener(run=mine))
    assert len(runs) == 1
    assert [step for step, values in mine.logged if "loss" in values] == [13, 14]
    assert not mine.finished


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("wandb", mygpt.WandbListener, "Weights & Biases is not installed: pip install wandb"),
        ("torch.utils.tensorboard", mygpt.TensorBoardListener, "pip install tensorboard"),
    ],
)
def test_a_missing_library_is_named_at_once(
    name: str, make: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=message):
        make()
