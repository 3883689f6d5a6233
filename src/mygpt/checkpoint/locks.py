"""The lock that says which process writes in a folder, and the file locks it is built on.

Locks are advisory (`flock`; `msvcrt.locking` on Windows) and end with the process that holds
them, however it dies. Some network file systems have none; callers are informed of that.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path
from typing import Any

from mygpt.errors import CheckpointError, InputError, StorageError
from mygpt.file_access import file_mode, open_descriptor, open_regular

_NO_LOCKS = ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL")
# `holder` takes a shared lock for a moment to test whether the folder is locked. A writer that
# starts in that moment waits this long before it reports that the folder is in use.
_TIMEOUT_S = 0.2


def try_lock(descriptor: int, *, shared: bool = False) -> bool | None:
    """Try to lock an open file or folder, without waiting.

    Args:
        descriptor: of the open file or folder.
        shared: several processes may hold the lock if all of them share it.

    Returns:
        True if the lock is taken, False if another process holds it, None if the file system
        has no locks.
    """
    try:
        if os.name == "nt":
            import msvcrt

            windows: Any = msvcrt
            os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # beyond the text, to keep that readable
            windows.locking(descriptor, windows.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        none = {getattr(errno, name) for name in _NO_LOCKS if hasattr(errno, name)}
        return None if error.errno in none else False
    return True


class RunLock:
    """A context manager that gives one process at a time the right to write in a folder.

    Args:
        folder: the folder to lock; it is created if it does not exist.
        otherwise: the remedy that messages name if it cannot be locked.

    Attributes:
        works: False if the file system has no locks, so that nothing is locked.
    """

    def __init__(self, folder: Path, otherwise: str = "choose another --output") -> None:
        self.folder = folder
        self.otherwise = otherwise
        self.works = True
        self._descriptor: int | None = None
        self._folder_descriptor: int | None = None  # valid also after the folder is renamed

    def __enter__(self) -> RunLock:
        """Take the lock.

        Raises:
            InputError: if another process holds it.
            StorageError: if the folder cannot be created or written to.
        """
        import socket

        path = lock_path(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = open_descriptor(
                path, os.O_RDWR | os.O_CREAT, mode=file_mode(self.folder)
            )
        except OSError as error:
            raise StorageError(
                f"cannot write to {self.folder}: {error.strerror}: {self.otherwise}"
            ) from error
        until = time.monotonic() + _TIMEOUT_S
        while (taken := try_lock(self._descriptor)) is False and time.monotonic() < until:
            time.sleep(0.02)
        if taken is False:
            holder = _recorded_holder(path)
            self.__exit__()
            raise InputError(
                f"{self.folder} is in use by {holder}: wait until it ends, stop it, or "
                f"{self.otherwise}"
            )
        self.works = taken is not None
        if os.name != "nt":  # Windows cannot rename a folder that has an open file in it
            self._folder_descriptor = os.open(self.folder, os.O_RDONLY)
        if os.fstat(self._descriptor).st_nlink > 1:  # a hard link: writing would change its target
            return self
        with contextlib.suppress(OSError):  # the text is only for messages
            os.ftruncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        return self

    def __exit__(self, *_: object) -> None:
        # The lock file is not removed: if it were, two processes could each lock their own file
        # of that name.
        for descriptor in (self._descriptor, self._folder_descriptor):
            if descriptor is not None:
                os.close(descriptor)
        self._descriptor = self._folder_descriptor = None

    def moved_to(self) -> Path | None:
        """The current path of the locked folder if it was renamed; None if it was not.

        Raises:
            StorageError: if the folder was removed, or cannot be found.
        """
        if self._folder_descriptor is None:
            return None
        ours = os.fstat(self._folder_descriptor)
        try:
            if os.path.samestat(os.stat(self.folder), ours):
                return None
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:  # the path cannot be checked now
            return None
        found = _path_of(self._folder_descriptor)
        if found is not None and os.path.realpath(self.folder) == str(found):
            return None  # some network file systems change a folder's inode number
        if found is None or not found.is_dir() or not os.path.samestat(os.stat(found), ours):
            raise StorageError(
                f"{self.folder} was removed or moved away while this process was writing in it"
            )
        return found


def _path_of(descriptor: int) -> Path | None:
    """The current path of an open folder; None if the system does not report it."""
    with contextlib.suppress(OSError):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    import fcntl

    with contextlib.suppress(OSError, AttributeError):
        command = getattr(fcntl, "F_GETPATH")  # noqa: B009  # exists on macOS only
        return Path(os.fsdecode(fcntl.fcntl(descriptor, command, bytes(1024)).rstrip(b"\0")))
    return None


def holder(folder: Path) -> str | None:
    """The process that holds the lock of `folder`, as text; None if it is not locked.

    Writes nothing.
    """
    path = lock_path(folder)
    try:
        descriptor = open_descriptor(path, os.O_RDONLY)
    except (OSError, CheckpointError):
        return None
    try:
        return _recorded_holder(path) if try_lock(descriptor, shared=True) is False else None
    finally:
        os.close(descriptor)


def lock_path(folder: Path) -> Path:
    """The file that `RunLock` locks."""
    return folder / ".lock"


def _recorded_holder(path: Path) -> str:
    """What the lock's holder wrote about itself into the lock file."""
    with contextlib.suppress(OSError, CheckpointError), open_regular(path) as file:
        if os.fstat(file.fileno()).st_nlink == 1:
            words = file.read(200).decode("utf-8", "replace")
            return words if words and words.isprintable() else "another process"
    return "another process"
