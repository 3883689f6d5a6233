"""JSON objects from files that anybody may have made: read within limits of bytes, values, depth.

A parser's memory is not bounded by the file's size: each `{}` of two bytes becomes a dict of 64.
So the values are counted, from above, before the text is parsed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mygpt.errors import InputError
from mygpt.file_access import open_regular


class Limits(NamedTuple):
    """What a kind of file may have.

    Attributes:
        most_bytes: of the file.
        most_values: objects, lists, strings and numbers in it, keys not counted.
    """

    most_bytes: int
    most_values: int


SETTINGS = Limits(2**22, 2**16)  # config.json and its like: some dozens of values
TOKENIZER_SETTINGS = Limits(2**25, 2**20)  # tokenizer_config.json lists all added tokens
TENSORS = Limits(2**26, 2**21)  # a header or an index: ten thousand tensors, six values each
TOKENIZER = Limits(2**28, 2**23)  # a million tokens and their merges: four million values
LOG_LINE = Limits(2**22, 2**16)  # a record of a run's log: numbers, or a sample's text
STATE = Limits(2**29, 2**23)  # what mygpt writes of a tokenizer, in ASCII, or of a store

_MOST_STEPS = 2**53  # of a run
_DEEPEST = 100  # objects and lists inside each other; tokenizers have about ten


def parse_object(data: bytes | str, limits: Limits) -> dict[str, Any]:
    """The JSON object that a text is.

    Raises:
        ValueError: in one short line, where it is none, is past the limits, or has two values
            under one name: readers differ in which of them they take.
    """
    check_size(data, limits)
    text = data if isinstance(data, str) else data.decode("utf-8")
    try:
        found = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(found, dict):
        raise ValueError("it holds no object")
    level: list[Any] = [found]
    for _ in range(_DEEPEST):
        items = (v for held in level for v in (held.values() if type(held) is dict else held))
        level = [value for value in items if type(value) in (dict, list)]
        if not level:
            return found
    raise _too_deep()


def check_size(data: bytes | str, limits: Limits) -> None:
    """Raise `ValueError` for JSON that `parse_object` would not begin to parse."""
    if len(data) > limits.most_bytes:
        raise ValueError(f"it is longer than {limits.most_bytes:,} bytes")
    if isinstance(data, str):
        count = data.count(",") + data.count("[") + data.count("{")
    else:
        count = data.count(b",") + data.count(b"[") + data.count(b"{")
    if count > limits.most_values:
        raise ValueError(f"it has more than {limits.most_values:,} values")


def _too_deep() -> ValueError:
    return ValueError(f"its values are nested more than {_DEEPEST} deep")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"it has two values named {twice[:40]!r}")
    return found


def read_object(
    path: str | Path, limits: Limits, refused: str = "is damaged, or no JSON object"
) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        path: the file.
        limits: of its kind.
        refused: what a message says of a file that `parse_object` refuses.

    Raises:
        InputError: naming the file, where it is missing, no file, or `parse_object` refuses it.
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
        raise InputError(f"{path} {refused}: {error}") from None


def read_records(log: Path, *, after: int = 0) -> Iterator[dict[str, Any]]:
    """The records of a run's log, a line each; lines that are none are passed over.

    Args:
        log: in a run's folder.
        after: bytes that are passed over first.

    Raises:
        CheckpointError: where it is a link, a pipe or a device.
        OSError: where it cannot be read.
    """
    with open_regular(log) as file:
        file.seek(after)
        goes_on = False  # the line that was begun
        while line := file.readline(LOG_LINE.most_bytes):
            record = None if goes_on else parse_record(line)
            goes_on = not line.endswith(b"\n")
            if record is not None:
                yield record


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record that a log's line is; None where it is none."""
    try:
        return parse_object(line.decode("utf-8", "replace"), LOG_LINE)
    except ValueError:
        return None


def step_of(record: dict[str, Any]) -> int | None:
    """The step of a record; None where it has none that a run can reach."""
    step = record.get("step")
    return step if type(step) is int and 0 <= step < _MOST_STEPS else None
