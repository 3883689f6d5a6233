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
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mygpt.errors import CheckpointError, InputError, StorageError
from mygpt.file_access import (
    NO_LINK,
    NO_WAIT,
    file_mode,
    open_descriptor,
    open_regular,
    read_inside,
    require_regular,
)

_NO_LOCKS = ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL")
_CREATE = os.O_WRONLY | os.O_CREAT
_PATIENCE_S = 0.2  # whoever only asks who holds the lock has it for a moment


def write_durably(
    path: str | Path,
    pieces: Sequence[bytes | bytearray | memoryview],
    *,
    prove: Callable[[Path], None] | None = None,
    keep_as: Path | None = None,
    inside: bool = False,
    mode: int = 0o666,
) -> None:
    """Replace a file by `pieces` in a row so that a crash leaves the old file or the new one.

    A link that the user names stays one, and the file that it points to is replaced. A device or
    a pipe is never replaced.

    Args:
        path: the file.
        pieces: its content.
        prove: is called with the synced temporary file before that takes the old one's place;
            what it raises ends the writing.
        keep_as: the name under which the old file is kept, in the same folder.
        inside: the file is in a folder that somebody else may have filled: a link is refused.
        mode: of the file, less what the umask takes.

    Raises:
        StorageError: when there is no space, or the place cannot be written to.
        CheckpointError: for what is no regular file; nothing is written then.
    """
    target = Path(path) if inside else Path(os.path.realpath(path))
    temporary = temporary_beside(target)
    size = sum(memoryview(piece).nbytes for piece in pieces)
    held = contextlib.ExitStack()
    try:
        require_regular(target)
        if not inside:
            remove_abandoned(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_descriptor(temporary, _CREATE | os.O_EXCL, mode=mode)
        try:
            held.enter_context(in_use(temporary, descriptor))
            for piece in pieces:
                _write_all(descriptor, piece)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if prove is not None:
            prove(temporary)
        require_regular(target)  # what is renamed onto a device takes its place
        if keep_as is not None:
            require_regular(keep_as)
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
        held.close()


def temporary_beside(target: Path, ending: str = ".tmp") -> Path:
    """A new name beside `target`, no longer than any system allows, that says whose it is."""
    return target.with_name(f"{_mark(target.name)}{secrets.token_hex(6)}{ending}")


@contextlib.contextmanager
def in_use(temporary: Path, descriptor: int | None = None) -> Iterator[None]:
    """Keep `remove_abandoned` from a temporary file or folder while its writer lives.

    Raises:
        FileNotFoundError: where another process has just removed it.
    """
    if os.name == "nt":  # an open file can neither be renamed nor removed there
        yield
        return
    held = os.open(temporary, os.O_RDONLY) if descriptor is None else os.dup(descriptor)
    try:
        while _take(held, shared=True) is False:  # whoever holds it is removing the file
            time.sleep(0.001)
        if not os.path.lexists(temporary):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(temporary))
        yield
    finally:
        os.close(held)


def abandoned(path: Path, ending: str = ".tmp") -> Iterator[tuple[Path, bool]]:
    """What killed writers of `path` left beside it, each with whether it is a folder.

    A writer holds a lock on its temporary file or folder, which ends with the process; here it is
    held until the next one is asked for. Another user's are passed over.
    """
    target = Path(os.path.realpath(path))
    for stray in strays(target.parent, target.name, ending):
        try:
            descriptor = os.open(stray, os.O_RDONLY | NO_LINK | NO_WAIT)
        except OSError:
            continue
        try:
            status = os.fstat(descriptor)
            ours = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
            folder = stat.S_ISDIR(status.st_mode)
            if ours and (folder or stat.S_ISREG(status.st_mode)) and _take(descriptor) is True:
                yield stray, folder
        finally:
            os.close(descriptor)


def remove_abandoned(path: Path) -> None:
    """Remove what killed writers of `path` left beside it; of living ones nothing."""
    import shutil

    for stray, is_folder in abandoned(path):
        if is_folder:
            shutil.rmtree(stray, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                stray.unlink()


def _mark(name: str) -> str:
    return f".mygpt-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}-"


def strays(folder: Path, name: str | None = None, ending: str = ".tmp") -> list[Path]:
    """Temporary files in `folder`, of the file called `name` or of all: dead writers' leavings."""
    return sorted(folder.glob(f"{'.mygpt-' if name is None else _mark(name)}*{ending}"))


def remove(*paths: Path) -> None:
    """Remove files, where they are there; `StorageError` where that cannot be done."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot remove {path}: {error.strerror}") from error


def append(path: Path, data: bytes) -> None:
    """Add to a file's end; `StorageError` where that cannot be done.

    As below, a link is not followed, and a file that has a second name is copied first: the other
    name (a hard link) keeps what it has.
    """
    _on_file(path, os.O_APPEND, lambda descriptor: _write_all(descriptor, data))


def sync_length(path: Path) -> int:
    """Make a file durable; return its length in bytes."""

    def sync(descriptor: int) -> int:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size

    return _on_file(path, os.O_APPEND, sync)


def cut(path: Path, length: int) -> None:
    """Drop what stands in a file past `length` bytes."""
    status = require_regular(path)
    if status is not None and status.st_size > length:
        _on_file(path, 0, lambda descriptor: os.ftruncate(descriptor, length))


def _on_file(path: Path, flags: int, action: Callable[[int], Any]) -> Any:
    try:
        descriptor = open_descriptor(path, _CREATE | flags)
        if os.fstat(descriptor).st_nlink > 1:
            os.close(descriptor)
            write_durably(path, [read_inside(path)], inside=True)
            descriptor = open_descriptor(path, _CREATE | flags)
        try:
            return action(descriptor)
        finally:
            os.close(descriptor)
    except StorageError:
        raise
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
    temporary = temporary_beside(keep_as)
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

    Args:
        folder: what is locked.
        otherwise: what to do where it cannot be, for messages.

    Attributes:
        works: False on a file system without locks, where nothing is held.
    """

    def __init__(self, folder: Path, otherwise: str = "choose another --output") -> None:
        self.folder = folder
        self.otherwise = otherwise
        self.works = True
        self._descriptor: int | None = None
        self._place: int | None = None  # the folder itself, whatever it is called

    def __enter__(self) -> RunLock:
        """Take the lock.

        Raises:
            InputError: when another process has it.
            StorageError: when the folder cannot be written to.
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
        until = time.monotonic() + _PATIENCE_S
        while (taken := _take(self._descriptor)) is False and time.monotonic() < until:
            time.sleep(0.02)
        if taken is False:
            holder = _written_holder(path)
            self._release()
            raise InputError(
                f"{self.folder} is being trained by {holder}: wait until it ends, stop it, or "
                f"{self.otherwise}"
            )
        self.works = taken is not None
        if os.name != "nt":  # a folder with an open file in it cannot be renamed there
            self._place = os.open(self.folder, os.O_RDONLY)
        if os.fstat(self._descriptor).st_nlink > 1:  # somebody's other file, perhaps
            return self
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
        for descriptor in (self._descriptor, self._place):
            if descriptor is not None:
                os.close(descriptor)
        self._descriptor = self._place = None

    def moved_to(self) -> Path | None:
        """Where the locked folder is now, if another or none has its name; None where it is there.

        Raises:
            StorageError: where it has been removed, or cannot be found.
        """
        if self._place is None:
            return None
        ours = os.fstat(self._place)
        try:
            if os.path.samestat(os.stat(self.folder), ours):
                return None
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:  # the system does not say
            return None
        found = _path_of(self._place)
        if found is not None and os.path.realpath(self.folder) == str(found):
            return None  # a file system that numbers its folders anew
        if found is None or not found.is_dir() or not os.path.samestat(os.stat(found), ours):
            raise StorageError(
                f"{self.folder} was removed or moved away while this process wrote in it"
            )
        return found


def _path_of(descriptor: int) -> Path | None:
    """What an open folder is called now; None where the system does not say."""
    with contextlib.suppress(OSError):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    import fcntl

    with contextlib.suppress(OSError, AttributeError):
        command = getattr(fcntl, "F_GETPATH")  # noqa: B009  # macOS alone has it
        return Path(os.fsdecode(fcntl.fcntl(descriptor, command, bytes(1024)).rstrip(b"\0")))
    return None


def holder(folder: Path) -> str | None:
    """Who trains in `folder` now; None when nobody does. Changes nothing."""
    path = lock_path(folder)
    try:
        descriptor = open_descriptor(path, os.O_RDONLY)
    except (OSError, CheckpointError):
        return None
    try:
        return _written_holder(path) if _take(descriptor, shared=True) is False else None
    finally:
        os.close(descriptor)


def lock_path(folder: Path) -> Path:
    """The file whose lock says that somebody writes in `folder`."""
    return folder / ".lock"


def _written_holder(path: Path) -> str:
    with contextlib.suppress(OSError, CheckpointError), open_regular(path) as file:
        if os.fstat(file.fileno()).st_nlink == 1:
            words = file.read(200).decode("utf-8", "replace")
            return words if words and words.isprintable() else "another process"
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
