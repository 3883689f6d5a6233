"""Atomic creation of folders: a folder is filled under a temporary name and renamed at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mygpt.checkpoint.durable import abandoned, in_use, remove_abandoned, temporary_name
from mygpt.errors import InputError, StorageError

_OLD = ".old.tmp"  # ending of the temporary name of the folder that is being replaced


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
    held = contextlib.ExitStack()
    try:
        place.mkdir(parents=True)
        held.enter_context(in_use(place))
        yield place
        _require_free(folder, target, ours, overwrite=overwrite)  # it may have been created since
        if target.exists():
            held.enter_context(in_use(target))
            target.rename(old)
        place.rename(target)
        _sync(target.parent)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:  # restore the old folder if a signal arrived between the two renames
        if not os.path.lexists(target) and old.exists():
            with contextlib.suppress(OSError):
                old.rename(target)
        shutil.rmtree(place, ignore_errors=True)
        if os.path.lexists(target):
            shutil.rmtree(old, ignore_errors=True)
        held.close()


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


def _sync(folder: Path) -> None:
    """Sync a folder, so that a rename survives a power failure, if the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
