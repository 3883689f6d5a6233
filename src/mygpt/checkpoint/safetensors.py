"""The safetensors format: one parser and one writer of headers, for all files of this kind.

    8 bytes   length N of the header, little-endian
    N bytes   header: JSON, padded with spaces to a multiple of 8
    the rest  the tensors' bytes, without gaps

Opening such a file runs no code. All sizes are checked before memory is allocated.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from mygpt.json_objects import Limits, parse_object

METADATA = "__metadata__"
MOST_DIMENSIONS = 8
_MOST_VALUES = 2**56  # of an array: NumPy counts its bytes in 63 bits
SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip  # bytes of one value


class Entry(NamedTuple):
    """A tensor as its header describes it."""

    dtype: str  # its number type, as safetensors calls it: "F32", "BF16"; any text for unknown ones
    shape: tuple[int, ...]  # its shape
    begin: int  # its first byte in the file
    end: int  # the byte after its last


class Header(NamedTuple):
    """The header of a file."""

    data: bytes  # its bytes, from the beginning of the file
    metadata: dict[str, str]  # texts by name
    entries: dict[str, Entry]  # the tensors by name
    body_bytes: int  # the length of all tensors


def read_header(file: BinaryIO, limits: Limits) -> Header:
    """Read and check the header of a file that is open at its beginning.

    Raises:
        ValueError: with one short line, unless it is a header within the limits whose tensors fill
            the file exactly.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if start == b"version ":
        raise ValueError("it is a Git LFS pointer: download the file with `git lfs pull`")
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, limits.most_bytes):
        raise ValueError("it is truncated, or not a safetensors file")
    data = start + file.read(length)
    values = parse_object(data[8:], limits)
    metadata = values.pop(METADATA, {})
    if type(metadata) is not dict or any(type(text) is not str for text in metadata.values()):
        raise ValueError("its metadata are not texts")
    entries = {name: _entry(name, value, len(data)) for name, value in values.items()}
    reached = len(data)
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != reached:
            raise ValueError("its tensors overlap or leave gaps")
        reached = entry.end
    if reached != size:
        raise ValueError(
            f"it is truncated or extended: it has {size:,} bytes, and its header describes "
            f"{reached:,}"
        )
    return Header(data, metadata, entries, size - len(data))


def _entry(name: str, value: Any, body: int) -> Entry:
    """A tensor's entry in a file whose tensors begin at byte `body`."""
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        valid = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
        valid = valid and type(dtype) is str and len(shape) <= MOST_DIMENSIONS
        valid = valid and is_possible(shape)
    except (ValueError, KeyError, TypeError):
        valid = False
    if not valid or (dtype in SIZES and end - begin != math.prod(shape) * SIZES[dtype]):
        raise ValueError(f"the shape or the offsets of tensor {name[:80]!r} are not valid")
    return Entry(dtype, shape, body + begin, body + end)


def is_possible(shape: Sequence[int]) -> bool:
    """Whether an array can have this shape: NumPy multiplies all sizes except those that are 0."""
    return math.prod(max(1, size) for size in shape) <= _MOST_VALUES


def make_header(
    metadata: Mapping[str, str], tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> bytes:
    """The bytes before the tensors of a file.

    Args:
        metadata: texts by name.
        tensors: number type and shape of each tensor by name, in the order of the file.
    """
    described: dict[str, Any] = {METADATA: metadata}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * SIZES[dtype]
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = to_json(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def to_json(value: Any) -> str:
    """Compact JSON in ASCII; ASCII, since a path may hold bytes that are not UTF-8."""
    return json.dumps(value, separators=(",", ":"))
