"""The shell of the tests of commands."""

from __future__ import annotations

import pytest

from shell import Shell


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)
