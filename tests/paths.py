"""Where the project's folders are, whichever folder a test is in."""

from __future__ import annotations

from pathlib import Path

import mygpt

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PACKAGE = Path(mygpt.__file__).resolve().parent  # in src/, or where the wheel is installed
SOURCES = PACKAGE.parent
GOLDEN = TESTS / "golden"
