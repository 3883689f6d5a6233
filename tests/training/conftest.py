"""A text to train on, and small runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from training_runs import TEXT, Runs, fit


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "times.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `TINY` on `TEXT`."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "times.txt").write_text(TEXT)
    fit(str(folder / "times.txt"), folder / "run")
    return folder / "run"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished_run: Path) -> Runs:
    return Runs(tmp_path, monkeypatch, finished_run)
