"""Reading JSON objects from untrusted files, with limits on bytes, values and nesting depth.

A limit on bytes alone does not bound the parser's memory: each `{}` of two bytes becomes a dict of
64. So an upper bound of the number of values is counted before the text is parsed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mygpt.errors import InputError
from mygpt.file_access import open_regular


class Limits(NamedTuple):
    """The limits for one kind of file.

    Attributes:
        most_bytes: the maximal length of the file.
        most_values: the maximal number of objects, lists, strings and numbers, without keys.
    """

    most_bytes: int
    most_values: int


SETTINGS = Limits(2**22, 2**16)  # config.json and similar files: some dozens of values
TOKENIZER_SETTINGS = Limits(2**25, 2**20)  # tokenizer_config.json lists all added tokens
TENSORS = Limits(2**26, 2**21)  # a header or an index: ten thousand tensors, six values each
TOKENIZER = Limits(2**28, 2**23)  # a million tokens and their merges: four million values
LOG_LINE = Limits(2**22, 2**16)  # a record of a run's log: some numbers, or the text of a sample
STATE = Limits(2**29, 2**23)  # JSON parts that mygpt writes: a tokenizer, a token store's index

_MOST_STEPS = 2**53  # of a training run
_DEEPEST = 100  # levels of nesting; files of tokenizers have about ten


def parse_object(data: bytes | str, limits: Limits) -> dict[str, Any]:
    """Parse a text that is one JSON object.

    Raises:
        ValueError: with one short line, if the text is not a JSON object, exceeds the limits, or
            has two values for one key (programs differ in which of them they use).
    """
    check_size(data, limits)
    text = data if isinstance(data, str) else data.decode("utf-8")
    try:
        found = json.loads(text, object_pairs_hook=without_duplicates)
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    level: list[Any] = [found]
    for _ in range(_DEEPEST):
        items = (v for held in level for v in (held.values() if type(held) is dict else held))
        level = [value for value in items if type(value) in (dict, list)]
        if not level:
            return found
    raise _too_deep()


def check_size(data: bytes | str, limits: Limits) -> None:
    """Raise `ValueError` if a JSON text exceeds the limits on bytes or values."""
    if len(data) > limits.most_bytes:
        raise ValueError(f"it is longer than {limits.most_bytes:,} bytes")
    if isinstance(data, str):
        count = data.count(",") + data.count("[") + data.count("{")
    else:
        count = data.count(b",") + data.count(b"[") + data.count(b"{")
    if count > limits.most_values:
        raise ValueError(f"it has more than {limits.most_values:,} values")


def _too_deep() -> ValueError:
    return ValueError(f"its values are nested more than {_DEEPEST} levels deep")


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` that refuses two values for one key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"it has two values for the key {twice[:40]!r}")
    return found


def read_object(
    path: str | Path, limits: Limits, problem: str = "is damaged, or not a JSON object"
) -> dict[str, Any]:
    """Read a file that is one JSON object.

    Args:
        path: the file.
        limits: for this kind of file.
        problem: what the message says about a file that `parse_object` refuses.

    Raises:
        InputError: naming the file, if it does not exist, cannot be read, or is refused by
            `parse_object`.
    """
    try:
        with open_regular(path, inside=False) as file:
            data = file.read(limits.most_bytes + 1)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: {error.strerror}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return parse_object(data, limits)
    except ValueError as error:
        raise InputError(f"{path} {problem}: {error}") from None


def read_records(log: Path, *, after: int = 0) -> Iterator[dict[str, Any]]:
    """The records of a run's log, one per line; lines that are not JSON objects are skipped.

    Args:
        log: the log file in a run folder.
        after: the number of bytes at the beginning to skip.

    Raises:
        CheckpointError: if it is a link, a pipe or a device.
        OSError: if it cannot be read.
    """
    with open_regular(log) as file:
        file.seek(after)
        continued = False  # whether this is the rest of a line that is longer than the limit
        while line := file.readline(LOG_LINE.most_bytes):
            record = None if continued else parse_record(line)
            continued = not line.endswith(b"\n")
            if record is not None:
                yield record


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record in one line of a log; None if the line is not a JSON object."""
    try:
        return parse_object(line.decode("utf-8", "replace"), LOG_LINE)
    except ValueError:
        return None


def step_of(record: dict[str, Any]) -> int | None:
    """The training step of a record; None if it has none, or one that is out of range."""
    step = record.get("step")
    return step if type(step) is int and 0 <= step < _MOST_STEPS else None
