"""A lock that many may hold together, or one alone: on a file that stays empty."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from mygpt.file_access import PRIVATE_FILE, open_descriptor


class SharedLock:
    """Held until it is released, or the process ends.

    Where the system or the file system has no such locks it is always had.

    Args:
        path: the file, which is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire_shared(self) -> None:
        """Hold it together with others; waits while one holds it alone."""
        self._lock(alone=False)

    def try_exclusive(self) -> bool:
        """Hold it alone, if nobody else holds it; else it is not held at all."""
        if self._lock(alone=True):
            return True
        self.release()
        return False

    def touch(self) -> None:
        """Say on the file that it was used now."""
        with contextlib.suppress(OSError):
            os.utime(self.path)

    def release(self) -> None:
        """Hold it no more."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self, *, alone: bool) -> bool:
        if self._descriptor is None:
            self._descriptor = open_descriptor(self.path, os.O_RDWR | os.O_CREAT, mode=PRIVATE_FILE)
        if os.name == "nt":  # files that are mapped cannot be removed there
            return True
        import fcntl

        try:
            how = fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH
            fcntl.flock(self._descriptor, how)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        return True
