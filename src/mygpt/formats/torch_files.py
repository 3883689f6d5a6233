"""Reading untrusted torch files and pickles without running code from them.

Loading a pickle can call any function. Torch files are read with `weights_only=True`, which allows
a few of torch's own functions; other pickles may not call any. The size of the objects that a
pickle would build is checked first (`pickles.py`).
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from mygpt.checkpoint.safetensors import is_possible
from mygpt.errors import InputError, OutOfMemoryError
from mygpt.file_access import open_regular
from mygpt.formats.pickles import NotAllowed, check_pickle
from mygpt.formats.tensors import StoredTensor
from mygpt.machine import require_memory

_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
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
    with _opened(path) as file:
        start = file.read(4)
        if not start.startswith((_ZIP, b"\x80")):
            raise InputError(f"{path} is not a torch file: give a file that torch.save wrote")
        zipped = start == _ZIP
        if zipped:
            _check_zip(path, file)
        else:
            _check_old(path, file)
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


def stored_tensors(path: Path, state: Any) -> dict[str, StoredTensor]:
    """The tensors of a state dict that `read_torch_file` read from `path`.

    Raises:
        InputError: if it has anything but plain tensors by name.
    """
    import torch

    if not isinstance(state, Mapping) or not state:
        raise InputError(f"{path} does not hold a state dict: save model.state_dict()")
    found: dict[str, StoredTensor] = {}
    for name, tensor in state.items():
        what = None
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            what = f"of type {type(tensor).__name__}"
        elif tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            what = "a sparse, nested or quantized tensor"
        elif tensor.device.type != "cpu":
            what = "a tensor without values (on the meta device)"
        elif _bytes_of(tensor) > tensor.untyped_storage().nbytes():  # a stride of 0 repeats values
            what = "an expanded view, larger than its stored values"
        elif not is_possible(tensor.shape):
            what = "an empty tensor of too large a shape"
        if what is not None:
            raise InputError(
                f"{path}: {name!r:.80} is {what}, not a plain tensor with a name: save "
                "model.state_dict() of a plain model"
            )
        kind = str(tensor.dtype).removeprefix("torch.")
        shape, fill = tuple(tensor.shape), partial(_copy, tensor)
        found[name] = StoredTensor(path, name, _TYPES.get(kind, kind), shape, fill)
    if sum(tensor.nbytes for tensor in state.values()) > 3 * path.stat().st_size:
        raise InputError(f"{path} is damaged: its tensors are larger than the file; copy it again")
    return found


def _bytes_of(tensor: Any) -> int:
    """The bytes of a tensor's values; torch's own count overflows at 2**63."""
    return int(math.prod(tensor.shape) * tensor.element_size())


def _copy(tensor: Any, out: NDArray[np.float32]) -> None:
    out[...] = tensor.detach().resolve_neg().float().numpy()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """An open file; `InputError` if it is not a regular file, or cannot be read."""
    try:
        with open_regular(path, inside=False) as file:
            yield file
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _check_old(path: Path, file: BinaryIO) -> None:
    """Check the pickles in a file of torch before 1.6."""
    require_memory(path, file.seek(0, os.SEEK_END))
    file.seek(0)
    start = io.BytesIO(file.read(_LARGEST_PICKLE))
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
    """Raise `ValueError` for records that are compressed, overlap, or share a name."""
    reached = 0
    for record in sorted(records, key=lambda record: record.header_offset):
        if record.compress_type != zipfile.ZIP_STORED:  # torch never compresses them
            raise ValueError(f"it has a compressed record, {record.filename!r:.40}")
        if record.header_offset < reached:
            raise ValueError("its records overlap")
        name = len(record.orig_filename.encode("utf-8", "replace"))
        reached = record.header_offset + _RECORD + name + record.file_size
    if len({record.filename.lower() for record in records}) < len(records):
        raise ValueError("two of its records have the same name")


def _check_zip(path: Path, file: BinaryIO) -> None:
    """Check that a zip file is intact, and that its records are not compressed."""
    try:
        _check_directory(file)
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            _check_records(records)
            wrong = archive.testzip()
            if wrong is not None:
                raise ValueError(f"record {wrong!r:.80} does not match its checksum")
            for record in records:
                if record.filename.lower().endswith(".pkl"):
                    if record.file_size > _LARGEST_PICKLE:
                        raise ValueError(f"a pickle has more than {_LARGEST_PICKLE:,} bytes")
                    _check_pickle(path, io.BytesIO(archive.read(record)))
    except InputError:  # which is a ValueError, too
        raise
    except (
        zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, RuntimeError
    ) as error:  # fmt: skip
        raise InputError(
            f"{path} is damaged or truncated ({_brief(error)}): copy it again"
        ) from None


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
    with _opened(path) as file:
        data = file.read(_LARGEST_PLAIN + 1)
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
