"""Decompress gzip and zstd files, recognised by their name or by their first bytes."""

from __future__ import annotations

import gzip
import io
import os
import sys
import zlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from mygpt.text.file_types import compression_of

_ZSTD_BLOCK = 2**11  # compressed bytes at a time: they may expand some thousand times
_ENDINGS = {".gz": "gzip", ".zst": "zstd"}


def compression_by_name(name: str) -> str:
    """The compression that a file name indicates: "gzip", "zstd", or "" for none."""
    return next((how for end, how in _ENDINGS.items() if name.lower().endswith(end)), "")


def without_compression_suffix(name: str) -> str:
    """A file's name without its .gz or .zst."""
    ending = next((end for end in _ENDINGS if name.lower().endswith(end)), "")
    return name[: len(name) - len(ending)]


class CompressionError(Exception):
    """Raised for a compressed file that is damaged or truncated."""


def decompressed(file: io.BufferedIOBase, compression: str, block: int) -> Iterator[bytes]:
    """A file's decompressed bytes in blocks.

    Args:
        file: open, at its beginning.
        compression: "gzip", "zstd", or "" for none.
        block: in bytes; blocks of a zstd file may be larger.

    Raises:
        CompressionError: if the file is damaged or truncated.
    """
    errors: tuple[type[Exception], ...] = ()
    if compression:
        errors = (gzip.BadGzipFile, EOFError, zlib.error)
        errors = (*errors, _zstd_error()) if compression == "zstd" else errors
    try:
        if compression == "zstd":
            yield from _zstd_frames(file)
            return
        stream: io.BufferedIOBase = gzip.GzipFile(fileobj=file) if compression == "gzip" else file
        while data := stream.read1(block):
            yield data
    except errors as error:
        raise CompressionError(f"{compression} file: {error}") from None


def compression_by_content(file: io.BufferedIOBase) -> str:
    """The compression of an open file, by its first bytes, which are not consumed."""
    if file.seekable():
        place = file.tell()
        if hasattr(os, "pread") and isinstance(file, io.BufferedReader):
            return compression_of(os.pread(file.fileno(), 4, place))  # nothing is buffered
        start = file.read(4)
        file.seek(place)
        return compression_of(start)
    return compression_of(file.peek(4)[:4]) if isinstance(file, io.BufferedReader) else ""


def _zstd_frames(file: io.BufferedIOBase) -> Iterator[bytes]:
    """The decompressed frames of a zstd file; the last one must be complete."""
    begin = _zstd()
    frame: Any = None
    while data := file.read1(_ZSTD_BLOCK):
        while data:
            frame = frame or begin()
            yield frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends inside a frame")


def _zstd() -> Any:
    """The constructor of a frame decompressor: the standard library's from Python 3.14 on."""
    if sys.version_info >= (3, 14):
        return import_module("compression.zstd").ZstdDecompressor
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj


def _zstd_error() -> type[Exception]:
    if sys.version_info >= (3, 14):
        error: type[Exception] = import_module("compression.zstd").ZstdError
        return error
    import zstandard

    return zstandard.ZstdError
