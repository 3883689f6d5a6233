"""Torch's files and pickles from elsewhere, read so that nothing in them runs.

Such files are pickles, which may ask for any function to be called. Torch's are read with
`weights_only=True`, which calls a few of torch's own alone; a plain pickle may call none at all.
What they would build is measured first (`pickles.py`).
"""

from __future__ import annotations

import io
import os
import pickle
import re
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from mygpt.errors import InputError, OutOfMemoryError
from mygpt.formats.pickles import NotAllowed, check_pickle
from mygpt.machine import free_memory_bytes

OWN_EMBEDDING = "token_embedding.weight"  # of a `mygpt.GPT`
_ZIP = b"PK\x03\x04"
_LARGEST_PLAIN = 2**26  # bytes; a vocabulary of all of Unicode has a third of that
_MOST_PLAIN = 2**10  # dicts, lists and tuples: a vocabulary is one dict or two
_LARGEST_PICKLE = 2**26  # bytes, without the numbers of tensors; ten thousand of these have 3 MB
_OLD_PICKLES = 5  # of torch before 1.6: magic number, protocol, system, contents, storages
_LARGEST_DIRECTORY = 2**24  # bytes of a zip file's, some 100 a record
_RECORD = 30  # bytes before a record's name, at the least
# All that dicts, lists, tuples, text, whole numbers, true, false and none are written with.
_PLAIN = {
    "PROTO", "FRAME", "MARK", "STOP", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST",
    "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "INT",
    "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "UNICODE", "SHORT_BINUNICODE",
    "BINUNICODE", "BINUNICODE8", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET",
    "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE",
}  # fmt: skip


def detect(path: Path) -> str | None:
    """Whose checkpoint a torch file is, by its keys: "mygpt", "tutorial", "nanogpt", or None.

    A folder is nanoGPT's output folder where it holds a `ckpt.pt`. What is no torch file at
    all is None.

    Raises:
        InputError: for a torch file that cannot be read.
    """
    path = checkpoint_file(path)
    if path.is_dir() or not _begins_as_torch(_first_bytes(path)):
        return None
    content = read_torch_file(path)
    if not isinstance(content, Mapping):
        return None
    if own_state(content) is not None:
        return "mygpt"
    if "model_state_dict" in content or is_bare_tutorial(content):
        return "tutorial"
    return "nanogpt" if {"model", "model_args"} <= set(content) else None


def is_bare_tutorial(content: Any) -> bool:
    """Whether this is a state dict with the tutorial's names, whatever stands before them."""
    return has_tensor(content, "token_embedding.embedding.weight")


def own_state(content: Any) -> tuple[Any, Mapping[str, Any]] | None:
    """The state dict of a `mygpt.GPT` in what a torch file holds, and what is beside it."""
    if not isinstance(content, Mapping):
        return None
    if has_tensor(content, OWN_EMBEDDING) and has_tensor(content, "final_norm.weight"):
        return content, {}
    for name, value in content.items():
        if has_tensor(value, OWN_EMBEDDING) and has_tensor(value, "final_norm.weight"):
            return value, {k: v for k, v in content.items() if k != name}
    return None


def has_tensor(content: Any, name: str) -> bool:
    """Whether this is a state dict with a name that ends so."""
    return isinstance(content, Mapping) and any(
        key == name or key.endswith(f".{name}") for key in content if isinstance(key, str)
    )


def checkpoint_file(path: Path) -> Path:
    """The file itself, or the `ckpt.pt` of a folder that has one."""
    inside = path / "ckpt.pt"
    return inside if path.is_dir() and inside.is_file() else path


def read_torch_file(path: Path) -> Any:
    """What `torch.save` wrote: tensors on the CPU, in plain containers.

    Tensors of a zip file (torch's since 1.6) stay on the disk until they are used.

    Raises:
        InputError: where it is no torch file, is damaged, or asks for code.
        OutOfMemoryError: where it is larger than what is free.
    """
    import torch
    from torch.torch_version import TorchVersion

    if TorchVersion(torch.__version__) < "2.6":  # CVE-2025-32434: weights_only ran code before
        raise InputError(f"{path} is a pickle, which needs torch 2.6, not {torch.__version__}")
    start = _first_bytes(path)
    if not _begins_as_torch(start):
        raise InputError(f"{path} is no torch file: give what torch.save wrote")
    zipped = start.startswith(_ZIP)
    if zipped:
        _check_zip(path)
    else:
        _check_old(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats, which are no concern of the user's
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except MemoryError:
        raise OutOfMemoryError(f"{path} asks for more memory than is free") from None
    except Exception as error:  # torch raises what its parts raise
        raise InputError(f"{path} {_what_is_wrong(error)}") from None


def _first_bytes(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{path} is no file: name the checkpoint itself")
        with open(path, "rb") as file:
            return file.read(4)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise InputError(f"{str(path)!r} cannot be read: {error}") from None


def _begins_as_torch(start: bytes) -> bool:
    return start.startswith((_ZIP, b"\x80"))


def _check_old(path: Path) -> None:
    """Refuse a file of torch before 1.6 whose pickles are not to be loaded."""
    try:
        with open(path, "rb") as file:
            start = io.BytesIO(file.read(_LARGEST_PICKLE))
        size, free = path.stat().st_size, free_memory_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if free is not None and size > free:
        raise OutOfMemoryError(f"{path} has {size:,} bytes, and {free:,} bytes of memory are free")
    for _ in range(_OLD_PICKLES):
        if start.tell() < len(start.getbuffer()):  # where some are missing, torch says so
            _check_pickle(path, start)


def _check_pickle(path: Path, stream: io.BytesIO) -> None:
    try:
        check_pickle(stream)
    except ValueError as error:
        raise InputError(
            f"{path} is damaged, or holds more than tensors and plain values ({_brief(error)}): "
            "copy it again, or ask its maker for model.state_dict() alone"
        ) from None


def _check_directory(file: BinaryIO) -> None:
    """Raise `ValueError` unless a zip file ends with a directory of all that is before it.

    Readers of zip files look for the directory's end in different ways. Here there is one only,
    and so every reader reads the same records.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 98))
    tail = file.read()
    signature, length, begin, comment = struct.unpack("<4s8xLLH", tail[-22:])
    after = 22
    if begin == 0xFFFFFFFF or length == 0xFFFFFFFF or tail[-42:-38] == b"PK\x06\x07":
        length, begin = struct.unpack("<QQ", tail[-98 + 40 : -98 + 56])
        after = 98
        if tail[:4] != b"PK\x06\x06" or tail[-42:-38] != b"PK\x06\x07":
            raise ValueError("its directory has no end")
    if signature != b"PK\x05\x06" or comment or begin + length + after != size:
        raise ValueError("its directory is not at its end")
    if length > _LARGEST_DIRECTORY:
        raise ValueError(f"its directory has more than {_LARGEST_DIRECTORY:,} bytes")


def _check_places(records: list[zipfile.ZipInfo]) -> None:
    """Raise `ValueError` for records that overlap, or share a name."""
    reached = 0
    for record in sorted(records, key=lambda record: record.header_offset):
        if record.header_offset < reached:
            raise ValueError("its records overlap")
        name = len(record.orig_filename.encode("utf-8", "replace"))
        reached = record.header_offset + _RECORD + name + record.file_size
    if len({record.filename.lower() for record in records}) < len(records):
        raise ValueError("two of its records share a name")


def _check_zip(path: Path) -> None:
    """Refuse a zip file that is damaged, or whose records would grow when they are read."""
    try:
        with open(path, "rb") as whole:
            _check_directory(whole)
        with zipfile.ZipFile(path) as file:
            _check_places(file.infolist())
            packed = [r.filename for r in file.infolist() if r.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise InputError(
                    f"{path} holds a compressed record, {packed[0]!r:.80}, which torch never "
                    "writes: give the file that torch.save wrote"
                )
            wrong = file.testzip()
            for record in file.infolist() if wrong is None else ():
                if record.filename.lower().endswith(".pkl"):
                    if record.file_size > _LARGEST_PICKLE:
                        raise ValueError(f"a pickle has more than {_LARGEST_PICKLE:,} bytes")
                    _check_pickle(path, io.BytesIO(file.read(record)))
    except (
        zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, RuntimeError
    ) as error:  # fmt: skip
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} is cut short or damaged ({_brief(error)}): copy it again"
        ) from None
    if wrong is not None:
        raise InputError(
            f"{path} is damaged: record {wrong!r:.80} does not match its checksum; copy it again"
        )


def _what_is_wrong(error: Exception) -> str:
    asked = re.search(r"GLOBAL ([\w.]+)|instantiate ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and asked:
        return (
            f"asks for {(asked[1] or asked[2])[:80]}, code that a model does not need, and was not "
            "opened: ask its maker for a file of tensors and plain values alone"
        )
    return (
        f"is damaged, or holds more than tensors and plain values ({_brief(error)}): "
        "copy it again, or ask its maker for model.state_dict() alone"
    )


def _brief(error: Exception) -> str:
    """The first line of a message, or the one where torch's unpickler says what it met."""
    lines = str(error).partition("WeightsUnpickler error:")[2].strip().splitlines()
    lines = lines or str(error).splitlines() or [type(error).__name__]
    return "".join(c if c.isprintable() else "?" for c in lines[0])[:80]


def read_plain_pickle(path: Path) -> Any:
    """What a pickle of dicts, lists, tuples, text and whole numbers holds.

    Every instruction of the pickle is checked before any is followed: one that could call
    something is refused, and so are values that would take for ever.

    Raises:
        InputError: for anything else, or what cannot be read.
    """
    _first_bytes(path)
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST_PLAIN + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > _LARGEST_PLAIN:
        raise InputError(f"{path} has more than {_LARGEST_PLAIN:,} bytes: a vocabulary has fewer")
    try:
        check_pickle(io.BytesIO(data), allowed=_PLAIN, most_containers=_MOST_PLAIN)
        return _PlainUnpickler(io.BytesIO(data)).load()
    except NotAllowed as error:
        raise InputError(
            f"{path} holds more than text and whole numbers (pickle's {error.instruction}) and "
            "was not opened, since it could run code: give --tokenizer PATH instead"
        ) from None
    except Exception as error:
        raise InputError(
            f"{path} is damaged ({_brief(error)}): make it again, or give --tokenizer PATH"
        ) from None


class _PlainUnpickler(pickle.Unpickler):
    """The second guard: no name is ever looked up."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def plain_fields(path: Path, fields: Any, what: str) -> dict[str, Any]:
    """A configuration from elsewhere; `InputError` unless it is plain values by name."""
    if not isinstance(fields, Mapping):
        raise InputError(f"{path} holds no {what}: give a checkpoint with its configuration")
    for name, value in fields.items():
        if not isinstance(name, str) or not isinstance(value, (int, float, str, type(None))):
            raise InputError(
                f"{path}: {str(name)[:40]!r} in its {what} is of type {type(value).__name__}, "
                "not a plain value: save the checkpoint again"
            )
    return dict(fields)
