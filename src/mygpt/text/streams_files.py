"""A file's bytes and its text as they come, unpacked and decoded, for `streams.py`."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Generator, Iterator
from importlib import import_module
from typing import Any

from mygpt.errors import InputError
from mygpt.text.decoding import codec_of
from mygpt.text.reading import no_such_file, opened, shown

_BLOCK = 2**18  # bytes that are read at a time, at least
_PACKED = 2**11  # bytes of zstd at a time: they may unpack to some thousand times as much


def texts_of(name: str, encoding: str | None) -> Iterator[tuple[str, int]]:
    """A file's text as it comes, and the bytes of the file that have been read."""
    decoder: codecs.IncrementalDecoder | None = None
    codec, reached, characters, read = "utf-8", 0, 0, 0
    for data, read in blocks_of(name):
        if decoder is None:
            start, codec = codec_of(bytearray(data[:4]), encoding)
            decoder = codecs.getincrementaldecoder(codec)()
            data, reached = data[start:], start
        text = _decoded(decoder, data, name, codec, reached, characters)
        reached += len(data)
        characters += len(text)
        yield text, read
    if decoder is not None:
        yield _decoded(decoder, b"", name, codec, reached, characters), read


def _decoded(
    decoder: codecs.IncrementalDecoder,
    data: bytes,
    name: str,
    codec: str,
    reached: int,
    characters: int,
) -> str:
    """The next characters; no `data` is the end."""
    waiting = decoder.getstate()[0]  # bytes of a character that was not whole
    held = len(waiting) if isinstance(waiting, bytes) else 0
    try:
        text = decoder.decode(data, final=not data)
        if codec != "utf-8":
            text.encode("utf-8")
        return text
    except UnicodeDecodeError as error:
        wrong = error.object[error.start : error.start + 1].hex()
        raise InputError(
            f"{shown(name)} is not {codec}: byte 0x{wrong} at position "
            f"{reached - held + error.start}; name its encoding (--encoding latin-1?)"
        ) from None
    except UnicodeEncodeError as error:
        raise InputError(
            f"{shown(name)} is not {codec}: character {characters + error.start} is the lone "
            f"surrogate U+{ord(error.object[error.start]):04X}"
        ) from None
    except UnicodeError as error:
        raise InputError(f"{shown(name)} is not {codec}: {error}") from None


def blocks_of(name: str, least: int = _BLOCK) -> Generator[tuple[bytes, int], None, None]:
    """A file's bytes, unpacked, `least` or more at a time, and how many of the file's were read."""
    with reading(name), opened(name) as file:
        gathered = bytearray()
        for data in _unpacked(name, file):
            gathered += data
            if len(gathered) >= least:
                yield bytes(gathered), _told(file)
                gathered.clear()
        if gathered:
            yield bytes(gathered), _told(file)


def _told(file: io.BufferedIOBase) -> int:
    try:
        return file.tell()
    except OSError:  # a pipe
        return 0


def _unpacked(name: str, file: io.BufferedIOBase) -> Iterator[bytes]:
    if name.endswith(".zst"):
        yield from _zstd_frames(file)
        return
    stream: io.BufferedIOBase = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
    while data := stream.read1(_BLOCK):
        yield data


def _zstd_frames(file: io.BufferedIOBase) -> Iterator[bytes]:
    """All frames of a *.zst, one after another; the last one must be whole."""
    begin = _zstd()
    frame: Any = None
    while data := file.read1(_PACKED):
        while data:
            frame = frame or begin()
            yield frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends inside a frame")


def _zstd() -> Any:
    """What begins a frame: Python's own from 3.14 on, else zstandard's."""
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


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what opening and reading raise into one `InputError`."""
    if "\0" in name:
        raise InputError(f"file name {name!r} holds a NUL: no file has such a name")
    packed = (_zstd_error(),) if name.endswith(".zst") else ()
    try:
        yield
    except InputError:  # a ValueError, as some of those below
        raise
    except FileNotFoundError:
        raise no_such_file(name) from None
    except (gzip.BadGzipFile, EOFError, zlib.error, *packed) as error:
        kind = "zstd" if packed else "gzip"
        raise InputError(f"{shown(name)} is not a whole {kind} file: {error}") from None
    except OSError as error:
        raise InputError(f"{shown(name)} cannot be read: {error.strerror or error}") from None
