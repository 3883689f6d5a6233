"""Files that only a run's state names: read only if they have the size that the run found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mygpt import training
from mygpt.checkpoint.container import read_arrays, write_arrays
from mygpt.errors import InputError
from mygpt.training.events import Started
from mygpt.training.run import RunFolder
from mygpt.views.run import read_run

TINY: dict[str, Any] = {
    "preset": "nano", "embed_dim": 8, "num_heads": 2, "num_layers": 1, "max_seq_len": 16,
    "batch_size": 4, "steps": 12, "sample_tokens": 0,
}  # fmt: skip


def train(run: Path) -> None:
    run.parent.mkdir(exist_ok=True)
    text = run.with_name("fox.txt")
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    training.train(text, output=run, listener=lambda event: None, **TINY)


def forged(run: Path, **settings: Any) -> None:
    """Change what a state names, as somebody else's might."""
    path = run / "last.state.safetensors"
    arrays, parts = read_arrays(path)
    parts["settings"] = {**parts["settings"], **settings}
    write_arrays(path, arrays, {n: p for n, p in parts.items() if n != "tensors"})


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of the user that no run has read; reading it fails the test."""
    secret = tmp_path / "elsewhere" / "secret.txt"
    secret.parent.mkdir()
    secret.write_text("precious " * 100)
    read: list[str] = []
    inner = os.open

    def watched(path: Any, *args: Any, **options: Any) -> int:
        read.append(os.fspath(path))
        return inner(path, *args, **options)

    monkeypatch.setattr(os, "open", watched)
    yield secret
    assert str(secret) not in read


@pytest.mark.parametrize("kind", ["files", "val_file", "folder", "pattern", "older"])
def test_a_file_that_only_a_state_names_is_not_read(
    tmp_path: Path, other: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """--resume, reproduce and report read any file that somebody else's state named."""
    run = tmp_path / "far" / "run"
    train(run)
    named = {
        "folder": str(other.parent), "pattern": f"{other.parent}/*.txt"
    }.get(kind, str(other))  # fmt: skip
    forged(run, **({"val_file": named} if kind == "val_file" else {"files": [named]}))
    if kind == "older":
        settings = dict(RunFolder(run).load_state()[0].settings)
        forged(run, seen=None)
        assert "seen" in settings
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(InputError, match=r"is not read unless it is named: .*--resume") as refused:
        training.resume(run, steps=14, listener=lambda event: None)
    assert str(other.parent) in str(refused.value)
    with pytest.raises(InputError, match=r"is not read unless it is named: .*reproduce .*--text"):
        training.replay(run, output=tmp_path / "again", listener=lambda event: None)
    read_run(RunFolder(run))


def test_a_moved_text_can_be_named_to_resume_and_to_reproduce(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run)
    (text,) = RunFolder(run).load_state()[0].settings["files"]
    moved = Path(text).rename(tmp_path / "moved.txt")
    training.replay(run, output=tmp_path / "again", files=[moved], listener=lambda event: None)
    training.resume(run, [moved], steps=14, listener=lambda event: None)
    heard: list[Any] = []
    training.resume(run, steps=16, listener=heard.append)
    started = next(event for event in heard if isinstance(event, Started))
    assert str(started).startswith(f"text: {moved}\n")
