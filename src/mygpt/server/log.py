"""A standard error that never blocks, and a rate limit for repeated log messages."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator

_MOST_BYTES = 2**20  # in the buffer; further lines are dropped and counted
_LAST_S = 0.5  # how long `end` waits for the last lines to be written
_REPEATS, _PERIOD_S = 5, 10.0


class NonBlockingStream(io.TextIOBase):
    """A text stream whose `write` never blocks, also if nobody reads from the pipe behind it.

    A thread writes the text to a file descriptor. Lines that do not fit into the buffer are
    dropped, and their number is written once there is a reader again.

    Args:
        descriptor: the file descriptor.
        encoding: of the text; characters that it does not have are escaped.
    """

    def __init__(self, descriptor: int, encoding: str) -> None:
        self._descriptor, self._encoding = descriptor, encoding
        self._change = threading.Condition()
        self._waiting = bytearray()
        self._dropped = 0
        self._keeps: bool | None = None  # the line that has no end yet; None: there is none
        self._ending = False
        self._thread = threading.Thread(target=self._write_all, name="mygpt-log", daemon=True)
        self._thread.start()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The text's encoding."""
        return self._encoding

    def fileno(self) -> int:
        """The file descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether the file descriptor is a terminal."""
        return os.isatty(self._descriptor)

    def write(self, text: str) -> int:
        """Buffer a text; it does not raise if the text cannot be written later."""
        part = text.encode(self._encoding, "backslashreplace")
        with self._change:
            # A line is kept or dropped as a whole, though `print` writes its end apart.
            keeps = self._keeps
            if keeps is None:
                keeps = not self._dropped and len(self._waiting) + len(part) <= _MOST_BYTES
            if keeps:
                self._waiting += part
            else:
                self._dropped += text.count("\n")
            if text:
                self._keeps = None if text.endswith("\n") else keeps
            self._change.notify_all()
        return len(text)

    def end(self) -> None:
        """Wait a moment for the last lines to be written."""
        with self._change:
            self._ending = True
            self._change.notify_all()
        self._thread.join(_LAST_S)

    def _write_all(self) -> None:
        while left := self._next():
            with contextlib.suppress(OSError):  # the pipe is closed
                while left:
                    left = left[os.write(self._descriptor, left) :]

    def _next(self) -> bytes:
        """Wait for buffered text and return it; empty at the end."""
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._dropped or self._ending)
            found, self._waiting = bytes(self._waiting), bytearray()
            if self._dropped and not found:
                found = f"[{self._dropped:,} lines were dropped: stderr was not read]\n".encode()
                self._dropped = 0
            return found


@contextlib.contextmanager
def nonblocking_stderr() -> Iterator[None]:
    """Within the context, writes to `sys.stderr` do not block."""
    before = sys.stderr
    try:
        stream = NonBlockingStream(before.fileno(), before.encoding)
    except (OSError, ValueError):  # not a file, but an object of a program
        yield
        return
    before.flush()
    sys.stderr = stream
    try:
        yield
    finally:
        stream.end()
        sys.stderr = before


class RateLimit(logging.Filter):
    """Lets each line of code log at most 5 records in 10 seconds."""

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
