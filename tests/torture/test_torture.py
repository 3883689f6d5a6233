"""Each torture in short; `make torture` does all of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from torture import Tally
from torture.__main__ import ALL

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform == "win32", reason="they fork and send signals"),
]


@pytest.mark.parametrize(
    ("torture", "count"), [(t, short) for t, _, short in ALL], ids=[t.__name__ for t, _, _ in ALL]
)
def test_nothing_is_lost(torture: Callable[[int, Path], Tally], count: int, tmp_path: Path) -> None:
    tally = torture(count, tmp_path)
    if tally.note.startswith("not run"):
        pytest.skip(str(tally))
    assert tally.good, str(tally)
