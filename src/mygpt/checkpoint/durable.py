"""Atomic, durable writes of files and folders: after a crash, the old or the new one is intact.

A file is written under a temporary name in the same folder, synced (fsync), optionally verified
by reading it back, and renamed over the old file; then the folder is synced. If the process is
killed at any point, the old or the new file is complete. After a power failure the same holds if
the disk honours fsync.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mygpt.checkpoint.locks import try_lock
from mygpt.errors import InputError, StorageError
from mygpt.file_access import NO_LINK, NO_WAIT, open_descriptor, read_inside, require_regular

Pieces = Sequence[bytes | bytearray | memoryview]

_CREATE = os.O_WRONLY | os.O_CREAT
_OLD = ".old.tmp"  # ending of the temporary name of a folder that is being replaced


def write_durably(
    path: str | Path,
    pieces: Pieces,
    *,
    verify: Callable[[Path], None] | None = None,
    keep_as: Path | None = None,
    inside: bool = False,
    mode: int = 0o666,
) -> None:
    """Replace a file atomically: a crash leaves the old file or the new one, both complete.

    If `path` is a symbolic link, the file that it points to is replaced. A device or a pipe is
    never replaced.

    Args:
        path: the file.
        pieces: the content, in order.
        verify: called with the synced temporary file before it replaces the old one; if it
            raises, the old file stays.
        keep_as: the name under which the old file is kept, in the same folder.
        inside: the file is in a folder whose content is not trusted: a link is an error.
        mode: the file's permissions, before the umask.

    Raises:
        StorageError: if there is no space, or the folder cannot be written to.
        CheckpointError: if `path` is not a regular file; nothing is written then.
    """
    target = Path(path) if inside else Path(os.path.realpath(path))
    temporary = temporary_name(target)
    size = sum(memoryview(piece).nbytes for piece in pieces)
    with storage_errors(path, target, size):
        require_regular(target)
        if not inside:
            remove_abandoned(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _written(temporary, pieces, mode):
            if verify is not None:
                verify(temporary)
            require_regular(target)  # a rename would replace a device, too
            if keep_as is not None:
                require_regular(keep_as)
                _keep(target, keep_as)
            os.replace(temporary, target)
            sync_folder(target.parent)


@contextlib.contextmanager
def storage_errors(path: str | Path, target: Path, size: int = 0) -> Iterator[None]:
    """Inside, raise `StorageError` in place of `OSError`.

    Args:
        path: what is written, for the message.
        target: the file, or a folder on the same disk.
        size: bytes that are written; 0 if that is not known.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write {path}: {reason(error, target, size)}") from error


@contextlib.contextmanager
def _written(temporary: Path, pieces: Pieces, mode: int) -> Iterator[None]:
    """A temporary file, written and synced; it is removed on exit unless it was renamed."""
    with contextlib.ExitStack() as held:
        held.callback(_remove_quietly, temporary)
        descriptor = open_descriptor(temporary, _CREATE | os.O_EXCL, mode=mode)
        try:
            held.enter_context(in_use(temporary, descriptor))
            for piece in pieces:
                _write_all(descriptor, piece)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        yield


def _remove_quietly(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def temporary_name(target: Path, ending: str = ".tmp") -> Path:
    """A new name in the folder of `target` that identifies `target`, short enough for any system.

    `remove_abandoned(target)` finds files of such names.
    """
    return target.with_name(f"{_mark(target.name)}{secrets.token_hex(6)}{ending}")


@contextlib.contextmanager
def in_use(temporary: Path, descriptor: int | None = None) -> Iterator[None]:
    """Hold a lock that protects a temporary file or folder from `remove_abandoned`.

    Args:
        temporary: the file or folder.
        descriptor: of it, if it is open already.

    Raises:
        FileNotFoundError: if another process has just removed it.
    """
    if os.name == "nt":  # Windows neither renames nor removes open files
        yield
        return
    held = os.open(temporary, os.O_RDONLY) if descriptor is None else os.dup(descriptor)
    try:
        while try_lock(held, shared=True) is False:  # another process is removing the file
            time.sleep(0.001)
        if not os.path.lexists(temporary):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(temporary))
        yield
    finally:
        os.close(held)


def abandoned(path: Path, ending: str = ".tmp") -> Iterator[tuple[Path, bool]]:
    """Temporary files and folders that killed writers of `path` left; True marks a folder.

    A writer locks its temporary file or folder, and the lock ends with its process. Each one
    yielded here is locked until the next is requested. Those of other users are skipped.
    """
    target = Path(os.path.realpath(path))
    for temporary in temporary_files(target.parent, target.name, ending):
        try:
            descriptor = os.open(temporary, os.O_RDONLY | NO_LINK | NO_WAIT)
        except OSError:
            continue
        try:
            status = os.fstat(descriptor)
            ours = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
            folder = stat.S_ISDIR(status.st_mode)
            if ours and (folder or stat.S_ISREG(status.st_mode)) and try_lock(descriptor) is True:
                yield temporary, folder
        finally:
            os.close(descriptor)


def remove_abandoned(path: Path) -> None:
    """Remove the temporary files of killed writers of `path`; those of running ones stay."""
    for temporary, is_folder in abandoned(path):
        if is_folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            _remove_quietly(temporary)


def _mark(name: str) -> str:
    return f".mygpt-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}-"


def temporary_files(folder: Path, name: str | None = None, ending: str = ".tmp") -> list[Path]:
    """The temporary files in `folder`: for the file called `name`, or for all files."""
    return sorted(folder.glob(f"{'.mygpt-' if name is None else _mark(name)}*{ending}"))


@contextlib.contextmanager
def atomic_folder(folder: Path, ours: frozenset[str], *, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder to fill; on exit without an error it is renamed to `folder`.

    Args:
        folder: the final name.
        ours: the file names that an export writes: only a folder without other files is replaced.
        overwrite: whether an existing folder may be replaced.

    Raises:
        InputError: if `folder` exists and may not be replaced.
        StorageError: if it cannot be written.
    """
    target = Path(os.path.realpath(folder))
    _restore_abandoned(target, ours)
    _require_free(folder, target, ours, overwrite=overwrite)
    remove_abandoned(target)
    place, old = temporary_name(target), temporary_name(target, _OLD)
    with storage_errors(folder, target), contextlib.ExitStack() as held:
        try:
            place.mkdir(parents=True)
            held.enter_context(in_use(place))
            yield place
            _require_free(folder, target, ours, overwrite=overwrite)  # it may be new
            if target.exists():
                held.enter_context(in_use(target))
                target.rename(old)
            place.rename(target)
            sync_folder(target.parent)
        finally:  # restore the old folder if a signal arrived between the two renames
            if not os.path.lexists(target) and old.exists():
                with contextlib.suppress(OSError):
                    old.rename(target)
            shutil.rmtree(place, ignore_errors=True)
            if os.path.lexists(target):
                shutil.rmtree(old, ignore_errors=True)


def _restore_abandoned(target: Path, ours: frozenset[str]) -> None:
    """Restore an export that a killed writer had renamed, but not yet replaced by a new one."""
    if os.path.lexists(target):
        return
    for old, is_folder in abandoned(target, _OLD):
        if is_folder and {entry.name for entry in old.iterdir()} <= ours:
            old.rename(target)
            return


def _require_free(folder: Path, target: Path, ours: frozenset[str], *, overwrite: bool) -> None:
    """Raise `InputError` if `target` exists, unless it is an export that may be replaced."""
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise InputError(f"{folder} is a file: an export is a folder, choose another name")
    if not overwrite:
        raise InputError(f"{folder} exists already: add --overwrite, or choose another name")
    others = sorted(entry.name for entry in target.iterdir() if entry.name not in ours)
    if others:
        raise InputError(
            f"{folder} holds {others[0]!r:.80}, which no export wrote: choose another folder"
        )


def remove(*paths: Path) -> None:
    """Remove files, if they exist; `StorageError` if one cannot be removed."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot remove {path}: {error.strerror}") from error


def append(path: Path, data: bytes) -> None:
    """Append `data` to a file; `StorageError` if it cannot be written.

    A symbolic link is an error. A file with several hard links is copied first, so that the file
    under its other names does not change; `sync_length` and `truncate` do the same.
    """
    _on_file(path, os.O_APPEND, lambda descriptor: _write_all(descriptor, data))


def sync_length(path: Path) -> int:
    """Sync a file to disk; return its length in bytes."""

    def sync(descriptor: int) -> int:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size

    return _on_file(path, os.O_APPEND, sync)


def truncate(path: Path, length: int) -> None:
    """Cut a file to `length` bytes; a missing or shorter one is left alone."""
    status = require_regular(path)
    if status is not None and status.st_size > length:
        _on_file(path, 0, lambda descriptor: os.ftruncate(descriptor, length))


def _on_file(path: Path, flags: int, action: Callable[[int], Any]) -> Any:
    with storage_errors(path, path):
        descriptor = open_descriptor(path, _CREATE | flags)
        if os.fstat(descriptor).st_nlink > 1:
            os.close(descriptor)
            write_durably(path, [read_inside(path)], inside=True)
            descriptor = open_descriptor(path, _CREATE | flags)
        try:
            return action(descriptor)
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    left = memoryview(data)
    while left:  # `os.write` may write less than it was given
        left = left[os.write(descriptor, left[: 1 << 26]) :]


def _keep(target: Path, keep_as: Path) -> None:
    """Also name the file at `target`, if there is one, `keep_as`, by a hard link."""
    if not target.exists():
        return
    temporary = temporary_name(keep_as)
    try:
        os.link(target, temporary)
        os.replace(temporary, keep_as)
    except OSError:  # no hard links here: until the new file is renamed, only `keep_as` exists
        os.replace(target, keep_as)
    finally:
        _remove_quietly(temporary)  # `os.replace` does nothing if both names are one file


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that renames in it survive a power failure, if the system can do that."""
    if os.name == "nt":  # Windows cannot sync a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system cannot sync folders
            raise
    finally:
        os.close(descriptor)


def reason(error: OSError, target: Path, size: int) -> str:
    """The text of an error from writing `size` bytes (0: unknown) to `target`.

    If the disk is full, it states the free space.
    """
    text = error.strerror or str(error)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return text
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(target.parent).free
        need = f"{size:,} bytes are needed and " if size else ""
        return f"{text} ({need}{free:,} bytes are free there): free some space, then try again"
    return text
