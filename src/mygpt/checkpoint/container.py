"""The file format of checkpoints and training states: named arrays and JSON parts, with digests.

A file is a safetensors file (not a pickle: opening it runs no code). Its metadata holds the parts
as JSON, a SHA-256 for each tensor (which identifies a damaged one), and one SHA-256 of the whole
file, computed with its own 64 digits set to "0". The format is written and read here, not by the
safetensors library, for three reasons: equal content gives equal bytes, arrays are not copied, and
all sizes are checked before memory is allocated. The tests compare with that library. Tensors of
the widest number types come first, so that each is aligned to the size of its numbers.

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
from mygpt.checkpoint.safetensors import (
    METADATA,
    MOST_DIMENSIONS,
    Header,
    make_header,
    read_header,
    to_json,
)
from mygpt.errors import CheckpointError, DamagedError, InputError, StorageError
from mygpt.file_access import open_regular
from mygpt.json_objects import STATE, Limits, parse_object
from mygpt.machine import require_memory

FORMAT_VERSION = 1
PARTS_AS_TENSORS = 2  # the format version of a file with `json/<part>` tensors

Arrays = Mapping[str, NDArray[Any]]

_ZEROS = b"0" * 64
_DIGEST_KEY = b'"sha256":"'
# The reader's limits, which the writer keeps too (`check_storable`). A part's limit is `STATE`.
_HEADER = Limits(2**25, 2**23)  # bytes: ten times what a vocabulary of all of Unicode needs
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
    for name, array in arrays.items():
        _check_storable(name, array.dtype, array.shape)
    texts = _checked_texts(parts)
    moved = _too_large(texts, arrays)
    arrays |= {_PREFIX + name: np.frombuffer(texts.pop(name).encode(), np.uint8) for name in moved}
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    views = {name: arrays[name].reshape(-1).view(np.uint8).data for name in order}
    metadata = {
        "format": "mygpt",
        "format_version": str(PARTS_AS_TENSORS if moved else FORMAT_VERSION),
        "sha256": _ZEROS.decode(),
        **texts,
        "tensors": to_json({name: tensor_digest(arrays[name]) for name in order}),
    }
    tensors = {name: (_NAMES[arrays[name].dtype], arrays[name].shape) for name in order}
    header = make_header(metadata, tensors)
    position = _digest_position(header)
    digest = _digest(header, position, views.values())
    header = header[:position] + digest + header[position + 64 :]

    def verify(written: Path) -> None:
        if not _reads_back(written, header):
            raise StorageError(
                f"cannot write {path}: the bytes read back are not those that were written, the "
                "disk may be failing: the previous file is kept; write to another disk"
            )

    write_durably(path, [header, *views.values()], verify=verify, keep_as=keep_as, inside=inside)


def check_storable(parts: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `InputError` if a file of these parts and float32 arrays could not be read back.

    Training calls this before the first step, so that it does not fail at its first save.
    """
    for name, shape in shapes.items():
        _check_storable(name, np.dtype(np.float32), shape)
    _too_large(_checked_texts(parts), shapes)


def _check_storable(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    if name == METADATA or name.startswith(_PREFIX):
        raise InputError(f"a tensor cannot be named {name[:80]!r}: choose another name")
    if dtype not in _NAMES or len(shape) > MOST_DIMENSIONS:
        raise InputError(
            f"tensor {name!r:.80} has the number type {dtype!s:.40} and {len(shape)} dimensions: "
            f"only {', '.join(map(str, _NAMES))}, and at most {MOST_DIMENSIONS} dimensions, can be "
            "written"
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


def _reads_back(path: Path, header: bytes) -> bool:
    """Whether a file has this header, and the content that the header's digest states."""
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # drop cached pages: read from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read(len(header)) == header and _is_intact(header, _rest(file))


def _rest(file: BinaryIO) -> Iterable[bytes]:
    return iter(lambda: file.read(1 << 20), b"")


def _digest(header: bytes, position: int, body: Iterable[bytes | bytearray | memoryview]) -> bytes:
    """The digits of a file's own SHA-256 at `position`, computed with zeros in their place."""
    found = hashlib.sha256(header[:position] + _ZEROS + header[position + 64 :])
    for piece in body:
        found.update(piece)
    return found.hexdigest().encode()


def _is_intact(header: bytes, body: Iterable[bytes | bytearray]) -> bool:
    """Whether header and body give the digest that the header states."""
    position = _digest_position(header)
    return header.startswith(_digest(header, position, body), position)


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
            header = _read_header(path, file)
            require_memory(path, header.body_bytes)
            body = bytearray(header.body_bytes)
            if file.readinto(body) != len(body):
                raise DamagedError(f"{path} was truncated while it was read: try again")
    except FileNotFoundError:
        raise DamagedError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    arrays: dict[str, NDArray[Any]] = {}
    for name, (dtype, shape, begin, _) in header.entries.items():
        start = begin - len(header.data)
        arrays[name] = np.frombuffer(body, _DTYPES[dtype], math.prod(shape), start).reshape(shape)
    parts = _parsed(path, {n: text for n, text in header.metadata.items() if text[:1] == "{"})
    if not _is_intact(header.data, [body]):
        raise DamagedError(_name_damage(path, arrays, parts.get("tensors", {})))
    if header.metadata["format_version"] == str(PARTS_AS_TENSORS):
        moved = [name for name in arrays if name.startswith(_PREFIX)]
        parts |= _parsed(path, {n.removeprefix(_PREFIX): arrays.pop(n).tobytes() for n in moved})
    return arrays, parts


def _parsed(path: Path, texts: Mapping[str, str | bytes]) -> dict[str, Any]:
    try:
        return {name: parse_object(text, STATE) for name, text in texts.items()}
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: {error}") from None


def _read_header(path: Path, file: BinaryIO) -> Header:
    """The header of a file; an error unless `write_arrays` of a known version wrote it."""
    try:
        header = read_header(file, _HEADER)
        if header.metadata.get("format") != "mygpt":
            raise ValueError("its header is not one that mygpt writes")
    except ValueError as error:
        raise DamagedError(f"{path} is damaged, or not a mygpt checkpoint: {error}") from None
    if _digest_position(header.data) < 0:
        raise DamagedError(f"{path} is damaged: its digest is missing")
    version = header.metadata.get("format_version", "none")
    if version not in (str(FORMAT_VERSION), str(PARTS_AS_TENSORS)):
        if not _is_intact(header.data, _rest(file)):
            raise DamagedError(f"{path} is damaged: its header does not match its digest")
        raise CheckpointError(
            f"{path} has format version {version[:9]} and this mygpt reads up to "
            f"{PARTS_AS_TENSORS}: upgrade mygpt"
        )
    for name, entry in header.entries.items():
        if entry.dtype not in _DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r:.80} has the number type {entry.dtype!r:.20}, which mygpt "
                f"does not write: known are {', '.join(_DTYPES)}"
            )
    return header


def _digest_position(header: bytes) -> int:
    """The position of the file's own digest, 64 digits; negative if there is none."""
    found = header.find(_DIGEST_KEY, 8)
    begin = found + len(_DIGEST_KEY)
    return begin if found >= 0 and begin + 64 <= len(header) else -1


def tensor_digest(array: NDArray[Any]) -> str:
    """The SHA-256 of an array's bytes, as a file states it for each tensor."""
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def _name_damage(path: Path, arrays: Arrays, digests: Any) -> str:
    """The message for a damaged file: names the first tensor whose digest differs."""
    wanted = digests if isinstance(digests, dict) else {}
    for name, array in arrays.items():
        if tensor_digest(array) != wanted.get(name):
            return f"{path} is damaged: tensor {name!r:.80} does not match its digest"
    return f"{path} is damaged: its header does not match its digest"
