"""Folders that are whole or not there: made beside their place, and renamed into it at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mygpt.errors import InputError, StorageError
from mygpt.storage import abandoned, in_use, remove_abandoned, temporary_name

_OLD = ".old.tmp"  # of the folder that is being replaced


@contextlib.contextmanager
def whole_folder(folder: Path, ours: frozenset[str], *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that takes its place under `folder` at the end, if nothing was raised.

    Args:
        folder: what it will be called.
        ours: names of files; a folder of such alone may be replaced.
        overwrite: whether it may.

    Raises:
        InputError: where something is there that may not be replaced.
        StorageError: where the place cannot be written to.
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
        _require_free(folder, target, ours, overwrite=overwrite)  # what came to be since
        if target.exists():
            held.enter_context(in_use(target))
            target.rename(old)
        place.rename(target)
        _sync(target.parent)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:  # also where a signal came between the two renamings
        if not os.path.lexists(target) and old.exists():
            with contextlib.suppress(OSError):
                old.rename(target)
        shutil.rmtree(place, ignore_errors=True)
        if os.path.lexists(target):
            shutil.rmtree(old, ignore_errors=True)
        held.close()


def _restore_abandoned(target: Path, ours: frozenset[str]) -> None:
    """Put an export back that a writer had renamed when it was killed, before its own was there."""
    if os.path.lexists(target):
        return
    for old, is_folder in abandoned(target, _OLD):
        if is_folder and {entry.name for entry in old.iterdir()} <= ours:
            old.rename(target)
            return


def _require_free(folder: Path, target: Path, ours: frozenset[str], *, overwrite: bool) -> None:
    """Raise `InputError` unless nothing is at `target`, or an export that may be replaced."""
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise InputError(f"{folder} is a file: an export is a folder, choose another name")
    if not overwrite:
        raise InputError(f"{folder} is there already: --overwrite replaces it")
    others = sorted(entry.name for entry in target.iterdir() if entry.name not in ours)
    if others:
        raise InputError(
            f"{folder} holds {others[0]!r:.80}, which no export wrote: choose another folder"
        )


def _sync(folder: Path) -> None:
    """Make a renaming durable, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
