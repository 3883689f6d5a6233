"""Opening files in folders that are not trusted: no links, pipes or devices, and no blocking.

A run folder, a token store, an export or a cache may come from an archive, or other users may be
able to write to it. A symbolic link in it could redirect a write to another file of the user, a
pipe could block for ever, and a device may be endless. A path that the user gives may be a link;
a path inside such a folder may not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import Any

from mygpt.errors import CheckpointError, InputError

NO_LINK = getattr(os, "O_NOFOLLOW", 0)
NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)
PRIVATE_FOLDER, PRIVATE_FILE = 0o700, 0o600


def require_path(name: str, value: Any) -> None:
    """Raise `InputError` unless `value` is a name that a file or folder can have."""
    if not isinstance(value, (str, os.PathLike)) or not str(value) or "\0" in str(value):
        raise InputError(f"{name}={value!r:.300} must be the name of a file or folder")


def require_regular(path: str | Path, *, inside: bool = True) -> os.stat_result | None:
    """The status of a regular file or folder; None if nothing has that name.

    Args:
        path: the file.
        inside: the file is in a folder whose content is not trusted: a link is an error.

    Raises:
        CheckpointError: for a link (with `inside`), a pipe, a socket or a device.
        OSError: if the status cannot be read.
    """
    try:
        status = os.lstat(path) if inside else os.stat(path)
    except (FileNotFoundError, NotADirectoryError):  # the second is reported when writing fails
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # no file has such a name
            return None
        raise
    _check(path, status)
    return status


def require_folder(path: str | Path) -> None:
    """Check that a path inside an untrusted folder is a folder, or does not exist.

    Raises:
        CheckpointError: if it is a file, a link, a pipe or a device.
    """
    status = require_regular(path)
    if status is not None and not stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{path} is a file, and a folder is expected: remove it")


def open_descriptor(path: str | Path, flags: int, *, inside: bool = True, mode: int = 0o666) -> int:
    """`os.open` for regular files only; it never blocks, and with `inside` follows no link.

    Raises:
        CheckpointError: as `require_regular`.
        OSError: as `os.open`; IsADirectoryError for a folder.
    """
    require_regular(path, inside=inside)  # before opening: opening a device can have side effects
    try:
        descriptor = os.open(path, flags | _BINARY | NO_WAIT | (NO_LINK if inside else 0), mode)
    except OSError:
        require_regular(path, inside=inside)  # it may have been replaced since the first check
        raise
    try:
        status = os.fstat(descriptor)
        _check(path, status)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_regular(path: str | Path, mode: str = "rb", *, inside: bool = True, **how: Any) -> Any:
    """`open` for regular files only; arguments and errors as `open_descriptor`."""

    def opener(name: str, flags: int) -> int:
        return open_descriptor(name, flags, inside=inside)

    return open(path, mode, opener=opener, **how)


def read_inside(path: str | Path) -> bytes:
    """The content of a regular file in an untrusted folder; raises as `open_descriptor`."""
    with open_regular(path) as file:
        data: bytes = file.read()
    return data


def _check(path: str | Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise CheckpointError(
            f"{path} is a symbolic link: links inside such a folder are not followed; remove it, "
            "or put the file itself there"
        )
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise CheckpointError(
            f"{path} is a device or a pipe, and a file is expected: give another path"
        )


def make_private_folder(folder: Path) -> None:
    """Create a folder and its missing parents; other users can neither read nor write them."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    for place in reversed(missing):
        with contextlib.suppress(FileExistsError):
            place.mkdir(PRIVATE_FOLDER)


def file_mode(folder: Path) -> int:
    """The permissions, before the umask, for a new file: private if its folder is private."""
    return 0o666 if os.stat(folder).st_mode & 0o077 else PRIVATE_FILE


def is_private(status: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user or root, and no other user can write to it."""
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022


def not_private(folder: Path, *, above: bool = True) -> str | None:
    """Why another user could have written files in a folder; None if no other user could.

    A link is not accepted, since its target can change. A user who can write to a parent folder
    can replace this folder, unless the parent has the sticky bit; parents of root are trusted.

    Args:
        folder: the folder.
        above: whether to check its parents too.
    """
    if not hasattr(os, "geteuid"):
        return None
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        return f"{folder} is a symbolic link, or not a folder"
    if not is_private(status):
        return _whose(folder, status)
    for place in Path(os.path.realpath(folder)).parents if above else ():
        status = os.stat(place)
        if status.st_uid == 0 or status.st_mode & stat.S_ISVTX:
            return None
        shared = status.st_mode & 0o020 and not _is_own_group(status.st_gid)
        if status.st_uid != os.geteuid() or status.st_mode & 0o002 or shared:
            return _whose(place, status)
    return None


def _whose(folder: Path, status: os.stat_result) -> str:
    if status.st_uid not in (os.geteuid(), 0):
        return f"{folder} belongs to another user"
    mode = stat.S_IMODE(status.st_mode)
    return f"other users can write to {folder} (mode {mode:o}; run chmod go-w on it)"


def _is_own_group(number: int) -> bool:
    """Whether a group is this user's own: of the same name, and without other members."""
    try:
        import grp
        import pwd

        me, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(number)
    except (ImportError, KeyError):
        return False
    alone = set(group.gr_mem) <= {me.pw_name}
    return number == me.pw_gid and group.gr_name == me.pw_name and alone


def cache_folder() -> Path:
    """The folder of all caches: MYGPT_CACHE, else `mygpt` in the user's cache folder.

    Raises:
        RuntimeError: for a user without a home directory.
    """
    chosen = os.environ.get("MYGPT_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(chosen) if chosen else Path(home) / "mygpt"
