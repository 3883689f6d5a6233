"""Text on its way to a terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# A model trained on control characters, or a file from elsewhere, must not drive the terminal.
# Tab and line feed stay; a carriage return, which would write over the line, is a line's end.
_VISIBLE = {n: 0xFFFD for n in (*range(32), *range(127, 160)) if n not in (9, 10)}

_ESCAPED_IN_JSON = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def visible(text: str, stream: IO[str]) -> str:
    """`text` with its control characters replaced where `stream` is a terminal."""
    return VisiblePieces(stream)(text)


class VisiblePieces:
    """A text's pieces, as `visible` shows them; a piece may begin inside a line's end.

    Args:
        stream: where they are written.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._is_terminal = stream.isatty()
        self._after_return = False

    def __call__(self, piece: str) -> str:
        """The next piece."""
        if not self._is_terminal or not piece:
            return piece
        line_feed_shown = self._after_return and piece.startswith("\n")
        self._after_return = piece.endswith("\r")
        lines = piece[line_feed_shown:].replace("\r\n", "\n").replace("\r", "\n")
        return lines.translate(_VISIBLE)


def say(*values: object, file: IO[str] | None = None, end: str = "\n", flush: bool = False) -> None:
    """`print`, by which every command prints: a terminal gets no control characters."""
    stream = sys.stdout if file is None else file
    print(*(visible(str(value), stream) for value in values), file=stream, end=end, flush=flush)


def new_console(**options: Any) -> Console:
    """Rich's console, with its own colours alone: what is shown has no control characters."""
    from rich.console import Console
    from rich.text import Text

    class Clean(Console):
        """Prints texts without control characters."""

        def print(self, *objects: Any, **how: Any) -> None:
            """As Rich's, for strings and texts."""
            for shown in objects:
                if isinstance(shown, Text):
                    shown.plain = visible(shown.plain, self.file)
            objects = tuple(visible(o, self.file) if isinstance(o, str) else o for o in objects)
            super().print(*objects, **how)

    return Clean(**options)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON with the letters of all scripts as they are, and control characters escaped.

    JSON itself escapes those up to U+001F; U+009B begins a command to some terminals as well.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _ESCAPED_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class VisibleFormatter(logging.Formatter):
    """Messages of the `logging` module as `say` would print them."""

    def format(self, record: logging.LogRecord) -> str:
        """One message."""
        return visible(super().format(record), sys.stderr)


class Waiting:
    """A line that moves while nothing else can be shown; it is gone afterwards.

    Args:
        text: what is being done; empty shows nothing.
    """

    def __init__(self, text: str) -> None:
        self._status: Any = None
        if text:
            self._status = new_console().status(text)
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
