"""Printing for all commands, safe for terminals: control characters are replaced."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import sys
import textwrap
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.status import Status

# Control characters in generated text or in files must not control the terminal. Tab and line feed
# are kept. A carriage return, which would overwrite the line, is replaced by a line feed.
_VISIBLE = {n: 0xFFFD for n in (*range(32), *range(127, 160)) if n not in (9, 10)}

_LEAST_WIDTH, _MOST_WIDTH = 20, 80  # columns of messages on a terminal
# A command in a message: in backquotes, or from its name to the end of the line.
_COMMAND = re.compile(r"`[^`]*`|\bmygpt [a-z]+ .*$")
_INDENT = re.compile(r" *(\| )?")  # of a line of a sample with a mark

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


def at_words(text: str, stream: IO[str], column: int | None = None) -> str:
    """`text`, with long lines broken at words if `stream` is a terminal, at 80 columns at most.

    A command in a message is not broken, so that it can be copied. Further lines begin at `column`,
    or are indented by two columns more than the first.
    """
    if not stream.isatty():
        return text
    width = max(_LEAST_WIDTH, min(_MOST_WIDTH, shutil.get_terminal_size().columns))
    lines = []
    for line in text.split("\n"):
        joined = _COMMAND.sub(lambda found: found[0].replace(" ", "\0"), line)
        start = _INDENT.match(line)
        indent = start[0] if start else ""
        indent = indent if "|" in indent else indent + "  "
        indent = indent if column is None else " " * column
        broken = textwrap.wrap(
            joined, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False,
            drop_whitespace=True, replace_whitespace=False,
        )  # fmt: skip
        lines += [part.replace("\0", " ") for part in broken] or [""]
    return "\n".join(lines)


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


class CompileMessages(logging.Handler):
    """While entered, `show` gets the log's messages that machine code is being compiled.

    Other warnings are printed as before.

    Args:
        show: called with one line.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._show, self._logger = show, logging.getLogger("mygpt")

    def __enter__(self) -> CompileMessages:
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Show or print one message."""
        text = visible(record.getMessage(), sys.stderr)
        if text.startswith("compiling "):
            self._show(text)
        else:
            say(text, file=sys.stderr)


def waiting(text: str) -> contextlib.ExitStack:
    """Show an animated status line on a terminal, until the result is closed; none if empty.

    While machine code is compiled, it says so.
    """
    shown = contextlib.ExitStack()
    if text and sys.stdout.isatty():
        from rich.markup import escape

        status = new_console().status(text)
        status.start()
        shown.callback(_stop, status)
        shown.enter_context(CompileMessages(lambda line: status.update(escape(line))))
    return shown


def _stop(status: Status) -> None:
    """Remove a status line. Errors of what it was shown for are not affected."""
    with contextlib.suppress(OSError):  # the terminal is gone
        status.stop()
