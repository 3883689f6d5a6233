"""Printing for all commands, safe for terminals: control characters are replaced."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Control characters in generated text or in files must not control the terminal. Tab and line feed
# are kept. A carriage return, which would overwrite the line, is replaced by a line feed.
_VISIBLE = {n: 0xFFFD for n in (*range(32), *range(127, 160)) if n not in (9, 10)}

_ESCAPED_IN_JSON = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def visible(text: str, stream: IO[str]) -> str:
    """`text`, with control characters replaced if `stream` is a terminal."""
    return VisiblePieces(stream)(text)


class VisiblePieces:
    """`visible` for a text that comes in pieces; "\\r" and "\\n" of one line end may be apart.

    Args:
        stream: the stream that the pieces are written to.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._is_terminal = stream.isatty()
        self._after_return = False

    def __call__(self, piece: str) -> str:
        """Return the next piece as it is to be printed."""
        if not self._is_terminal or not piece:
            return piece
        line_feed_shown = self._after_return and piece.startswith("\n")
        self._after_return = piece.endswith("\r")
        lines = piece[line_feed_shown:].replace("\r\n", "\n").replace("\r", "\n")
        return lines.translate(_VISIBLE)


def say(*values: object, file: IO[str] | None = None, end: str = "\n", flush: bool = False) -> None:
    """Like `print`, but a terminal gets no control characters. All commands use it."""
    stream = sys.stdout if file is None else file
    print(*(visible(str(value), stream) for value in values), file=stream, end=end, flush=flush)


def new_console(**options: Any) -> Console:
    """A Rich console that removes control characters from what it prints."""
    from rich.console import Console
    from rich.text import Text

    class Clean(Console):
        """Prints texts without control characters."""

        def print(self, *objects: Any, **how: Any) -> None:
            """Print strings and texts as Rich does."""
            for shown in objects:
                if isinstance(shown, Text):
                    shown.plain = visible(shown.plain, self.file)
            objects = tuple(visible(o, self.file) if isinstance(o, str) else o for o in objects)
            super().print(*objects, **how)

    return Clean(**options)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return JSON text with non-ASCII letters unescaped and all control characters escaped.

    `json.dumps` escapes only those up to U+001F. Some terminals also act on U+009B.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _ESCAPED_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class VisibleFormatter(logging.Formatter):
    """Formats messages of the `logging` module as `say` prints them."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one message."""
        return visible(super().format(record), sys.stderr)


def waiting(text: str) -> contextlib.ExitStack:
    """Show an animated status line on a terminal, until the result is closed; none if empty."""
    shown = contextlib.ExitStack()
    if text and sys.stdout.isatty():
        shown.enter_context(contextlib.suppress(OSError))  # the terminal may be gone at the end
        shown.enter_context(new_console().status(text))
    return shown
