"""Files that are whole or not there, and the lock that says who writes in a folder.

A file is written beside its place under a temporary name, synced, read back where that is asked
for, and renamed; the folder is synced then. Whenever the process dies, the old file is there or
the new one. Whether that also holds when the power fails is up to the disk, which has been told.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mygpt.errors import InputError, StorageError

_NO_LOCKS = ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL")
_CREATE = os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0)
_PATIENCE_S = 0.2  # whoever only asks who holds the lock has it for a moment


def write_durably(
    path: str | Path,
    pieces: Sequence[bytes | bytearray | memoryview],
    *,
    prove: Callable[[Path], None] | None = None,
    keep_as: Path | None = None,
) -> None:
    """Replace a file by `pieces` in a row so that a crash leaves the old file or the new one.

    The file's mode follows the umask; a link stays one, and what it points to is replaced.

    Args:
        path: the file.
        pieces: its content.
        prove: is called with the synced temporary file before that takes the old one's place;
            what it raises ends the writing.
        keep_as: the name under which the old file is kept, in the same folder.

    Raises:
        StorageError: when there is no space, or the place cannot be written to.
    """
    target = Path(os.path.realpath(path))
    temporary = _temporary(target)
    size = sum(memoryview(piece).nbytes for piece in pieces)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, _CREATE | os.O_EXCL, 0o666)
        try:
            for piece in pieces:
                _write_all(descriptor, piece)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if prove is not None:
            prove(temporary)
        if keep_as is not None:
            _keep(target, keep_as)
        os.replace(temporary, target)
        sync_folder(target.parent)
    except StorageError:
        raise
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # what it took is free again
        raise StorageError(f"cannot write {path}: {reason(error, target, size)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(target: Path) -> Path:
    """A new name beside `target`, no longer than any system allows, that says whose it is."""
    return target.with_name(f"{_mark(target.name)}{secrets.token_hex(6)}.tmp")


def _mark(name: str) -> str:
    return f".mygpt-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}-"


def strays(folder: Path, name: str | None = None) -> list[Path]:
    """Temporary files in `folder`, of the file called `name` or of all: dead writers' leavings."""
    return sorted(folder.glob(f"{'.mygpt-' if name is None else _mark(name)}*.tmp"))


def remove(*paths: Path) -> None:
    """Remove files, where they are there; `StorageError` where that cannot be done."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot remove {path}: {error.strerror}") from error


def append(path: Path, data: bytes) -> None:
    """Add to a file's end; `StorageError` where that cannot be done."""
    _on_file(path, os.O_APPEND, lambda descriptor: _write_all(descriptor, data))


def sync_length(path: Path) -> int:
    """Make a file durable; return its length in bytes."""

    def sync(descriptor: int) -> int:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size

    return _on_file(path, os.O_APPEND, sync)


def cut(path: Path, length: int) -> None:
    """Drop what stands in a file past `length` bytes."""
    if path.exists() and path.stat().st_size > length:
        _on_file(path, 0, lambda descriptor: os.ftruncate(descriptor, length))


def _on_file(path: Path, flags: int, action: Callable[[int], Any]) -> Any:
    try:
        descriptor = os.open(path, _CREATE | flags, 0o666)
        try:
            return action(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {reason(error, path, 0)}") from error


def _write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    left = memoryview(data)
    while left:  # the system may take less than it was given
        left = left[os.write(descriptor, left[: 1 << 26]) :]


def _keep(target: Path, keep_as: Path) -> None:
    """Give the file at `target`, if there is one, a second name, so that it always has one."""
    if not target.exists():
        return
    temporary = _temporary(keep_as)
    try:
        os.link(target, temporary)
        os.replace(temporary, keep_as)
    except OSError:  # a file system without links: for a moment only `keep_as` is there
        os.replace(target, keep_as)
    finally:
        with contextlib.suppress(OSError):  # renaming onto itself leaves it
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    if os.name == "nt":  # Windows has no folder to sync
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # it cannot sync folders
            raise
    finally:
        os.close(descriptor)


def reason(error: OSError, target: Path, size: int) -> str:
    """Why the system refused; how much is free, where that is the matter."""
    import shutil

    text = error.strerror or str(error)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return text
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(target.parent).free
        need = f"{size:,} bytes are wanted and " if size else ""
        return f"{text} ({need}{free:,} are free there): make room, then go on"
    return text


class RunLock:
    """One writer for a folder: the lock is held until it is left, or its holder dies.

    Attributes:
        works: False on a file system without locks, where nothing is held.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.works = True
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        """Take the lock.

        Raises:
            InputError: when another process has it.
            StorageError: when the folder cannot be written to.
        """
        import socket

        path = _lock_path(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise StorageError(
                f"cannot write to {self.folder}: {error.strerror}: choose another --output"
            ) from error
        until = time.monotonic() + _PATIENCE_S
        while (taken := _take(self._descriptor)) is False and time.monotonic() < until:
            time.sleep(0.02)
        if taken is False:
            holder = _written_holder(path)
            self._release()
            raise InputError(
                f"{self.folder} is being trained by {holder}: wait until it ends, stop it, or "
                "choose another --output"
            )
        self.works = taken is not None
        with contextlib.suppress(OSError):  # only for people
            os.ftruncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        # The file stays: if it went, two could each hold a lock on a file of that name.
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def holder(folder: Path) -> str | None:
    """Who trains in `folder` now; None when nobody does. Changes nothing."""
    path = _lock_path(folder)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return _written_holder(path) if _take(descriptor, shared=True) is False else None
    finally:
        os.close(descriptor)


def _lock_path(folder: Path) -> Path:
    return folder / ".lock"


def _written_holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")[:200] or "another process"
    return "another process"


def _take(descriptor: int, *, shared: bool = False) -> bool | None:
    """Whether the lock was free and is ours now; None where the file system has none."""
    try:
        if os.name == "nt":
            import msvcrt

            windows: Any = msvcrt
            os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # past the text, which stays readable
            windows.locking(descriptor, windows.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        none = {getattr(errno, name) for name in _NO_LOCKS if hasattr(errno, name)}
        return None if error.errno in none else False
    return True
