"""Texts that a Python program passes to `train`: kept in the run's folder, as JSON lines.

A run is resumed by reading its text again. So texts that are in no file are written to one, whose
name has the digest of its content: a file of another run in this folder is never replaced, and
the same texts give the same name. From then on it is a text file as any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

from mygpt.checkpoint.durable import remove, write_durably
from mygpt.errors import InputError
from mygpt.text.records import FIELD
from mygpt.training.run import RunFolder


def refuse_with_texts(**arguments: object) -> None:
    """Raise `InputError` for an argument that says how files are read."""
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise InputError(f"texts are trained on as they are: omit {', '.join(given)}")


@contextmanager
def kept_texts(
    texts: str | Iterable[str], run: RunFolder, *, overwrite: bool, resumes: bool
) -> Iterator[str]:
    """Write texts to a file in the run's folder; gives its name.

    If no run begins inside, because an error is raised before, the file is removed again.

    Args:
        texts: the documents; a single string is one.
        run: the folder; process 0 writes.
        overwrite: replace a run that is already there.
        resumes: a run that is already there is resumed.

    Raises:
        InputError: for what is no text, or a run that would be overwritten.
    """
    data = json_lines(texts)
    if not resumes:
        run.check_free(overwrite=overwrite)
    path = run.folder / f"texts-{hashlib.sha256(data).hexdigest()[:16]}.jsonl"
    before, is_new = _version(run), not path.exists()
    missing = [folder for folder in path.parents if not folder.exists()]
    run.group.run_on_main(lambda: write_durably(path, [data], inside=True) if is_new else None)
    try:
        yield str(path)
    except BaseException:
        if is_new and run.group.is_main and _version(run) == before:
            remove(path)
            for folder in missing:
                with suppress(OSError):  # something else is in it
                    folder.rmdir()
        raise


def _version(run: RunFolder) -> tuple[int, int] | None:
    """What differs once a run has saved a state."""
    with suppress(OSError):
        status = run.state_path.stat()
        return status.st_ino, status.st_mtime_ns
    return None


def json_lines(texts: str | Iterable[str]) -> bytes:
    """A line for each text, in UTF-8: an object whose field "text" is the text.

    Raises:
        InputError: for what is no text, naming its place.
    """
    texts = [texts] if isinstance(texts, str) else texts
    if isinstance(texts, (bytes, Mapping)) or not isinstance(texts, Iterable):
        raise InputError(f"texts={texts!r:.40} must be a list of strings, or one string")
    if hasattr(texts, "columns"):  # iterating gives the names of its columns
        raise InputError("texts is a table: give one of its columns, df['text'] say")
    lines = []
    has_text = False
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f"texts[{number}] is {text!r:.40} ({type(text).__name__}): each must be a string "
                "(remove what is missing, with .dropna() from a column)"
            )
        has_text = has_text or bool(text)
        try:
            lines.append(json.dumps({FIELD: text}, ensure_ascii=False).encode() + b"\n")
        except UnicodeEncodeError:
            raise InputError(
                f"texts[{number}] has half of a surrogate pair, which UTF-8 cannot hold: remove it"
            ) from None
    if not has_text:
        raise InputError("texts has no text in it: give at least one string that is not empty")
    return b"".join(lines)
