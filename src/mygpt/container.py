"""The file format of everything that is saved: named arrays and JSON parts, with digests.

It is safetensors (no pickle: opening it runs nothing). Its metadata holds the parts as JSON, a
SHA-256 per tensor (to name a damaged one) and one SHA-256 of the whole file with its own 64
digits zeroed. It is written and read here, not by the safetensors library, for three reasons: the
same content gives the same bytes, nothing is copied, and all sizes are checked before memory is
taken. That library is the judge in the tests.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import CheckpointError, DamagedError, OutOfMemoryError, StorageError
from mygpt.file_access import open_regular
from mygpt.machine import free_memory_bytes
from mygpt.storage import write_durably

FORMAT_VERSION = 1

Arrays = Mapping[str, NDArray[Any]]

_ZEROS = b"0" * 64
_DIGEST_KEY = b'"sha256":"'
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_LONGEST_HEADER = 2**25  # bytes; ten times what a vocabulary of all of Unicode needs
_MOST_DIMENSIONS = 8
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def write_arrays(
    path: str | Path,
    arrays: Arrays,
    parts: dict[str, Any],
    *,
    keep_as: Path | None = None,
    inside: bool = False,
) -> None:
    """Write named arrays and JSON parts durably, and only once they have been read back.

    Args:
        path: the file.
        arrays: of the number types that safetensors and NumPy share.
        parts: JSON objects by name.
        keep_as: the name under which the file that was there is kept.
        inside: the file is in a folder that somebody else may have filled: a link is refused.

    Raises:
        StorageError: when there is no space, or what was written reads back differently.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    # The widest numbers first: each array then begins on a multiple of its numbers' size.
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    views = {name: arrays[name].reshape(-1).view(np.uint8).data for name in order}
    digests = {name: hashlib.sha256(view).hexdigest() for name, view in views.items()}
    header = _header(arrays, order, parts, digests)
    place = _digest_place(header)
    whole = hashlib.sha256(header)
    for view in views.values():
        whole.update(view)
    header[place : place + 64] = whole.hexdigest().encode()

    def prove(written: Path) -> None:
        if not _reads_back(written, bytes(header), whole.digest(), place):
            raise StorageError(
                f"cannot write {path}: what was written reads back differently, the disk may be "
                "failing; what was there before is kept"
            )

    write_durably(path, [header, *views.values()], prove=prove, keep_as=keep_as, inside=inside)


def _header(
    arrays: Arrays, order: list[str], parts: dict[str, Any], digests: dict[str, str]
) -> bytearray:
    """Length and JSON header, with zeros for the file's own digest."""
    metadata = {
        "format": "mygpt",
        "format_version": str(FORMAT_VERSION),
        "sha256": _ZEROS.decode(),
        **{name: to_json(part) for name, part in parts.items()},
        "tensors": to_json(digests),
    }
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        array = arrays[name]
        begin, end = end, end + array.nbytes
        entries[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = to_json(entries).encode()
    text += b" " * (-len(text) % 8)
    return bytearray(len(text).to_bytes(8, "little") + text)


def _reads_back(path: Path, header: bytes, digest: bytes, place: int) -> bool:
    """Whether the file on the disk has this header and, with its digits zeroed, this digest."""
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # from the disk, not from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if file.read(len(header)) != header:
            return False
        whole = hashlib.sha256(header[:place] + _ZEROS + header[place + 64 :])
        while piece := file.read(1 << 20):
            whole.update(piece)
    return whole.digest() == digest


def read_arrays(
    path: str | Path, *, inside: bool = False
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read what `write_arrays` wrote, checking every digest.

    Sizes and shapes are checked before memory is taken for them. The arrays share one piece of
    memory, as long as the file. With `inside` a link is refused, as where the file is written.

    Raises:
        DamagedError: a CheckpointError, naming the file and the tensor whose bytes are not right.
        CheckpointError: for a file that is foreign, newer, or cannot be read.
        OutOfMemoryError: when it is larger than what is free.
    """
    path = Path(path)
    try:
        with open_regular(path, inside=inside) as file:
            size = os.fstat(file.fileno()).st_size
            header = _read_header(path, file, size)
            entries, metadata = _parse_header(path, header)
            if metadata.get("format_version") != str(FORMAT_VERSION):
                raise _other_version(path, file, header, metadata)
            body_bytes = size - len(header)
            places = _places(path, entries, body_bytes)
            free = free_memory_bytes()
            if free is not None and body_bytes > free:
                raise OutOfMemoryError(
                    f"{path} has {size:,} bytes, and {free:,} bytes of memory are free"
                )
            body = bytearray(body_bytes)
            if file.readinto(body) != body_bytes:
                raise DamagedError(f"{path} was cut short while it was read")
    except FileNotFoundError:
        raise DamagedError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    place = _digest_place(header)
    whole = hashlib.sha256(header[:place] + _ZEROS + header[place + 64 :])
    whole.update(body)
    intact = header[place : place + 64] == whole.hexdigest().encode()
    arrays = {
        name: np.frombuffer(body, dtype, math.prod(shape), begin).reshape(shape)
        for name, (dtype, shape, begin) in places.items()
    }
    try:
        parts = {name: json.loads(text) for name, text in metadata.items() if text[:1] == "{"}
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from None
    if not intact:
        raise DamagedError(_name_damage(path, arrays, parts.get("tensors", {})))
    return arrays, parts


def _read_header(path: Path, file: BinaryIO, size: int) -> bytes:
    """The length and the JSON text, or an error that says what the file is instead."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, _LONGEST_HEADER):
        if start.startswith(_PICKLE_STARTS):
            raise CheckpointError(
                f"{path} is a pickle (a PyTorch file?), which can run code when it is opened: "
                "mygpt reads only the safetensors files it writes"
            )
        raise DamagedError(f"{path} is damaged or cut short, or no mygpt checkpoint")
    return start + file.read(length)


def _parse_header(path: Path, header: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors' entries and the metadata."""
    try:
        entries = json.loads(header[8:])
        metadata = entries.pop("__metadata__")
        ours = metadata["format"] == "mygpt" and all(isinstance(v, str) for v in metadata.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        ours = False
    if not ours:
        raise DamagedError(f"{path} is damaged, or no mygpt checkpoint: its header is not ours")
    if _digest_place(header) < 0:
        raise DamagedError(f"{path} is damaged: its digest is missing")
    return entries, metadata


def _other_version(
    path: Path, file: BinaryIO, header: bytes, metadata: dict[str, str]
) -> CheckpointError:
    """What to say of a version that is not ours: the file is newer, or damaged there."""
    place = _digest_place(header)
    whole = hashlib.sha256(header[:place] + _ZEROS + header[place + 64 :])
    while piece := file.read(1 << 20):
        whole.update(piece)
    if header[place : place + 64] != whole.hexdigest().encode():
        return DamagedError(f"{path} is damaged: its header does not match its digest")
    return CheckpointError(
        f"{path} has format version {metadata.get('format_version', 'none')[:9]} and this mygpt "
        f"reads up to {FORMAT_VERSION}: upgrade mygpt"
    )


def _places(
    path: Path, entries: dict[str, Any], body_bytes: int
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]:
    """Each tensor's number type, shape and first byte; together they fill the body exactly."""
    found: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in entries.items():
        try:
            kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            dtype = np.dtype(_DTYPES[kind]) if kind in _DTYPES else None
            right = len(shape) <= _MOST_DIMENSIONS and all(
                type(n) is int and n >= 0 for n in (*shape, begin, end)
            )
        except (ValueError, KeyError, TypeError):
            right = False
        if right and dtype is None:
            raise CheckpointError(f"{path} holds numbers of type {kind!r:.20}, which are not ours")
        if not right or dtype is None or end - begin != math.prod(shape) * dtype.itemsize:
            raise DamagedError(
                f"{path} is damaged: the shape or place of tensor {name[:80]} is not right"
            )
        found[name] = dtype, tuple(shape), begin
        spans.append((begin, end))
    reached = 0
    for begin, end in sorted(spans):
        if begin != reached:
            reached = -1
            break
        reached = end
    if reached != body_bytes:
        raise DamagedError(f"{path} is damaged or cut short: its tensors do not fill it")
    return found


def _digest_place(header: bytes | bytearray) -> int:
    """Where the file's own 64 digits begin; negative when they are not there."""
    found = header.find(_DIGEST_KEY, 8)
    begin = found + len(_DIGEST_KEY)
    return begin if found >= 0 and begin + 64 <= len(header) else -1


def _name_damage(path: Path, arrays: Arrays, digests: Any) -> str:
    wanted = digests if isinstance(digests, dict) else {}
    for name, array in arrays.items():
        if hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest() != wanted.get(name):
            return f"{path} is damaged: tensor {name} does not match its digest"
    return f"{path} is damaged: its header does not match its digest"


def to_json(value: Any) -> str:
    """Compact JSON in ASCII: a path may hold odd bytes."""
    return json.dumps(value, separators=(",", ":"))
