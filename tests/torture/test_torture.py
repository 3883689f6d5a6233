"""Each torture in short; `make torture` does all of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from torture import Figure
from torture.__main__ import ALL

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform == "win32", reason="they fork and send signals"),
]


@pytest.mark.parametrize(
    ("torture", "count"), [(t, short) for t, _, short in ALL], ids=[t.__name__ for t, _, _ in ALL]
)
def test_nothing_is_lost(
    torture: Callable[[int, Path], Figure], count: int, tmp_path: Path
) -> None:
    figure = torture(count, tmp_path)
    if figure.note.startswith("not run"):
        pytest.skip(str(figure))
    assert figure.good, str(figure)
