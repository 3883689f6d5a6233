"""Read files and standard input as text, block by block: decompress, decode, and refuse the rest.

A file is read, not memory-mapped: reading a mapped file that shrinks would end the process with
SIGBUS.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import gzip
import io
import os
import re
import select
import stat
import sys
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from importlib import import_module
from itertools import islice
from typing import Any

from mygpt.errors import InputError
from mygpt.text.file_types import FIRST_BYTES, bom_of, compression_of, is_utf8, why_not_text

_BLOCK = 2**18  # bytes that are read at a time, at least
_ZSTD_BLOCK = 2**11  # compressed bytes at a time: they may expand some thousand times
_ENDINGS = {".gz": "gzip", ".zst": "zstd"}
_WRITER_WAIT_S = 10.0
_ADDRESS = re.compile(r"(?i)(https?|ftp|s3|hf|gs):/")  # `Path` collapses the two slashes into one
_MOST_ENTRIES = 1000  # of a folder, that are compared with the name of a missing file
_FOR_HOST_NAMES = ("idna", "punycode")  # their time grows with the square of the length

# Text compresses to a third or a tenth of its size, tables and logs to a fiftieth. gzip can reach
# a thousandth, in a file made to exhaust memory.
_MOST_RATIO = 100
_SMALL_UNCOMPRESSED = 2**26  # bytes: below this the ratio is not checked


class NotTextError(InputError):
    """Raised for a file that is not text in the encoding used."""


def shown(name: str) -> str:
    """A file's name as messages show it, on one line."""
    if name == "-":
        return "standard input"
    return name if name.isprintable() else repr(name)


# --- opening -------------------------------------------------------------------------------


@contextlib.contextmanager
def file_errors(name: str) -> Iterator[None]:
    """Turn errors of opening and reading a file into an `InputError`."""
    if "\0" in name:
        raise InputError(f"file name {name!r} contains a NUL character: no file has such a name")
    try:
        yield
    except FileNotFoundError:
        remedy = "name a text file, a folder or a pattern, or - for standard input"
        if _ADDRESS.match(name):
            remedy = "only files are read, not network addresses, so download it (curl -O ADDRESS)"
        raise InputError(f"{shown(name)} does not exist: {_alike(name)}{remedy}") from None
    except OSError as error:
        raise InputError(f"{shown(name)} cannot be read: {error.strerror or error}") from None


def _alike(name: str) -> str:
    """A question with the nearest name in the file's folder; empty if there is none."""
    folder, base = os.path.split(name)
    with contextlib.suppress(OSError):
        with os.scandir(folder or ".") as entries:
            names = [entry.name for entry in islice(entries, _MOST_ENTRIES)]
        for found in difflib.get_close_matches(base, names, n=1):
            return f"did you mean {shown(os.path.join(folder, found))}? "
    return ""


@contextlib.contextmanager
def _opened(name: str) -> Iterator[io.BufferedIOBase]:
    """Open a file, or standard input ("-"), for reading; a device raises `InputError`."""
    if name != "-":
        with open(name, "rb", opener=_without_waiting) as file:
            _check_kind(file.fileno(), name)
            yield file
        return
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None or stream.closed:
        raise InputError("standard input is closed: name a text file")
    with contextlib.suppress(io.UnsupportedOperation):  # as in a notebook or a test
        _check_kind(stream.fileno(), name)
    yield stream


def _without_waiting(name: str, flags: int) -> int:
    """Open without blocking: opening a pipe without a writer would otherwise wait for ever."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def _check_kind(descriptor: int, name: str) -> None:
    """Refuse devices, which may have no end (/dev/zero); wait up to 10 s for a pipe's writer."""
    status = os.fstat(descriptor)
    device = stat.S_ISBLK(status.st_mode) or (
        stat.S_ISCHR(status.st_mode)
        and not os.isatty(descriptor)
        and not os.path.samestat(status, os.stat(os.devnull))
    )
    if device:
        raise InputError(f"{shown(name)} is a device, not a text file: name a text file")
    if stat.S_ISFIFO(status.st_mode) and os.name == "posix":
        select.select([descriptor], [], [], _WRITER_WAIT_S)
    if hasattr(os, "set_blocking"):
        # In non-blocking mode read1() returns b"" both at the end and while the writer pauses.
        os.set_blocking(descriptor, True)


# --- bytes ---------------------------------------------------------------------------------


def compression_by_name(name: str) -> str:
    """The compression that a file name indicates: "gzip", "zstd", or "" for none."""
    return next((how for end, how in _ENDINGS.items() if name.lower().endswith(end)), "")


def without_compression_suffix(name: str) -> str:
    """A file's name without its .gz or .zst."""
    ending = next((end for end in _ENDINGS if name.lower().endswith(end)), "")
    return name[: len(name) - len(ending)]


def compression_of_file(name: str) -> str:
    """The compression of a file by its name, or else by its first bytes."""
    with file_errors(name), _opened(name) as file:
        return _compression(file, name)


def _compression(file: io.BufferedIOBase, name: str) -> str:
    if isinstance(file, io.BytesIO):  # standard input that was read from a pipe before
        start = bytes(file.getbuffer()[file.tell() :][:4])
    else:
        start = file.peek(4)[:4] if isinstance(file, io.BufferedReader) else b""
    return compression_by_name(name) or compression_of(start)


def blocks_of(name: str) -> Generator[tuple[bytes, int], None, None]:
    """A file's decompressed bytes in blocks, each with the position reached in the file.

    Args:
        name: of the file; "-" is standard input.

    Raises:
        InputError: if it is missing, a device, damaged or truncated.
    """
    with file_errors(name), _opened(name) as file:
        gathered = bytearray()
        for data in _decompressed(file, _compression(file, name), name):
            gathered += data
            if len(gathered) >= _BLOCK:
                yield bytes(gathered), _position(file)
                gathered.clear()
        if gathered:
            yield bytes(gathered), _position(file)


def start_of(name: str) -> bytes:
    """The first `FIRST_BYTES` decompressed bytes of a file; raises as `blocks_of`."""
    with contextlib.closing(blocks_of(name)) as blocks:
        return next(blocks, (b"", 0))[0][:FIRST_BYTES]


def require_sensible_ratio(name: str, uncompressed_bytes: int, compressed_bytes: int) -> None:
    """Raise `InputError` for a file of more than 64 MiB and 100 times its compressed size."""
    if uncompressed_bytes > max(_SMALL_UNCOMPRESSED, _MOST_RATIO * compressed_bytes):
        raise InputError(
            f"{shown(name)} expands to more than {_MOST_RATIO} times its compressed size, which "
            "ordinary text does not: if that is intended, decompress it and name the result"
        )


def _decompressed(file: io.BufferedIOBase, compression: str, name: str) -> Iterator[bytes]:
    """A file's bytes in blocks of any length."""
    damages: tuple[type[Exception], ...] = (gzip.BadGzipFile, EOFError, zlib.error)
    try:
        if compression == "zstd":
            new_frame, error = _zstd()
            damages = (*damages, error)
            yield from _zstd_frames(file, new_frame)
            return
        stream: io.BufferedIOBase = gzip.GzipFile(fileobj=file) if compression else file
        while data := stream.read1(_BLOCK):
            yield data
    except damages as error:
        raise InputError(
            f"{shown(name)} is not a complete {compression} file: {error}; download or compress it "
            "again"
        ) from None


def _zstd_frames(file: io.BufferedIOBase, new_frame: Callable[[], Any]) -> Iterator[bytes]:
    """The decompressed frames of a zstd file; the last one must be complete."""
    frame: Any = None
    while data := file.read1(_ZSTD_BLOCK):
        while data:
            frame = frame or new_frame()
            yield frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends inside a frame")


def _zstd() -> tuple[Callable[[], Any], type[Exception]]:
    """A frame's decompressor and its error: the standard library's from Python 3.14 on."""
    if sys.version_info >= (3, 14):
        module = import_module("compression.zstd")
        return module.ZstdDecompressor, module.ZstdError
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError


def _position(file: io.BufferedIOBase) -> int:
    """The position in a file; 0 for a pipe."""
    try:
        return file.tell()
    except OSError:  # a pipe
        return 0


# --- text ----------------------------------------------------------------------------------


def check_encoding(encoding: str | None) -> None:
    """Raise `InputError` unless `encoding` is None or a text encoding that Python knows."""
    if encoding is None:
        return
    try:
        "".encode(encoding)  # a codec from bytes to bytes is a LookupError here
        name = codecs.lookup(encoding).name
    except (LookupError, ValueError):  # a ValueError: "undefined", or a NUL in the name
        name = ""
    if not name or name in _FOR_HOST_NAMES:
        raise InputError(
            f"encoding={encoding!r} is not known: try utf-8, utf-16, latin-1 or cp1252"
        )


def texts_of(
    blocks: Iterable[tuple[bytes, int]], name: str, encoding: str | None
) -> Iterator[tuple[str, int]]:
    """A file's text in pieces, each with the number that came with its block.

    Args:
        blocks: as `blocks_of` yields them.
        name: of the file, for error messages.
        encoding: None is UTF-8, or the encoding that a byte-order mark names; the mark is then
            removed.

    Raises:
        NotTextError: if it is not text in that encoding, with the position.
    """
    decoder: _Decoder | None = None
    read = 0
    for data, read in blocks:
        if decoder is None:
            if (why := why_not_text(data[:FIRST_BYTES], encoding)) is not None:
                raise NotTextError(f"{shown(name)} {why}")
            bom_length, codec = codec_of(data, encoding)
            decoder = _Decoder(name, codec, bom_length)
            data = data[bom_length:]
        yield decoder.decode(data), read
    if decoder is not None:
        yield decoder.decode(b"", final=True), read


def codec_of(start: bytes, encoding: str | None) -> tuple[int, str]:
    """The length of the byte-order mark to remove, and the codec to decode with."""
    bom, codec = bom_of(start)
    if encoding is None:
        return len(bom), codec or "utf-8"
    own = codec == codecs.lookup(encoding).name
    return (len(bom) if own else 0), encoding


class _Decoder:
    """Decodes a file's bytes; its errors name the position in the file."""

    def __init__(self, name: str, codec: str, position: int) -> None:
        self._name, self._codec = shown(name), codec
        self._decoder = codecs.getincrementaldecoder(codec)()
        self._position, self._characters = position, 0

    def decode(self, data: bytes, *, final: bool = False) -> str:
        waiting = self._decoder.getstate()[0]  # bytes of an incomplete character
        begin = self._position - len(waiting) if isinstance(waiting, bytes) else self._position
        problem = ""
        try:
            text = self._decoder.decode(data, final)
            if self._codec != "utf-8":  # some codecs accept lone surrogates
                text.encode("utf-8")
        except UnicodeDecodeError as error:
            wrong = error.object[error.start : error.start + 1].hex()
            problem = (
                f"byte 0x{wrong} at position {begin + error.start}; name its encoding (--encoding "
                "latin-1?); training can take its bytes with --tokenizer byte"
            )
        except UnicodeEncodeError as error:
            wrong = f"U+{ord(error.object[error.start]):04X}"
            problem = f"character {self._characters + error.start} is the lone surrogate {wrong}"
        except UnicodeError as error:
            problem = str(error)
        if problem:
            raise NotTextError(f"{self._name} is not {self._codec}: {problem}")
        self._position += len(data)
        self._characters += len(text)
        return text


def begins_as_text(start: bytes, encoding: str | None) -> bool:
    """Whether a file with these first bytes may be text in that encoding, without NULs."""
    if why_not_text(start, encoding) is not None:
        return False
    try:
        return "\0" not in _beginning(start, encoding)
    except UnicodeError:
        return False


def _beginning(start: bytes, encoding: str | None) -> str:
    """The text of a file's first bytes, apart from an incomplete character at their end."""
    bom_length, codec = codec_of(start, encoding)
    text: str = codecs.getincrementaldecoder(codec)().decode(start[bom_length:])
    return text


def remarks(start: bytes, encoding: str | None) -> list[str]:
    """Notes for the user on a text with these first bytes, such as HTML or odd line ends."""
    try:
        text = _beginning(start, encoding)
    except UnicodeError:
        return []
    begin = text[:64].lstrip().lower()
    codec = "" if encoding is None else codecs.lookup(encoding).name
    one_byte = codec.startswith(("iso8859", "cp125", "mac"))
    found = {
        "lines end with carriage returns only, and the model is trained on them as they are "
        "(tr '\\r' '\\n' converts them)": "\r" in text and "\n" not in text,
        "this is RTF, and the model is trained on its markup too: save it as plain text": (
            begin.startswith("{\\rtf")
        ),
        "this is HTML, and the model is trained on its tags too: save it as plain text (pandoc "
        "FILE -t plain -o FILE.txt)": begin.startswith(("<!doctype html", "<html")),
        "it contains NUL characters, which is unusual; the model is trained on them too": (
            "\0" in text
        ),
        f"this is valid UTF-8, and {encoding} decodes it to other characters": (
            one_byte and not start.isascii() and is_utf8(start)
        ),
    }
    return [remark for remark, applies in found.items() if applies]
