"""The files that a run's state names, and whether they may be read if the user names none.

A run's folder may come from somebody else, and its state may name any file of this user. A text
must have the SHA-256 in the state, so another file is never trained on or shown; and a file that
only the state names is not even read unless it has the size that the run found.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shlex
import stat
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mygpt.data.token_store import is_store
from mygpt.errors import InputError
from mygpt.text import Corpus, RecordOptions, read_corpus
from mygpt.text.corpus import KEPT_TEXTS
from mygpt.text.reading import shown

_INDEX = "index.json"  # of a token store, which may be copied elsewhere


def file_sizes(settings: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The sizes by which a run recognises the files that its settings name.

    A file's size; a token store's size of its index; of another folder (for a pattern, the one
    that it begins with) the total size of its files, and its inode number.
    """
    return {name: found for name in names_in(settings) if (found := _seen(name))}


def names_in(settings: Mapping[str, Any]) -> list[str]:
    """The names of everything that is read for a run, except standard input."""
    names = [*settings["files"], settings["val_file"]]
    return [name for name in names if name is not None and name != "-"]


def with_kept_texts(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A state's settings, in which texts of the run's folder are where the folder is now."""
    present = {
        name: str(folder / Path(name).name)
        for name in settings["files"]
        if KEPT_TEXTS.fullmatch(Path(name).name) and not os.path.lexists(name)
    }
    seen = settings.get("seen")
    if not present or not isinstance(seen, dict):
        return settings
    return {
        **settings,
        "files": [present.get(name, name) for name in settings["files"]],
        "seen": {present.get(name, name): size for name, size in seen.items()},
    }


def named(files: object) -> list[str]:
    """The names of the texts to train on; empty for the built-in one."""
    if files is None or isinstance(files, (str, Path)):
        return [] if files is None else [str(files)]
    if isinstance(files, bytes) or not isinstance(files, Iterable):
        raise InputError(f"files={files!r:.40} must be a name or several")
    names = [str(name) for name in files]
    if not names:
        raise InputError("files is an empty list: name a text, or omit it for the built-in one")
    return names


def resolved(name: str) -> str:
    """The absolute path of a name."""
    # Names with a NUL have no path: reading reports that.
    return name if name == "-" or "\0" in name else os.path.realpath(name)


def require_unchanged_files(
    settings: Mapping[str, Any],
    run: str | Path,
    named: Container[str],
    command: Sequence[str],
    option: str | None = None,
) -> None:
    """Raise `InputError` for a file that only a state names and whose size has changed.

    No file is read. A state without sizes is of an older mygpt, or a forgery: it may only name
    files in the working directory or in the run's parent folder.

    Args:
        settings: of the state.
        run: the run.
        named: "files" and "val_file", if the user names them.
        command: the command to which the user can add the names of the files.
        option: the option of that command for each file.

    Raises:
        InputError: naming the file.
    """
    kept, validation = settings.get("seen"), settings["val_file"]
    of_the_state = [] if "files" in named else [*settings["files"]]
    of_the_state += [] if "val_file" in named or validation is None else [validation]
    for name in of_the_state:
        if name == "-" or not os.path.lexists(_fixed_part(name)):
            continue  # reading it reports that
        if kept is None and any(_is_below(name, at) for at in (Path.cwd(), Path(run).parent)):
            continue
        known = kept.get(name) if isinstance(kept, dict) else None
        if not isinstance(known, dict) or not set(_seen(name, known).items()) & set(known.items()):
            raise InputError(
                f"the text of {run} has changed since the run began, or is not its text: "
                f"{shown(name)} has another size than then, and is not read unless it is named: "
                f"put it back, or {_naming(settings, command, option)}"
            )


def _naming(settings: Mapping[str, Any], command: Sequence[str], option: str | None) -> str:
    """The command with the names of all files of a run."""
    words = [*command]
    for name in settings["files"]:
        words += [name] if option is None else [option, name]
    validation = settings["val_file"]
    return shlex.join([*words, *([] if validation is None else ["--val-file", validation])])


def _seen(name: str, known: Mapping[str, Any] | None = None) -> dict[str, int]:
    """The size of a file or folder; empty for anything else.

    Adding up a folder stops above its known size.
    """
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
    """A name; for a pattern the folder that it begins with."""
    if os.path.lexists(name) or not glob.has_magic(name):
        return name
    path = Path(name)
    return str(next(place for place in path.parents if not glob.has_magic(str(place))))


def _is_below(name: str, folder: Path) -> bool:
    return Path(os.path.realpath(_fixed_part(name))).is_relative_to(os.path.realpath(folder))


def read_as_set(
    names: Sequence[str],
    settings: Mapping[str, Any],
    *,
    allow_bytes: bool,
    refuse_unused: bool = True,
) -> Corpus:
    """Read files into memory in the way that a run's settings say; arguments as `read_corpus`."""
    return read_corpus(
        names,
        encoding=settings["encoding"],
        allow_bytes=allow_bytes,
        split=splits(settings),
        records=records_of(settings, refuse_unused=refuse_unused),
    )


def splits(settings: Mapping[str, Any]) -> bool:
    """Whether a run's text is split at `SEPARATOR`; the states of older runs do not say."""
    return bool(settings.get("split_documents", False))


def records_of(settings: Mapping[str, Any], *, refuse_unused: bool = True) -> RecordOptions | None:
    """How a run's files of records are read; None where they are plain text to it."""
    field = settings.get("field")
    return (
        None
        if field is None
        else RecordOptions(field or None, lines_may_be_plain=True, refuse_unused=refuse_unused)
    )


def stores_among(names: Sequence[str]) -> list[str]:
    """Those of the names that are token stores."""
    return [name for name in names if is_store(name)]
