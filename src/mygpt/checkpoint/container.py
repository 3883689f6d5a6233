"""The file format of checkpoints and training states: named arrays and JSON parts, with digests.

A file is a safetensors file (not a pickle: opening it runs no code). Its metadata holds the parts
as JSON, a SHA-256 for each tensor (which identifies a damaged one), and one SHA-256 of the whole
file, computed with its own 64 digits set to "0". The format is written and read here, not by the
safetensors library, for three reasons: equal content gives equal bytes, arrays are not copied, and
all sizes are checked before memory is allocated. The tests compare with that library.

    8 bytes   length N of the header, little-endian
    N bytes   header: JSON, padded with spaces to a multiple of 8
    the rest  the tensors' bytes, without gaps, those of the widest number types first

Parts that do not fit into the header (a tokenizer of a quarter of a million tokens) are stored as
tensors of bytes named `json/<part>`, and the file's format version is 2; otherwise it is 1.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mygpt.checkpoint.durable import write_durably
from mygpt.errors import CheckpointError, DamagedError, InputError, OutOfMemoryError, StorageError
from mygpt.file_access import open_regular
from mygpt.json_objects import STATE, Limits, parse_object
from mygpt.machine import free_memory_bytes

FORMAT_VERSION = 1
PARTS_AS_TENSORS = 2  # the format version of a file with `json/<part>` tensors
_VERSIONS = (str(FORMAT_VERSION), str(PARTS_AS_TENSORS))

Arrays = Mapping[str, NDArray[Any]]
Entries = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]  # number type and shape

_METADATA = "__metadata__"
_ZEROS = b"0" * 64
_DIGEST_KEY = b'"sha256":"'
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# The reader's limits, which the writer keeps too (`check_storable`). A part's limit is `STATE`.
_HEADER = Limits(2**25, 2**23)  # bytes: ten times what a vocabulary of all of Unicode needs
_MOST_DIMENSIONS = 8
_PREFIX = "json/"  # of the names of tensors that hold a JSON part
_SMALL_PART = 2**16  # bytes; a part of at most this length stays in the header
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
    """Write named arrays and JSON parts to a file, atomically and verified by reading it back.

    Args:
        path: the file.
        arrays: arrays by name, of number types that safetensors and NumPy share.
        parts: JSON objects by name.
        keep_as: the name under which the previous file is kept.
        inside: the file is in a folder whose content is not trusted: a link is an error.

    Raises:
        InputError: for content that `read_arrays` would refuse; nothing is written then.
        StorageError: if there is no space, or the file reads back with other bytes.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    _check_arrays({name: (array.dtype, array.shape) for name, array in arrays.items()})
    texts = _checked_texts(parts)
    moved = _too_large(texts, arrays)
    arrays |= {_PREFIX + name: np.frombuffer(texts.pop(name).encode(), np.uint8) for name in moved}
    # The widest numbers first, so that each array is aligned to the size of its numbers.
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    views = {name: arrays[name].reshape(-1).view(np.uint8).data for name in order}
    digests = {name: hashlib.sha256(view).hexdigest() for name, view in views.items()}
    entries = {name: (arrays[name].dtype, arrays[name].shape) for name in order}
    header = _header(entries, texts, digests, PARTS_AS_TENSORS if moved else FORMAT_VERSION)
    position = _digest_position(header)
    file_digest = hashlib.sha256(header)
    for view in views.values():
        file_digest.update(view)
    header[position : position + 64] = file_digest.hexdigest().encode()

    def verify(written: Path) -> None:
        if not _reads_back(written, bytes(header), file_digest.digest(), position):
            raise StorageError(
                f"cannot write {path}: the bytes read back are not those that were written, the "
                "disk may be failing: the previous file is kept; write to another disk"
            )

    write_durably(path, [header, *views.values()], verify=verify, keep_as=keep_as, inside=inside)


def check_storable(parts: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `InputError` if a file of these parts and float32 arrays could not be read back.

    Training calls this before the first step, so that it does not fail at its first save.
    """
    entries = {name: (np.dtype(np.float32), shape) for name, shape in shapes.items()}
    _check_arrays(entries)
    _too_large(_checked_texts(parts), shapes)


def _check_arrays(entries: Entries) -> None:
    for name, (dtype, shape) in entries.items():
        if name == _METADATA or name.startswith(_PREFIX):
            raise InputError(f"a tensor cannot be named {name[:80]!r}: choose another name")
        if dtype not in _NAMES:
            raise InputError(
                f"tensor {name[:80]} has the number type {dtype!s:.40}: only "
                f"{', '.join(map(str, _NAMES))} can be written"
            )
        if len(shape) > _MOST_DIMENSIONS:
            raise InputError(
                f"tensor {name[:80]} has {len(shape)} dimensions: at most {_MOST_DIMENSIONS} can "
                "be written"
            )


def _checked_texts(parts: dict[str, Any]) -> dict[str, str]:
    """The parts as JSON texts; `InputError` if one exceeds the reader's limits."""
    texts = {name: to_json(part) for name, part in parts.items()}
    for name, text in texts.items():
        try:
            parse_object(text, STATE)
        except ValueError as error:
            raise InputError(f"the {name} cannot be written to a checkpoint: {error}") from None
    return texts


def _too_large(texts: dict[str, str], names: Iterable[str]) -> list[str]:
    """The names of the parts to store as tensors, so that the header keeps the reader's limits."""
    # A tensor's entry has at most 200 characters in addition to its name, its digest included.
    fixed = 1000 + sum(200 + 2 * len(json.dumps(to_json(name))) for name in names)
    kept = {name: len(json.dumps(text)) for name, text in texts.items()}
    values = sum(text.count(mark) for text in texts.values() for mark in ",[{")
    if fixed + sum(kept.values()) <= _HEADER.most_bytes and values <= _HEADER.most_values // 2:
        return []
    moved = sorted(name for name, length in kept.items() if length > _SMALL_PART)
    if fixed + sum(length for name, length in kept.items() if name not in moved) > (
        _HEADER.most_bytes
    ):
        raise InputError(
            f"{len(list(names)):,} tensors are too many for one file, whose header has at most "
            f"{_HEADER.most_bytes:,} bytes: choose fewer layers"
        )
    return moved


def _header(
    entries: Entries, texts: dict[str, str], digests: dict[str, str], version: int
) -> bytearray:
    """The length and the JSON header; the file's own digest is all zeros."""
    metadata = {
        "format": "mygpt",
        "format_version": str(version),
        "sha256": _ZEROS.decode(),
        **texts,
        "tensors": to_json(digests),
    }
    described: dict[str, Any] = {_METADATA: metadata}
    end = 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        described[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = to_json(described).encode()
    text += b" " * (-len(text) % 8)
    return bytearray(len(text).to_bytes(8, "little") + text)


def _reads_back(path: Path, header: bytes, digest: bytes, position: int) -> bool:
    """Whether the file has this header and, with its digest's digits zeroed, this digest."""
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # drop cached pages: read from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if file.read(len(header)) != header:
            return False
        found = hashlib.sha256(_zeroed(header, position))
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.digest() == digest


def _zeroed(header: bytes, position: int) -> bytes:
    """A header with the file's own digest, which begins at `position`, set to zeros."""
    return header[:position] + _ZEROS + header[position + 64 :]


def read_arrays(
    path: str | Path, *, inside: bool = False
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read a file that `write_arrays` wrote, and check its digests.

    Sizes and shapes are checked before memory is allocated. The arrays are views of one buffer.

    Args:
        path: the file.
        inside: the file is in a folder whose content is not trusted: a link is an error.

    Returns:
        The arrays by name, and the JSON parts by name.

    Raises:
        DamagedError: naming the file and, if only a tensor's bytes are wrong, that tensor.
        CheckpointError: for a file of another program or a newer version, or an unreadable one.
        OutOfMemoryError: if the file is larger than the free memory.
    """
    path = Path(path)
    try:
        with open_regular(path, inside=inside) as file:
            size = os.fstat(file.fileno()).st_size
            header = _read_header(path, file, size)
            entries, metadata = _parse_header(path, header)
            if metadata.get("format_version") not in _VERSIONS:
                raise _other_version(path, file, header, metadata)
            body_bytes = size - len(header)
            tensors = _checked_entries(path, entries, body_bytes)
            free = free_memory_bytes()
            if free is not None and body_bytes > free:
                raise OutOfMemoryError(
                    f"{path} has {size:,} bytes, and only {free:,} bytes of memory are free: "
                    "close other programs, or use a machine with more memory"
                )
            body = bytearray(body_bytes)
            if file.readinto(body) != body_bytes:
                raise DamagedError(f"{path} was truncated while it was read: try again")
    except FileNotFoundError:
        raise DamagedError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    intact = _has_own_digest(header, [body])
    arrays = {
        name: np.frombuffer(body, dtype, math.prod(shape), begin).reshape(shape)
        for name, (dtype, shape, begin) in tensors.items()
    }
    texts: dict[str, str | bytes] = {n: text for n, text in metadata.items() if text[:1] == "{"}
    parts = _parsed(path, texts)
    if not intact:
        raise DamagedError(_name_damage(path, arrays, parts.get("tensors", {})))
    if metadata["format_version"] == str(PARTS_AS_TENSORS):
        moved = [name for name in arrays if name.startswith(_PREFIX)]
        parts |= _parsed(path, {n.removeprefix(_PREFIX): arrays.pop(n).tobytes() for n in moved})
    return arrays, parts


def _has_own_digest(header: bytes, body: Iterable[bytes | bytearray]) -> bool:
    """Whether header and body give the digest that the header states."""
    position = _digest_position(header)
    found = hashlib.sha256(_zeroed(header, position))
    for piece in body:
        found.update(piece)
    return header[position : position + 64] == found.hexdigest().encode()


def _parsed(path: Path, texts: dict[str, str | bytes]) -> dict[str, Any]:
    try:
        return {name: parse_object(text, STATE) for name, text in texts.items()}
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: {error}") from None


def _read_header(path: Path, file: BinaryIO, size: int) -> bytes:
    """The length and the JSON text; an error if the file is of another kind."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, _HEADER.most_bytes):
        if start.startswith(_PICKLE_STARTS):
            raise CheckpointError(
                f"{path} is a pickle (a PyTorch file?), which can run code when it is opened: "
                "mygpt reads only the safetensors files it writes"
            )
        raise DamagedError(f"{path} is damaged or truncated, or not a mygpt checkpoint")
    return start + file.read(length)


def _parse_header(path: Path, header: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors' entries by name, and the metadata."""
    try:
        entries = parse_object(header[8:], _HEADER)
        metadata = entries.pop(_METADATA)
        ours = metadata["format"] == "mygpt" and all(isinstance(v, str) for v in metadata.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise DamagedError(
            f"{path} is damaged, or not a mygpt checkpoint: its header is not one that mygpt writes"
        )
    if _digest_position(header) < 0:
        raise DamagedError(f"{path} is damaged: its digest is missing")
    return entries, metadata


def _other_version(
    path: Path, file: BinaryIO, header: bytes, metadata: dict[str, str]
) -> CheckpointError:
    """The error for an unknown format version: the file is newer, or its header is damaged."""
    if not _has_own_digest(header, iter(lambda: file.read(1 << 20), b"")):
        return DamagedError(f"{path} is damaged: its header does not match its digest")
    return CheckpointError(
        f"{path} has format version {metadata.get('format_version', 'none')[:9]} and this mygpt "
        f"reads up to {PARTS_AS_TENSORS}: upgrade mygpt"
    )


def _checked_entries(
    path: Path, entries: dict[str, Any], body_bytes: int
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]:
    """Each tensor's number type, shape and offset; an error unless they fill the body exactly."""
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
            raise CheckpointError(
                f"{path} has a tensor of the number type {kind!r:.20}, which mygpt does not write: "
                f"known are {', '.join(_DTYPES)}"
            )
        if not right or dtype is None or end - begin != math.prod(shape) * dtype.itemsize:
            raise DamagedError(
                f"{path} is damaged: the shape or the offsets of tensor {name[:80]} are not valid"
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
        raise DamagedError(
            f"{path} is damaged or truncated: its tensors and its length do not agree"
        )
    return found


def _digest_position(header: bytes | bytearray) -> int:
    """The position of the file's own digest, 64 digits; negative if there is none."""
    found = header.find(_DIGEST_KEY, 8)
    begin = found + len(_DIGEST_KEY)
    return begin if found >= 0 and begin + 64 <= len(header) else -1


def _name_damage(path: Path, arrays: Arrays, digests: Any) -> str:
    """The message for a damaged file: names the first tensor whose digest differs."""
    wanted = digests if isinstance(digests, dict) else {}
    for name, array in arrays.items():
        if hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest() != wanted.get(name):
            return f"{path} is damaged: tensor {name[:80]} does not match its digest"
    return f"{path} is damaged: its header does not match its digest"


def to_json(value: Any) -> str:
    """Compact JSON in ASCII; ASCII, since a path may hold bytes that are not UTF-8."""
    return json.dumps(value, separators=(",", ":"))
