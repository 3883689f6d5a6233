"""The files that a run's state names, and whether they may be read without being named again.

A run's folder may be somebody else's, and its state may name any file of this user. What is read
must have the SHA-256 that the state has, so nothing of another file is ever learned or shown; but
a file that only the state names is not even read, where it is not as large as the run found it.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shlex
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mygpt.errors import InputError
from mygpt.text.reading import shown

_INDEX = "index.json"  # of a token store, which may be copied elsewhere


def seen(settings: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """What a run's state keeps of the files that it names, by which they are known again.

    Of a file its size, of a token store its index's; of another folder (of a pattern the one that
    it begins with) the size of all that is in it, and its number on the disk.
    """
    return {name: found for name in names_in(settings) if (found := _seen(name))}


def names_in(settings: Mapping[str, Any]) -> list[str]:
    """All that is read for a run, as its settings name it, standard input apart."""
    names = [*settings["files"], settings["val_file"]]
    return [name for name in names if name is not None and name != "-"]


def require_unchanged_files(
    settings: Mapping[str, Any],
    run: str | Path,
    by_user: tuple[bool, bool] = (False, False),
    *,
    way: Sequence[str],
    option: str | None = None,
) -> None:
    """Refuse what a state alone names, unless it is as the run saw it; nothing is read.

    A state that keeps no sizes is an older mygpt's, or a forged one: it may name what is in the
    working directory or beside the run.

    Args:
        settings: the state's.
        run: the run.
        by_user: whether the user has named the files, and the validation file.
        way: the command that takes the files' names, without them.
        option: what each of them stands behind there.

    Raises:
        InputError: naming the file.
    """
    kept, validation = settings.get("seen"), settings["val_file"]
    of_the_state = [] if by_user[0] else [*settings["files"]]
    of_the_state += [] if by_user[1] or validation is None else [validation]
    for name in of_the_state:
        if name == "-" or not os.path.lexists(_fixed_part(name)):
            continue  # whoever reads it says so
        if kept is None and any(_is_below(name, at) for at in (Path.cwd(), Path(run).parent)):
            continue
        known = kept.get(name) if isinstance(kept, dict) else None
        if not isinstance(known, dict) or not set(_seen(name, known).items()) & set(known.items()):
            raise InputError(
                f"the text of {run} has changed since the run began, or is not its text: "
                f"{shown(name)} is not as the run saw it, and is not read unless it is named: "
                f"put it back, or {_naming(settings, way, option)}"
            )


def _naming(settings: Mapping[str, Any], way: Sequence[str], option: str | None) -> str:
    """The command that names all of a run's files."""
    words = [*way]
    for name in settings["files"]:
        words += [name] if option is None else [option, name]
    validation = settings["val_file"]
    return shlex.join([*words, *([] if validation is None else ["--val-file", validation])])


def _seen(name: str, known: Mapping[str, Any] | None = None) -> dict[str, int]:
    """A file's or a folder's size; empty for what is neither. Adding up ends past a known one."""
    try:
        status = os.stat(_fixed_part(name))
        if stat.S_ISREG(status.st_mode):
            return {"bytes": status.st_size}
        index = os.path.join(name, _INDEX)
        if os.path.isfile(index):
            return {"bytes": os.stat(index).st_size}
    except (OSError, ValueError):
        return {}
    if not stat.S_ISDIR(status.st_mode):
        return {}
    total, most = 0, None if known is None else known.get("bytes")
    if known is None or known.get("inode") != status.st_ino:
        for at, _, files in os.walk(_fixed_part(name)):
            for file in files:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(at, file)).st_size
            if isinstance(most, int) and total > most:
                break
    return {"bytes": total, "inode": status.st_ino}


def _fixed_part(name: str) -> str:
    """A name, or of a pattern the folder that it begins with."""
    if os.path.lexists(name) or not glob.has_magic(name):
        return name
    path = Path(name)
    return str(next(place for place in path.parents if not glob.has_magic(str(place))))


def _is_below(name: str, folder: Path) -> bool:
    return Path(os.path.realpath(_fixed_part(name))).is_relative_to(os.path.realpath(folder))
