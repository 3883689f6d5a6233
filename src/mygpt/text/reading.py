"""Read files into memory, refusing those that do not fit and those that are not text files.

A file is read, not memory-mapped: reading a mapped file that shrinks would end the process with
SIGBUS.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import select
import stat
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence

from mygpt.errors import InputError, OutOfMemoryError
from mygpt.machine import free_memory_bytes
from mygpt.text.compression import (
    CompressionError,
    compression_by_content,
    compression_by_name,
    decompressed,
)
from mygpt.text.file_types import FIRST_BYTES

_BLOCK = 2**20  # bytes
_WRITER_WAIT_S = 10.0
_ADDRESS = re.compile(r"(?i)(https?|ftp|s3|hf|gs):/")  # `Path` collapses the two slashes into one
_NAMED = 3  # files that a note names

# The memory that training on a text needs apart from the model: the Python string, and 2 bytes for
# each byte of the file (first the file's content while it is decoded, later the token ids).
# Measured up to the first step, in bytes for each byte of a 200 MB file: 3.4 for ASCII, 6.3 for
# ASCII with one emoji (each character is then 4 bytes wide), 2.5 to 3.5 for Cyrillic.
_PER_BYTE = 2
_HEADROOM = 1.25

# Text compresses to a third or a tenth of its size, tables and logs to a fiftieth. gzip can reach
# a thousandth, in a file made to exhaust memory.
_MOST_RATIO = 100
_SMALL_UNCOMPRESSED = 2**26  # bytes: below this the ratio is not checked


class Reader:
    """Reads files into memory, up to the amount that was free when the reader was created.

    Args:
        legacy: decompress only files named *.gz, as mygpt 0.1 did.

    Attributes:
        legacy: see `Args`.
    """

    def __init__(self, *, legacy: bool = False) -> None:
        self.legacy = legacy
        self._remarks: dict[str, list[str]] = {}
        self._plain: list[str] = []
        self._free = free_memory_bytes()
        self._needed = 0.0  # by the texts so far

    def check_sizes(self, names: Sequence[str]) -> None:
        """Check by their sizes that files fit into memory, before any of them is read.

        Raises:
            OutOfMemoryError: with the memory needed, the memory free, and how much text fits.
        """
        sizes = [status.st_size for name in names if (status := _regular(name))]
        if sizes:
            what = shown(names[0]) if len(names) == 1 else f"the text in {len(names)} files"
            self._check(f"{what} is", sum(sizes), sum(sizes))

    def read(self, name: str) -> bytearray:
        """The whole content, decompressed, of a file or of standard input ("-").

        Raises:
            InputError: if it is missing, cannot be read, or is a device.
            OutOfMemoryError: as soon as more has been read than fits.
        """
        before = _regular(name)
        compression = "" if before is None or self.legacy else compression_of_file(name)
        if compression and not compression_by_name(name):
            self.remark(name, [f"this is a {compression} file; it was decompressed"])
        data = bytearray()
        with self.noting_change(name):
            for block in _blocks_as_named(name) if self.legacy else _blocks(name):
                try:
                    data += block
                except MemoryError:
                    raise out_of_memory(name) from None
                self._check(f"{shown(name)} is more than", len(data), len(data))
                if before is not None and not self.legacy:
                    require_sensible_ratio(name, len(data), before.st_size)
        return data

    @contextlib.contextmanager
    def noting_change(self, name: str) -> Iterator[None]:
        """Add a note if the file changes while the body of the `with` statement runs."""
        before = _regular(name)
        yield
        after = _regular(name)
        if before and (
            after is None
            or (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns)
        ):
            changed = " changed while it was read: --resume may read different text"
            self._remarks.setdefault(changed, []).append(shown(name))

    def start_of(self, name: str) -> bytearray:
        """The first 64 KiB of a file, decompressed, to recognise its type; raises as `read`."""
        data = bytearray()
        begin = _blocks_as_named if self.legacy else _blocks
        with contextlib.closing(begin(name, FIRST_BYTES)) as blocks:
            for block in blocks:
                data += block
                if len(data) >= FIRST_BYTES:
                    break
        return data

    def remark(self, name: str, found: Iterable[str]) -> None:
        """Add remarks on a file; files with the same remark share one note."""
        for remark in found:
            self._remarks.setdefault(f": {remark}", []).append(shown(name))

    def add_note(self, note: str) -> None:
        """Add a note."""
        self._plain.append(note)

    @property
    def notes(self) -> list[str]:
        """The notes so far, and one line per distinct remark with the files it is about."""
        return self._plain + notes_of(self._remarks)

    def check_text(self, name: str, num_bytes: int, text_bytes: int) -> None:
        """Check that a text fits, `num_bytes` in its file and `text_bytes` in memory.

        Raises:
            OutOfMemoryError: if it does not.
        """
        self._check(f"{shown(name)} is", num_bytes, text_bytes)

    def count_in_memory(self, num_bytes: int, text_bytes: int) -> None:
        """Add a text to those that stay in memory, whose need later checks include."""
        self._needed += _need(num_bytes, text_bytes)

    def _check(self, what: str, num_bytes: int, text_bytes: int) -> None:
        need = self._needed + _need(num_bytes, text_bytes)
        if self._free is None or need <= self._free:
            return
        fits = num_bytes * max(0.0, self._free - self._needed) / (need - self._needed)
        it = "it and the text read before" if self._needed else "it"
        raise OutOfMemoryError(
            f"{what} {_size(num_bytes)}: training on {it} needs {_size(need)} of memory, and "
            f"{_size(self._free)} are free; train on a part of it, {_size(fits)} at most"
        )


def notes_of(remarks: Mapping[str, Sequence[str]]) -> list[str]:
    """One line per remark, beginning with the names of the files that it is about."""
    found = []
    for remark, names in remarks.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        about = ", ".join(names[:_NAMED]) + more
        found.append(f"{about}{remark}")
    return found


def out_of_memory(name: str) -> OutOfMemoryError:
    """The error for a file during whose reading Python ran out of memory."""
    return OutOfMemoryError(f"out of memory while reading {shown(name)}: train on a part of it")


def shown(name: str) -> str:
    """A file's name as messages show it, on one line."""
    if name == "-":
        return "standard input"
    return name if name.isprintable() else repr(name)


def no_such_file(name: str) -> InputError:
    """The error for a path that does not exist."""
    if _ADDRESS.match(name):
        return InputError(
            f"{shown(name)} is a network address, and only files are read: download it first "
            "(curl -O ADDRESS), then name the file"
        )
    return InputError(
        f"{shown(name)} does not exist: name a text file, a folder or a pattern, or - for "
        "standard input"
    )


def _need(num_bytes: int, text_bytes: int) -> float:
    return _HEADROOM * (text_bytes + _PER_BYTE * num_bytes)


def _size(num_bytes: float) -> str:
    """A size with its unit, rounded down, so that a text of the size named as fitting fits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{math.floor(10 * num_bytes / scale) / 10:.1f} {unit}"
    return f"{math.floor(num_bytes)} bytes"


def _regular(name: str) -> os.stat_result | None:
    """The `stat` result of a regular file; None if there is no such file."""
    try:
        status = os.stat(name)
    except (OSError, ValueError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _blocks(name: str, block: int = _BLOCK) -> Generator[bytes, None, None]:
    """A file's bytes in blocks, decompressed if its name or first bytes indicate compression."""
    with file_errors(name), opened(name) as file:
        yield from decompressed(
            file, compression_by_name(name) or compression_by_content(file), block
        )


def _blocks_as_named(name: str, block: int = _BLOCK) -> Generator[bytes, None, None]:
    """A file's bytes in blocks, decompressed only if its name ends in .gz."""
    with file_errors(name), opened(name) as file:
        yield from decompressed(file, "gzip" if name.endswith(".gz") else "", block)


def compression_of_file(name: str) -> str:
    """The compression of a regular file: "gzip", "zstd", or "" for none."""
    with file_errors(name), opened(name) as file:
        return compression_by_name(name) or compression_by_content(file)


def require_sensible_ratio(name: str, uncompressed_bytes: int, compressed_bytes: int) -> None:
    """Check that a compressed file does not expand far more than text does.

    Raises:
        InputError: if it expands to more than 64 MiB and more than 100 times its size.
    """
    if (
        uncompressed_bytes > _SMALL_UNCOMPRESSED
        and uncompressed_bytes > _MOST_RATIO * compressed_bytes
    ):
        raise InputError(
            f"{shown(name)} expands to more than {_MOST_RATIO} times its compressed size, which "
            "ordinary text does not: if that is intended, decompress it and name the result"
        )


@contextlib.contextmanager
def file_errors(name: str) -> Iterator[None]:
    """Turn errors of opening, reading and decompressing a file into an `InputError`."""
    if "\0" in name:
        raise InputError(f"file name {name!r} contains a NUL character: no file has such a name")
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise no_such_file(name) from None
    except CompressionError as error:
        raise InputError(
            f"{shown(name)} is not a complete {error}; download or compress it again"
        ) from None
    except OSError as error:
        raise InputError(f"{shown(name)} cannot be read: {error.strerror or error}") from None


@contextlib.contextmanager
def opened(name: str) -> Iterator[io.BufferedIOBase]:
    """Open a file, or standard input ("-"), for reading; a device raises `InputError`."""
    if name != "-":
        with open(name, "rb", opener=_without_waiting) as file:
            _check_kind(file.fileno(), name)
            yield file
        return
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None or stream.closed:
        raise InputError("standard input is closed: name a text file")
    try:
        descriptor = stream.fileno()
    except OSError:  # it has no file descriptor, as in a notebook or a test
        descriptor = None
    if descriptor is not None:
        _check_kind(descriptor, name)
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
