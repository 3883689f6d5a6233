"""Opening files that somebody else may have placed: no links, pipes or devices, no waiting.

A run's folder, a token store, an export or a cache may come out of an archive, or be in a folder
that others write to. A symbolic link in it would direct what is written to another file of the
user, a pipe would wait for ever, and a device may have no end. A link that the user names is
followed: it is only what is inside such a folder that is not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import Any

from mygpt.errors import CheckpointError

NO_LINK = getattr(os, "O_NOFOLLOW", 0)
NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)
PRIVATE_FOLDER, PRIVATE_FILE = 0o700, 0o600


def require_regular(path: str | Path, *, inside: bool = True) -> os.stat_result | None:
    """What the system knows of a file; None where nothing has that name. A folder is accepted.

    Args:
        path: the file.
        inside: it is in a folder that somebody else may have filled, so a link is refused too.

    Raises:
        CheckpointError: for a link, a pipe, a socket or a device, naming it.
        OSError: where the system does not say.
    """
    try:
        status = os.lstat(path) if inside else os.stat(path)
    except (FileNotFoundError, NotADirectoryError):  # of the second whoever writes there tells
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # no file has such a name
            return None
        raise
    _check(path, status)
    return status


def require_folder(path: str | Path) -> None:
    """Refuse a folder inside another that is not one itself, but a link; a missing one is fine.

    Raises:
        CheckpointError: naming it.
    """
    status = require_regular(path)
    if status is not None and not stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{path} is a file, and a folder is expected: remove it")


def open_descriptor(path: str | Path, flags: int, *, inside: bool = True, mode: int = 0o666) -> int:
    """`os.open` for regular files alone; never waits, and with `inside` follows no link.

    Raises:
        CheckpointError: as `require_regular`.
        OSError: as `os.open`; IsADirectoryError for a folder.
    """
    require_regular(path, inside=inside)  # opening some devices has effects
    try:
        descriptor = os.open(path, flags | _BINARY | NO_WAIT | (NO_LINK if inside else 0), mode)
    except OSError:
        require_regular(path, inside=inside)  # it has become one since
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
    """`open` for regular files alone, as `open_descriptor`."""

    def opener(name: str, flags: int) -> int:
        return open_descriptor(name, flags, inside=inside)

    return open(path, mode, opener=opener, **how)


def read_inside(path: str | Path) -> bytes:
    """All of a regular file; raises as `open_descriptor`."""
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
        raise CheckpointError(f"{path} is no file, but a device or a pipe: a file is expected")


def make_private_folder(folder: Path) -> None:
    """Make a folder, and what is missing above it, that no other user can read or write."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    for place in reversed(missing):
        with contextlib.suppress(FileExistsError):
            place.mkdir(PRIVATE_FOLDER)


def file_mode(folder: Path) -> int:
    """The mode for files of a folder, less what the umask takes; private in a private folder."""
    return 0o666 if os.stat(folder).st_mode & 0o077 else PRIVATE_FILE


def is_private(status: os.stat_result) -> bool:
    """Whether a file or folder is this user's (or the system's), and no other can write to it."""
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022


def not_private(folder: Path, *, above: bool = True) -> str | None:
    """Why another user may have written what is in a folder; None where none can have.

    A link is not taken for the folder, since what it leads to can change. Whoever can write to a
    folder above can put another one in this one's place, unless that has the sticky bit; those of
    the system are trusted. Without `above` these are not checked.
    """
    if not hasattr(os, "geteuid"):
        return None
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        return f"{folder} is a symbolic link or no folder"
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
        return f"{folder} is another user's"
    return f"others can write to {folder} (mode {stat.S_IMODE(status.st_mode):o}; chmod go-w it)"


def _is_own_group(number: int) -> bool:
    """Whether a group is the one that many systems give each user, without other members."""
    try:
        import grp
        import pwd

        me, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(number)
    except (ImportError, KeyError):
        return False
    alone = set(group.gr_mem) <= {me.pw_name}
    return number == me.pw_gid and group.gr_name == me.pw_name and alone
