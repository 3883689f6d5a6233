"""`Writer.report`, `history` and `save`, and the report that a training writes at its end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mygpt
from mygpt.errors import InputError
from mygpt.training.events import Event, Finished
from shapes import TUTORIAL, build
from training_runs import TINY, silent

pytestmark = pytest.mark.kernels


@pytest.fixture
def run(text: str, tmp_path: Path) -> Path:
    mygpt.train(text, output=tmp_path / "run", listener=silent, report=False, **TINY)
    return tmp_path / "run"


def test_a_training_writes_its_report_and_says_where(
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As the command does; `report=False` does not. An error does not end the program."""
    heard: list[Event] = []
    listeners = [print, heard.append]
    writer = mygpt.train(text, output=tmp_path / "run", listener=listeners, **TINY)
    page = tmp_path / "run" / "report.html"
    assert page.is_file()
    assert isinstance(heard[-1], Finished)  # the last event, as before
    assert capsys.readouterr().out.endswith(f"note: the report is {page}\n")
    assert writer.run == tmp_path / "run"
    page.unlink()
    page.mkdir()
    mygpt.resume(tmp_path / "run", steps=14, listener=heard.append)
    assert isinstance(heard[-1], Finished)
    assert caplog.messages[-1].startswith("no report: ")


@pytest.mark.parametrize("name", ["", "best.safetensors", "ckpt.pt"])
def test_a_writer_knows_its_run(name: str, text: str, tmp_path: Path) -> None:
    """By the folder, a model in it, or the checkpoint file of `output`."""
    output = tmp_path / "ckpt.pt" if name == "ckpt.pt" else tmp_path / "run"
    mygpt.train(text, output=output, listener=silent, report=False, **TINY)
    writer = mygpt.load(output if name == "ckpt.pt" else output / name)
    history = writer.history
    assert [report.step for report in history.reports] == list(range(1, 13))
    assert [seen.step for seen in history.validations] == [4, 8, 12]
    page = writer.report()
    assert page.is_file()
    assert writer.report(tmp_path / "other.html").read_bytes().startswith(b"<!")
    with pytest.raises(InputError, match=r"other\.html exists: add overwrite=True"):
        writer.report(tmp_path / "other.html")


def test_a_model_without_a_run_has_neither_history_nor_report(tmp_path: Path) -> None:
    writer = mygpt.Writer(build(TUTORIAL), mygpt.CharTokenizer("abcde"))
    for call in (writer.report, lambda: writer.history):
        with pytest.raises(InputError, match=r"this model was not read from a run: mygpt\.load"):
            call()
    saved = mygpt.load(writer.save(tmp_path / "alone.safetensors"))
    with pytest.raises(InputError, match=r"there is no log\.jsonl in the folder"):
        saved.report()


def test_a_saved_model_generates_the_same(run: Path, tmp_path: Path) -> None:
    """Of a checkpoint, and of its torch model with changed weights; nothing is replaced unasked."""
    writer = mygpt.load(run)
    path = writer.save(tmp_path / "new" / "model.safetensors")
    saved = mygpt.load(path)
    assert saved.generate("1", 20, seed=1) == writer.generate("1", 20, seed=1)
    assert saved.provenance == writer.provenance
    with torch.no_grad():
        writer.model.token_embedding.weight.mul_(3.0)
    with pytest.raises(InputError, match="exists: add overwrite=True, or choose another path"):
        writer.save(path)
    with pytest.raises(InputError, match="is a folder: name a file in it"):
        writer.save(tmp_path / "new")
    changed = mygpt.load(writer.save(path, overwrite=True))
    assert changed.generate("1", 20, seed=1) == writer.generate("1", 20, seed=1)
    assert torch.equal(changed.model.token_embedding.weight, writer.model.token_embedding.weight)


def test_an_ablated_model_is_a_writer_without_a_run(run: Path) -> None:
    ablated = mygpt.load(run).ablated("mlp1")
    assert isinstance(ablated, mygpt.Writer)
    assert ablated.run is None
