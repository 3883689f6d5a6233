"""Files into memory, no more of them than it holds; what is no file of text is refused.

A file is read, not mapped: one that shrinks or vanishes meanwhile must not end the program.
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
_ADDRESS = re.compile(r"(?i)(https?|ftp|s3|hf|gs):/")  # `Path` leaves one of the two slashes
_NAMED = 3  # files that a note names

# What learning from a text takes of memory, apart from the model: the text as Python holds it,
# and for each of its bytes two more, while it is decoded for the file, afterwards for its token.
# Up to the first step that measured, in bytes for each of 200 MB: 3.4 for ASCII, 6.3 for the same
# with one emoji (all characters are 4 bytes wide then), 2.5 to 3.5 for Cyrillic.
_PER_BYTE = 2
_HEADROOM = 1.25

# Text packs to a third or a tenth, tables and logs to a fiftieth; gzip reaches a thousandth.
_MOST_RATIO = 100
_SMALL_UNPACKED = 2**26  # bytes: less is taken however well it was packed


class Reader:
    """Reads files whole, within the memory that was free when it was made.

    Args:
        legacy: unpack what is named *.gz and nothing else, as runs of an older mygpt were read.

    Attributes:
        legacy: the same.
    """

    def __init__(self, *, legacy: bool = False) -> None:
        self.legacy = legacy
        self._remarks: dict[str, list[str]] = {}
        self._plain: list[str] = []
        self._free = free_memory_bytes()
        self._needed = 0.0  # by the texts so far

    def expect(self, names: Sequence[str]) -> None:
        """Refuse files whose sizes say that they do not fit, before any of them is read.

        Raises:
            OutOfMemoryError: with what they need, what is free, and how much of them fits.
        """
        sizes = [status.st_size for name in names if (status := _regular(name))]
        if sizes:
            what = shown(names[0]) if len(names) == 1 else f"the text in {len(names)} files"
            self._check(f"{what} is", sum(sizes), sum(sizes))

    def read(self, name: str) -> bytearray:
        """All of a file, decompressed where it is packed, or of standard input ("-").

        Raises:
            InputError: for what is missing, cannot be read, or is no file of text.
            OutOfMemoryError: as soon as it is longer than what fits.
        """
        before = _regular(name)
        compression = "" if before is None or self.legacy else compression_of_file(name)
        if compression and not compression_by_name(name):
            self.remark(name, [f"this is a {compression} file, whose text was decompressed"])
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
        """Keep a note where a file is another after this than before."""
        before = _regular(name)
        yield
        after = _regular(name)
        if before and (
            after is None
            or (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns)
        ):
            changed = " changed while it was read: --resume may not find the same text"
            self._remarks.setdefault(changed, []).append(shown(name))

    def start_of(self, name: str) -> bytearray:
        """The first 64 KiB of a file, decompressed, to see what it is; raises as `read` does."""
        data = bytearray()
        begin = _blocks_as_named if self.legacy else _blocks
        with contextlib.closing(begin(name, FIRST_BYTES)) as blocks:
            for block in blocks:
                data += block
                if len(data) >= FIRST_BYTES:
                    break
        return data

    def remark(self, name: str, found: Iterable[str]) -> None:
        """Keep what has to be known about a file."""
        for remark in found:
            self._remarks.setdefault(f": {remark}", []).append(shown(name))

    def say(self, note: str) -> None:
        """Keep a note."""
        self._plain.append(note)

    @property
    def notes(self) -> list[str]:
        """A line for each thing that has to be known, with the files that it is true of."""
        return self._plain + notes_of(self._remarks)

    def check_text(self, name: str, num_bytes: int, text_bytes: int) -> None:
        """Refuse a text of that many bytes in its file and in memory, where it does not fit."""
        self._check(f"{shown(name)} is", num_bytes, text_bytes)

    def keep(self, num_bytes: int, text_bytes: int) -> None:
        """Count a text among those that stay in memory."""
        self._needed += _need(num_bytes, text_bytes)

    def _check(self, what: str, num_bytes: int, text_bytes: int) -> None:
        need = self._needed + _need(num_bytes, text_bytes)
        if self._free is None or need <= self._free:
            return
        fits = num_bytes * max(0.0, self._free - self._needed) / (need - self._needed)
        it = "it, and what was read before," if self._needed else "it"
        raise OutOfMemoryError(
            f"{what} {_size(num_bytes)}: to learn from {it} takes {_size(need)} of memory, and "
            f"{_size(self._free)} are free; train on a part of it, {_size(fits)} at most"
        )


def notes_of(remarks: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each remark, which begins with the names of the files that it is about."""
    found = []
    for remark, names in remarks.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        about = ", ".join(names[:_NAMED]) + more
        found.append(f"{about}{remark}")
    return found


def out_of_memory(name: str) -> OutOfMemoryError:
    """The error for a file at which the memory ended, whatever was free before."""
    return OutOfMemoryError(f"memory ended while {shown(name)} was read: train on a part of it")


def shown(name: str) -> str:
    """A file's name on one line, as messages show it."""
    if name == "-":
        return "standard input"
    return name if name.isprintable() else repr(name)


def no_such_file(name: str) -> InputError:
    """What to say of a name that no file has."""
    if _ADDRESS.match(name):
        return InputError(
            f"{shown(name)} is an address on the network, and only files are read: fetch it first "
            "(curl -O ADDRESS), then name the file"
        )
    return InputError(
        f"{shown(name)} does not exist: name a text file, a folder or a pattern, or - for "
        "standard input"
    )


def _need(num_bytes: int, text_bytes: int) -> float:
    return _HEADROOM * (text_bytes + _PER_BYTE * num_bytes)


def _size(num_bytes: float) -> str:
    """Rounded down: what "at most" fits must fit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{math.floor(10 * num_bytes / scale) / 10:.1f} {unit}"
    return f"{math.floor(num_bytes)} bytes"


def _regular(name: str) -> os.stat_result | None:
    """What the system knows of a regular file; None where there is none of that name."""
    try:
        status = os.stat(name)
    except (OSError, ValueError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _blocks(name: str, block: int = _BLOCK) -> Generator[bytes, None, None]:
    """A file's bytes as they come, decompressed where its name or its first bytes say so."""
    with file_errors(name), opened(name) as file:
        yield from decompressed(
            file, compression_by_name(name) or compression_by_content(file), block
        )


def _blocks_as_named(name: str, block: int = _BLOCK) -> Generator[bytes, None, None]:
    """A file's bytes as they come, decompressed where its name ends in .gz."""
    with file_errors(name), opened(name) as file:
        yield from decompressed(file, "gzip" if name.endswith(".gz") else "", block)


def compression_of_file(name: str) -> str:
    """What unpacks a regular file: "gzip", "zstd", or "" for none."""
    with file_errors(name), opened(name) as file:
        return compression_by_name(name) or compression_by_content(file)


def require_sensible_ratio(name: str, uncompressed_bytes: int, packed_bytes: int) -> None:
    """Refuse a packed file that unpacks to far more than a text does.

    Raises:
        InputError: with the remedy.
    """
    if uncompressed_bytes > _SMALL_UNPACKED and uncompressed_bytes > _MOST_RATIO * packed_bytes:
        raise InputError(
            f"{shown(name)} unpacks to more than {_MOST_RATIO} times its size, which no "
            "ordinary text does: unpack it and name the file, if it is meant"
        )


@contextlib.contextmanager
def file_errors(name: str) -> Iterator[None]:
    """Turn what opening, reading and unpacking raise into one `InputError`."""
    if "\0" in name:
        raise InputError(f"file name {name!r} holds a NUL: no file has such a name")
    try:
        yield
    except InputError:  # a ValueError, as some of those below
        raise
    except FileNotFoundError:
        raise no_such_file(name) from None
    except CompressionError as error:
        raise InputError(f"{shown(name)} is not a whole {error}") from None
    except OSError as error:
        raise InputError(f"{shown(name)} cannot be read: {error.strerror or error}") from None


@contextlib.contextmanager
def opened(name: str) -> Iterator[io.BufferedIOBase]:
    """A file of text, or standard input ("-"), to be read; devices are refused."""
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
    except OSError:  # no file is behind it, in a notebook or a test
        descriptor = None
    if descriptor is not None:
        _check_kind(descriptor, name)
    yield stream


def _without_waiting(name: str, flags: int) -> int:
    """Open; opening a pipe that nobody writes to would wait for ever."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def _check_kind(descriptor: int, name: str) -> None:
    """Refuse devices, which have no end (/dev/zero); give a pipe's writer some time to come."""
    status = os.fstat(descriptor)
    device = stat.S_ISBLK(status.st_mode) or (
        stat.S_ISCHR(status.st_mode)
        and not os.isatty(descriptor)
        and not os.path.samestat(status, os.stat(os.devnull))
    )
    if device:
        raise InputError(f"{shown(name)} is a device and holds no text: name a text file")
    if stat.S_ISFIFO(status.st_mode) and os.name == "posix":
        select.select([descriptor], [], [], _WRITER_WAIT_S)
    if hasattr(os, "set_blocking"):
        # Else a pause of the writer would pass for the end: read1() gives b"" for both.
        os.set_blocking(descriptor, True)
