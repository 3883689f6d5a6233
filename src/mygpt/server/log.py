"""A standard error that nobody waits for, and a log that repeats itself only so often."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator

_MOST_BYTES = 2**20  # that wait to be written; more are dropped and counted
_LAST_S = 0.5  # how long the last lines may take
_REPEATS, _PERIOD_S = 5, 10.0


class Unblocked(io.TextIOBase):
    """A text stream that takes what is written and never waits for whoever reads it.

    A thread writes it to a file descriptor. What does not fit while nobody reads is dropped, and
    the number of lines that were dropped is written once there is a reader again.

    Args:
        descriptor: where to write.
        encoding: of the text; characters that it lacks are escaped.
    """

    def __init__(self, descriptor: int, encoding: str) -> None:
        self._descriptor, self._encoding = descriptor, encoding
        self._change = threading.Condition()
        self._waiting: list[bytes] = []
        self._size = self._dropped = 0
        self._ending = False
        self._thread = threading.Thread(target=self._write_all, name="mygpt-log", daemon=True)
        self._thread.start()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The text's encoding."""
        return self._encoding

    def fileno(self) -> int:
        """Where it is written."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether a terminal shows it."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, text: str) -> int:
        """Take a text; it never raises for what becomes of it."""
        part = text.encode(self._encoding, "backslashreplace")
        with self._change:
            if self._dropped or self._size + len(part) > _MOST_BYTES:
                self._dropped += text.count("\n")
            else:
                self._waiting.append(part)
                self._size += len(part)
            self._change.notify_all()
        return len(text)

    def end(self) -> None:
        """Let the last lines be written, if somebody reads them soon."""
        with self._change:
            self._ending = True
            self._change.notify_all()
        self._thread.join(_LAST_S)

    def _write_all(self) -> None:
        while parts := self._next():
            left = memoryview(b"".join(parts))
            with contextlib.suppress(OSError):  # whoever read it has gone
                while left:
                    left = left[os.write(self._descriptor, left) :]

    def _next(self) -> list[bytes]:
        """What waits, once something does; nothing at the end."""
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._dropped or self._ending)
            parts, self._waiting, self._size = self._waiting, [], 0
            if self._dropped and not parts:
                parts = [f"[{self._dropped:,} lines were dropped: nobody read them]\n".encode()]
                self._dropped = 0
            return parts


@contextlib.contextmanager
def unblocked_stderr() -> Iterator[None]:
    """Nothing that is written to `sys.stderr` meanwhile waits for its reader."""
    before = sys.stderr
    try:
        stream = Unblocked(before.fileno(), before.encoding)
    except (OSError, ValueError):  # it is no file, but a program's own
        yield
        return
    before.flush()
    sys.stderr = stream
    try:
        yield
    finally:
        stream.end()
        sys.stderr = before


class Sparing(logging.Filter):
    """Lets a line of code log a few times in ten seconds, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self._recent: dict[tuple[str, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is kept."""
        place, now = (record.pathname, record.lineno), time.monotonic()
        began, count = self._recent.get(place, (now, 0))
        if now - began >= _PERIOD_S:
            if count > _REPEATS:
                record.msg = f"{record.msg} [{count - _REPEATS:,} more were not logged]"
            began, count = now, 0
        self._recent[place] = began, count + 1
        return count < _REPEATS
