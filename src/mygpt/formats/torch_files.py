"""Reading untrusted torch files and pickles without running code from them.

Loading a pickle can call any function. Torch files are read with `weights_only=True`, which allows
a few of torch's own functions; other pickles may not call any. The size of the objects that a
pickle would build is checked first (`pickles.py`).
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
_LARGEST_PICKLE = 2**26  # bytes, without tensors' values; that of 10,000 tensors has 3 MB
_OLD_PICKLES = 5  # in a file of torch before 1.6: magic, protocol, system, contents, storages
_LARGEST_DIRECTORY = 2**24  # bytes of a zip file's directory, which has about 100 per record
_RECORD = 30  # bytes of a record before its name, at least
# The pickle instructions that dicts, lists, tuples, text, integers, booleans and None need.
_PLAIN = {
    "PROTO", "FRAME", "MARK", "STOP", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST",
    "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "INT",
    "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "UNICODE", "SHORT_BINUNICODE",
    "BINUNICODE", "BINUNICODE8", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET",
    "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE",
}  # fmt: skip


def detect(path: Path) -> str | None:
    """The format of a torch file by its keys: "mygpt", "tutorial", "nanogpt", or None if unknown.

    A folder with a `ckpt.pt` is nanoGPT's output folder. The result is None also for a path that
    is not a torch file.

    Raises:
        InputError: if it is a torch file that cannot be read.
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
    """Whether `content` is a state dict with the tutorial's names, with or without a prefix."""
    return has_tensor(content, "token_embedding.embedding.weight")


def own_state(content: Any) -> tuple[Any, Mapping[str, Any]] | None:
    """The state dict of a `mygpt.GPT` in a torch file's content, and the file's other entries."""
    if not isinstance(content, Mapping):
        return None
    if has_tensor(content, OWN_EMBEDDING) and has_tensor(content, "final_norm.weight"):
        return content, {}
    for name, value in content.items():
        if has_tensor(value, OWN_EMBEDDING) and has_tensor(value, "final_norm.weight"):
            return value, {k: v for k, v in content.items() if k != name}
    return None


def has_tensor(content: Any, name: str) -> bool:
    """Whether `content` is a dict with a key that is `name`, or ends with it after a dot."""
    return isinstance(content, Mapping) and any(
        key == name or key.endswith(f".{name}") for key in content if isinstance(key, str)
    )


def checkpoint_file(path: Path) -> Path:
    """`path`, or the `ckpt.pt` in it if it is a folder that has one."""
    inside = path / "ckpt.pt"
    return inside if path.is_dir() and inside.is_file() else path


def read_torch_file(path: Path) -> Any:
    """Load a file of `torch.save`: tensors on the CPU, in plain containers.

    The tensors of a zip file (torch's format since 1.6) are memory-mapped.

    Raises:
        InputError: if it is not a torch file, is damaged, or would run code.
        OutOfMemoryError: if it needs more memory than is free.
    """
    import torch
    from torch.torch_version import TorchVersion

    if TorchVersion(torch.__version__) < "2.6":  # CVE-2025-32434: weights_only could run code
        raise InputError(
            f"{path} is a pickle, which is read safely from torch 2.6 on, and this is torch "
            f"{torch.__version__}: upgrade torch"
        )
    start = _first_bytes(path)
    if not _begins_as_torch(start):
        raise InputError(f"{path} is not a torch file: give a file that torch.save wrote")
    zipped = start.startswith(_ZIP)
    if zipped:
        _check_zip(path)
    else:
        _check_old(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats, which are supported
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except MemoryError:
        raise OutOfMemoryError(
            f"{path} needs more memory than is free: close other programs, or use a machine with "
            "more memory"
        ) from None
    except Exception as error:  # torch raises many kinds
        raise InputError(f"{path} {_problem(error)}") from None


def _first_bytes(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{path} is not a file: give the checkpoint file itself")
        with open(path, "rb") as file:
            return file.read(4)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except InputError:  # which is a ValueError, too
        raise
    except ValueError as error:  # a NUL in the name
        raise InputError(f"{str(path)!r} cannot be read: {error}") from None


def _begins_as_torch(start: bytes) -> bool:
    return start.startswith((_ZIP, b"\x80"))


def _check_old(path: Path) -> None:
    """Check the pickles in a file of torch before 1.6."""
    try:
        with open(path, "rb") as file:
            start = io.BytesIO(file.read(_LARGEST_PICKLE))
        size, free = path.stat().st_size, free_memory_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if free is not None and size > free:
        raise OutOfMemoryError(
            f"{path} has {size:,} bytes, and only {free:,} bytes of memory are free: close other "
            "programs, or use a machine with more memory"
        )
    for _ in range(_OLD_PICKLES):
        if start.tell() < len(start.getbuffer()):  # torch reports missing ones
            _check_pickle(path, start)


def _check_pickle(path: Path, stream: io.BytesIO) -> None:
    try:
        check_pickle(stream)
    except ValueError as error:
        raise InputError(
            f"{path} is damaged, or has more than tensors and plain values ({_brief(error)}): "
            "copy it again, or ask its author for a file with only model.state_dict()"
        ) from None


def _check_directory(file: BinaryIO) -> None:
    """Raise `ValueError` unless a zip file ends with its directory, without a comment.

    Zip readers search for the end of the directory in different ways. A file that passes this
    check has only one candidate, so that torch reads the same records that were checked here.
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
            raise ValueError("its zip directory is incomplete")
    if signature != b"PK\x05\x06" or comment or begin + length + after != size:
        raise ValueError("its zip directory is not at the end of the file")
    if length > _LARGEST_DIRECTORY:
        raise ValueError(f"its zip directory has more than {_LARGEST_DIRECTORY:,} bytes")


def _check_records(records: list[zipfile.ZipInfo]) -> None:
    """Raise `ValueError` for records that overlap, or share a name."""
    reached = 0
    for record in sorted(records, key=lambda record: record.header_offset):
        if record.header_offset < reached:
            raise ValueError("its records overlap")
        name = len(record.orig_filename.encode("utf-8", "replace"))
        reached = record.header_offset + _RECORD + name + record.file_size
    if len({record.filename.lower() for record in records}) < len(records):
        raise ValueError("two of its records have the same name")


def _check_zip(path: Path) -> None:
    """Check that a zip file is intact, and that its records are not compressed."""
    try:
        with open(path, "rb") as whole:
            _check_directory(whole)
        with zipfile.ZipFile(path) as file:
            _check_records(file.infolist())
            packed = [r.filename for r in file.infolist() if r.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise InputError(
                    f"{path} has a compressed record, {packed[0]!r:.80}, which torch never "
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
            f"{path} is damaged or truncated ({_brief(error)}): copy it again"
        ) from None
    if wrong is not None:
        raise InputError(
            f"{path} is damaged: record {wrong!r:.80} does not match its checksum; copy it again"
        )


def _problem(error: Exception) -> str:
    asked = re.search(r"GLOBAL ([\w.]+)|instantiate ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and asked:
        return (
            f"would run {(asked[1] or asked[2])[:80]}, code that a model does not need, and was "
            "not loaded: ask its author for a file with only tensors and plain values"
        )
    return (
        f"is damaged, or has more than tensors and plain values ({_brief(error)}): "
        "copy it again, or ask its author for a file with only model.state_dict()"
    )


def _brief(error: Exception) -> str:
    """The first line of an error's message, or the line with the reason of torch's unpickler."""
    lines = str(error).partition("WeightsUnpickler error:")[2].strip().splitlines()
    lines = lines or str(error).splitlines() or [type(error).__name__]
    return "".join(c if c.isprintable() else "?" for c in lines[0])[:80]


def read_plain_pickle(path: Path) -> Any:
    """Load a pickle of dicts, lists, tuples, text and integers.

    Every instruction of the pickle is checked before any is executed: one that could call a
    function is an error, and so are values that would take too long to build.

    Raises:
        InputError: if it has other values, or cannot be read.
    """
    _first_bytes(path)
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST_PLAIN + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > _LARGEST_PLAIN:
        raise InputError(
            f"{path} has more than {_LARGEST_PLAIN:,} bytes, too many for a vocabulary: give "
            "--tokenizer PATH instead"
        )
    try:
        check_pickle(io.BytesIO(data), allowed=_PLAIN, most_containers=_MOST_PLAIN)
        return _PlainUnpickler(io.BytesIO(data)).load()
    except NotAllowed as error:
        raise InputError(
            f"{path} has more than text and integers (pickle's {error.instruction}) and was not "
            "loaded, since it could run code: give --tokenizer PATH instead"
        ) from None
    except Exception as error:
        raise InputError(
            f"{path} is damaged ({_brief(error)}): write it again, or give --tokenizer PATH"
        ) from None


class _PlainUnpickler(pickle.Unpickler):
    """A second check, besides that of the instructions: no class or function can be loaded."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it would load {module}.{name}")


def plain_fields(path: Path, fields: Any, what: str) -> dict[str, Any]:
    """The configuration in another program's file; `InputError` unless it has plain values only."""
    if not isinstance(fields, Mapping):
        raise InputError(f"{path} has no {what}: give a checkpoint that has its configuration")
    for name, value in fields.items():
        if not isinstance(name, str) or not isinstance(value, (int, float, str, type(None))):
            raise InputError(
                f"{path}: {str(name)[:40]!r} in its {what} is of type {type(value).__name__}, "
                "not a plain value: save the checkpoint again"
            )
    return dict(fields)
