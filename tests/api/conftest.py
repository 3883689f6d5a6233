"""The text that the tests of this folder train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from training_runs import TEXT


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "times.txt"
    path.write_text(TEXT)
    return str(path)
