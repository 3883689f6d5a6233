"""A readers-writer lock between processes, on an empty file."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from mygpt.file_access import PRIVATE_FILE, open_descriptor


class SharedLock:
    """A lock that many processes can hold as shared, or one as exclusive.

    It is held until it is released or the process ends. On a system or file system without such
    locks, acquiring it always succeeds.

    Args:
        path: the lock's file, which is created.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire_shared(self) -> None:
        """Acquire it as shared; waits while another process holds it as exclusive."""
        self._lock(exclusive=False)

    def try_exclusive(self) -> bool:
        """Acquire it as exclusive, if no other process holds it; otherwise release it.

        Returns:
            Whether it was acquired.
        """
        if self._lock(exclusive=True):
            return True
        self.release()
        return False

    def touch(self) -> None:
        """Set the file's modification time to now, which records the last use."""
        with contextlib.suppress(OSError):
            os.utime(self.path)

    def release(self) -> None:
        """Release it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self, *, exclusive: bool) -> bool:
        if self._descriptor is None:
            self._descriptor = open_descriptor(self.path, os.O_RDWR | os.O_CREAT, mode=PRIVATE_FILE)
        if os.name == "nt":  # files that are mapped cannot be removed there
            return True
        import fcntl

        try:
            how = fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH
            fcntl.flock(self._descriptor, how)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        return True
