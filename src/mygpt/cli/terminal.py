"""Text on its way to a terminal."""

from __future__ import annotations

from typing import TextIO

# A model trained on control characters, or a file from elsewhere, must not drive the terminal.
# Tab, line feed and carriage return stay.
_VISIBLE = {n: 0xFFFD for n in (*range(32), *range(127, 160)) if n not in (9, 10, 13)}


def visible(text: str, stream: TextIO) -> str:
    """`text` with its control characters replaced where `stream` is a terminal."""
    return text.translate(_VISIBLE) if stream.isatty() else text
