"""The GGUF container, version 3: named values and tensors in one file.

    "GGUF", version, number of tensors, number of values
    the values: key, type, value
    one entry per tensor: name, shape (innermost dimension first), number type, offset
    the tensors, each aligned to 32 bytes

All numbers are little-endian. The file is written here, not by the `gguf` package, for three
reasons: that package writes directly to the final path, omits an empty list (which llama.cpp
requires), and would be one more dependency for a hundred lines. The tests read with that package.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mygpt.checkpoint.durable import write_durably

Value = str | bool | int | float | list[str] | list[int] | list[float]

F32, F16, Q8_0 = 0, 1, 8  # ggml's numbers for its types
BLOCK = 32  # values that share a scale in q8_0

_VERSION = 3
_ALIGNMENT = 32  # bytes
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_BLOCK_BYTES = 2 + BLOCK  # a float16 scale, and a signed byte for each value
_BLOCKS_AT_ONCE = 2**16


class Stored(NamedTuple):
    """A tensor encoded for the file."""

    name: str  # at most 63 bytes, llama.cpp's limit
    shape: tuple[int, ...]  # outermost dimension first, as in NumPy
    kind: int  # F32, F16 or Q8_0
    data: NDArray[np.uint8]  # its bytes, uint8


def store(name: str, array: NDArray[np.float32], kind: int) -> Stored:
    """Encode a tensor; for Q8_0 the length of its rows must be a multiple of 32."""
    if kind == Q8_0:
        return Stored(name, array.shape, kind, quantised(array))
    numbers = np.ascontiguousarray(array, "<f4" if kind == F32 else "<f2")
    return Stored(name, array.shape, kind, numbers.reshape(-1).view(np.uint8))


def quantised(array: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Quantize blocks of 32 values to q8_0: scale d = max|x| / 127 in float16, then x / d as int8.

    Halves are rounded away from zero, and x is divided by d before d is rounded to float16, as
    ggml's reference implementation does: the bytes are equal.
    """
    blocks = np.asarray(array, np.float32).reshape(-1, BLOCK)
    result = np.empty((len(blocks), _BLOCK_BYTES), np.uint8)
    for start in range(0, len(blocks), _BLOCKS_AT_ONCE):
        part = slice(start, start + _BLOCKS_AT_ONCE)
        result[part] = _quantised(blocks[part])
    return result.reshape(-1)


def _quantised(blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(n, 32) float32 to (n, 34) bytes."""
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)  # (n, 1)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    inverse[~np.isfinite(inverse)] = 0.0  # a scale of zero, or so small that 1 / d overflows
    scaled = blocks * inverse
    size = np.abs(scaled)
    whole = np.floor(size)
    whole += size - whole >= 0.5
    numbers = np.copysign(whole, scaled).astype(np.int8)
    return np.concatenate([scales.astype("<f2").view(np.uint8), numbers.view(np.uint8)], axis=1)


def write_gguf_file(path: Path, values: Mapping[str, Value], tensors: Sequence[Stored]) -> None:
    """Write a GGUF file, atomically.

    Args:
        path: the file.
        values: metadata by key. An int becomes uint32, a list of ints int32, a float or a list of
            floats float32; an empty list is written as a list of strings.
        tensors: in the order of the file.

    Raises:
        StorageError: if there is no space, or the folder cannot be written to.
    """
    head = [b"GGUF", struct.pack("<IQQ", _VERSION, len(tensors), len(values))]
    head += [_string(key) + _value(value) for key, value in values.items()]
    offset = 0
    for name, shape, kind, data in tensors:
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += [_string(name), sizes, struct.pack("<IQ", kind, offset)]
        offset += data.nbytes + _padding(data.nbytes)
    written = b"".join(head)
    pieces: list[bytes | memoryview] = [written, bytes(_padding(len(written)))]
    for tensor in tensors:
        pieces += [tensor.data.data, bytes(_padding(tensor.data.nbytes))]
    write_durably(path, pieces)


def _padding(length: int) -> int:
    """Bytes from `length` to the next multiple of the alignment."""
    return -length % _ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "replace")  # a folder's name may not be UTF-8
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    """The number of a value's type, then the value."""
    if isinstance(value, bool):  # before int: a bool is an int, too
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    texts = [item for item in value if isinstance(item, str)]
    if len(texts) == len(value):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(texts)) + b"".join(map(_string, texts))
    floats = isinstance(value[0], float)
    head = struct.pack("<IIQ", _ARRAY, _FLOAT32 if floats else _INT32, len(value))
    return head + np.array(value, "<f4" if floats else "<i4").tobytes()
