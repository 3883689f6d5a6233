"""Text on its way to a terminal."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any, TextIO

# A model trained on control characters, or a file from elsewhere, must not drive the terminal.
# Tab, line feed and carriage return stay.
_VISIBLE = {n: 0xFFFD for n in (*range(32), *range(127, 160)) if n not in (9, 10, 13)}


def visible(text: str, stream: TextIO) -> str:
    """`text` with its control characters replaced where `stream` is a terminal."""
    return text.translate(_VISIBLE) if stream.isatty() else text


class Waiting:
    """A line that moves while nothing else can be shown; it is gone afterwards.

    Args:
        text: what is being done; empty shows nothing.
    """

    def __init__(self, text: str) -> None:
        self._status: Any = None
        if text:
            from rich.console import Console

            self._status = Console().status(text)
            self._status.start()

    def __enter__(self) -> Waiting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the line empty."""
        if self._status is not None:
            with contextlib.suppress(OSError):
                self._status.stop()
            self._status = None
