"""Documents as a stream, however long the text: plain files, packed ones, files of records.

A plain file is one document; a record (a line of a *.jsonl, a row of a *.csv) is one. Little of
them is in memory at a time. What is no text is refused with its place, as `read_corpus` does.
"""

from __future__ import annotations

import contextlib
import glob
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mygpt.errors import InputError
from mygpt.text.compression import compression_by_name
from mygpt.text.decoding import NotDecodedError, begins_as_text, check_encoding, remarks
from mygpt.text.documents import LINE_ENDS, SEPARATOR
from mygpt.text.file_stream import blocks_of, texts_of
from mygpt.text.file_types import FIRST_BYTES, why_not_text
from mygpt.text.folder import FileGroup, files_below
from mygpt.text.reading import compression_of_file, file_errors, notes_of, shown
from mygpt.text.records import (
    FIELD,
    kind_of,
    texts_of_csv,
    texts_of_json,
    texts_of_lines,
    texts_of_table,
)

# How files are read, which runs and stores record: since 2 they are judged by their first bytes
# too, and files of records are read as such.
READING_VERSION = 2


@dataclass(frozen=True)
class TextSource:
    """A file of documents.

    Attributes:
        name: its path, or "-" for standard input.
        size: its bytes; -1 for standard input and pipes.
        modified_ns: when it was last changed; -1 for standard input and pipes.
        kind: "text" is one document, "lines" one a line, "csv" and "table" one a row, "json" one
            an object.
        compression: "gzip", "zstd", or "" for none; of standard input and pipes what the name says.
        uncompressed_bytes: of a packed file that was measured, at least.
    """

    name: str
    size: int
    modified_ns: int
    kind: str
    compression: str = ""
    uncompressed_bytes: int = 0

    @property
    def is_lasting(self) -> bool:
        """Whether it can be read a second time."""
        return self.size >= 0

    @property
    def num_bytes(self) -> int:
        """Its bytes, decompressed as far as that is known."""
        return max(self.size, self.uncompressed_bytes)

    @property
    def is_plain(self) -> bool:
        """Whether it is neither packed nor a table: its text can be read from any line on."""
        return self.kind in ("text", "lines") and not self.compression


class Piece(NamedTuple):
    """A piece of a document.

    Attributes:
        text: may be empty.
        ends: whether the document ends with it.
        read: bytes of the file that have been read; 0 where that is not known.
    """

    text: str
    ends: bool
    read: int


@dataclass(frozen=True)
class RecordOptions:
    """How files of records (JSON lines, JSON, CSV, Parquet) are read.

    Attributes:
        field: the field that holds the text. None means "text"; a file whose first record has no
            field "text" is then read as plain text, with a note.
        lines_may_be_plain: whether that also applies to JSON lines, which otherwise must have
            the field.
        refuse_unused: whether to refuse a `field` when no file contains records.
        legacy_names: whether only *.jsonl and *.parquet are files of records, as in mygpt 0.1.
    """

    field: str | None = None
    lines_may_be_plain: bool = False
    refuse_unused: bool = True
    legacy_names: bool = False

    @property
    def field_name(self) -> str:
        """The field that is read."""
        return FIELD if self.field is None else self.field

    def kind(self, name: str) -> str:
        """How a file of that name holds documents, if its content why_plain."""
        if name == "-":
            return "text" if self.field is None else "lines"
        if self.legacy_names:
            ending = Path(name.removesuffix(".gz").removesuffix(".zst")).suffix
            return {".jsonl": "lines", ".parquet": "table"}.get(ending, "text")
        return kind_of(name)

    def why_plain(self, source: TextSource, encoding: str | None) -> str | None:
        """Why a file that is named as one of records is none; None where it is one."""
        strict = self.legacy_names or self.field is not None or source.kind in ("text", "table")
        if (
            strict
            or not source.is_lasting
            or (source.kind == "lines" and not self.lines_may_be_plain)
        ):
            return None
        try:
            some = next(_documents(source, FIELD, encoding, 0), None)
        except InputError as error:
            return str(error)
        return None if some is not None else f"{shown(source.name)} has no record"


_ANY = RecordOptions()


def find_sources(
    paths: Sequence[str], *, encoding: str | None = None, records: RecordOptions = _ANY
) -> tuple[list[TextSource], list[str]]:
    """The files that names, folders, patterns and "-" stand for, in order, and notes.

    A folder gives its files as for `read_corpus`: no hidden ones, no runs and stores of ours, and
    only what begins as text, *.parquet or packed text. Nothing is read but beginnings.

    Raises:
        InputError: for what is missing, empty, or a device, and for a field where there are no
            records.
    """
    check_encoding(encoding)
    found: list[TextSource] = []
    notes: list[str] = []
    said = _Notes(encoding)
    for path in paths:
        if path != "-" and "\0" not in path and os.path.isdir(path):
            place = FileGroup([], Path(path))
            found += _in_folder(place, encoding, records, said)
            notes += place.notes(encoding)
        else:
            for name in _matches(path):
                source = source_of(name, records)
                start = _start_of(source, encoding)
                found.append(said.take(source, start, records))
    if sum(source.name == "-" for source in found) > 1:
        raise InputError("standard input is named twice: it can be read once")
    require_field_used(records, [source.kind for source in found])
    return found, notes + said.lines()


def require_field_used(records: RecordOptions, kinds: Sequence[str]) -> None:
    """Refuse a field that was named where no file has fields: it would be ignored."""
    if records.field is not None and records.refuse_unused and kinds and set(kinds) == {"text"}:
        raise InputError(
            f"--field {records.field} is for *.jsonl, *.ndjson, *.json, *.csv, *.tsv and "
            "*.parquet, and plain text was named: leave it out"
        )


class _Notes:
    """What has to be known about the files that are read, each thing said once."""

    def __init__(self, encoding: str | None) -> None:
        self._encoding = encoding
        self._remarks: dict[str, list[str]] = {}
        self._single: list[str] = []

    def take(self, source: TextSource, start: bytearray, records: RecordOptions) -> TextSource:
        """Keep what there is to say about a file that begins so; returns it as it is read."""
        found = remarks(start, self._encoding) if start else []
        if source.compression != compression_by_name(source.name):
            found.append(f"this is a {source.compression} file, whose text is decompressed")
        for remark in found:
            self._remarks.setdefault(f": {remark}", []).append(shown(source.name))
        if (why := records.why_plain(source, self._encoding)) is None:
            return source
        self._single.append(plain_text_note(why))
        return replace(source, kind="text")

    def lines(self) -> list[str]:
        """A line for each thing."""
        return notes_of(self._remarks) + self._single


def plain_text_note(why: str) -> str:
    """The note on a file that is named as one of records, and is none of these."""
    return f"{why}; it is read as plain text, with all that is in it"


def _matches(path: str) -> list[str]:
    if not path:
        raise InputError("a file name is empty: name a text file, or - for standard input")
    if path == "-" or "\0" in path or os.path.exists(path) or not glob.has_magic(path):
        return [path]
    found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
    if not found:
        raise InputError(f"no file matches {path!r}")
    return found


def source_of(name: str, records: RecordOptions) -> TextSource:
    """A file, or standard input ("-"), as it is named; raises as `find_sources` does."""
    with file_errors(name):
        status = None if name == "-" else os.stat(name)
    kind = records.kind(name)
    if status is None or not stat.S_ISREG(status.st_mode):
        if kind == "table":
            raise InputError(f"{shown(name)} is no file: a *.parquet cannot come through a pipe")
        return TextSource(name, -1, -1, kind, compression_by_name(name))
    if not status.st_size:
        raise InputError(f"{shown(name)} is empty: there is no text in it")
    compression = "" if kind == "table" else compression_of_file(name)
    return TextSource(name, status.st_size, status.st_mtime_ns, kind, compression)


def _in_folder(
    place: FileGroup, encoding: str | None, records: RecordOptions, said: _Notes
) -> list[TextSource]:
    """The sources of a folder; what is none joins the place's passed over."""
    assert place.folder is not None
    sources: list[TextSource] = []
    for path in sorted(files_below(place.folder)):
        start = bytearray()
        try:
            source = source_of(str(path), records)
            start = _start_of(source, encoding)
            may_be_text = source.kind == "table" or begins_as_text(start, encoding)
        except NotDecodedError as error:
            start, may_be_text = bytearray(error.start), False
        except InputError:  # it cannot be read, or is empty
            may_be_text = False
        if may_be_text:
            sources.append(said.take(source, start, records))
        else:
            place.skip(path, start)
    if not sources:
        raise place.none_found(encoding)
    return sources


def _start_of(source: TextSource, encoding: str | None) -> bytearray:
    """The first decompressed bytes of a file; empty for a table and for a pipe.

    Raises:
        NotDecodedError: where they say that it is not text.
    """
    if not source.is_lasting or source.kind == "table":
        return bytearray()
    with contextlib.closing(blocks_of(source.name, FIRST_BYTES)) as blocks:
        start = next(blocks, (b"", 0))[0]
    if (why := why_not_text(start, encoding)) is not None:
        raise NotDecodedError(f"{shown(source.name)} {why}", start)
    return bytearray(start)


def pieces(
    source: TextSource,
    *,
    field: str = "text",
    encoding: str | None = None,
    split: bool = False,
    skip_rows: int = 0,
    skip_characters: int = 0,
    on_separators: Callable[[int], None] | None = None,
) -> Iterator[Piece]:
    """A source's documents in pieces, in order; every document's last piece says that it ends.

    Args:
        source: from `find_sources`.
        field: of an object or a table that holds the text.
        encoding: None is UTF-8, or what a byte-order mark says.
        split: whether `SEPARATOR` separates documents of a file, or of a line or row.
        skip_rows: documents to leave out; of those that are split the parts count.
        skip_characters: of the one after those, to leave out.
        on_separators: called with the number of separators found in each piece.

    Raises:
        InputError: for what is no text, no whole file, or has no such field, with its place.
    """
    skipped = 0 if split else skip_rows
    if source.kind == "text":
        found = _whole(source, encoding) if not skipped else iter(())
    else:
        found = _documents(source, field, encoding, skipped)
    if split:
        found = _after(split_at_separators(found, on_separators), skip_rows)
    left = skip_characters
    for piece in found:
        text = piece.text[left:]
        left -= len(piece.text) - len(text)
        if piece.ends:
            left = 0
        yield piece._replace(text=text)


def split_at_separators(
    found: Iterator[Piece], on_separators: Callable[[int], None] | None = None
) -> Iterator[Piece]:
    """Split documents that arrive in pieces at each `SEPARATOR`.

    The separator and the line ends after it are removed. An empty document yields one empty
    piece. `on_separators` is called with the number of separators found in each piece.
    """
    waiting, behind = "", False  # what may begin a separator; whether one has just ended
    for text, ends, read in found:
        *before, text = (waiting + text).split(SEPARATOR)
        if before and on_separators is not None:
            on_separators(len(before))
        for part in before:
            yield Piece(part.lstrip(LINE_ENDS) if behind else part, True, read)
            behind = True
        if behind:
            text = text.lstrip(LINE_ENDS)
            behind = not text
        held = 0 if ends else _overlap(text)
        waiting = text[len(text) - held :]
        if held < len(text) or ends:
            yield Piece(text[: len(text) - held], ends, read)
        behind = behind and not ends


def _overlap(text: str) -> int:
    """How many characters at a text's end begin a separator."""
    longest = min(len(text), len(SEPARATOR) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(SEPARATOR[:n])), 0)


def _after(found: Iterator[Piece], skip: int) -> Iterator[Piece]:
    """What comes after so many documents."""
    for piece in found:
        if skip:
            skip -= piece.ends
        else:
            yield piece


def _whole(source: TextSource, encoding: str | None) -> Iterator[Piece]:
    read = 0
    for text, read in texts_of(source.name, encoding):
        yield Piece(text, False, read)
    yield Piece("", True, read)


def _documents(source: TextSource, field: str, encoding: str | None, skip: int) -> Iterator[Piece]:
    """A record's text each, but for the first `skip`."""
    if source.kind == "table":
        found = texts_of_table(source.name, field, source.size, skip)
    else:
        read = {"lines": texts_of_lines, "json": texts_of_json, "csv": texts_of_csv}[source.kind]
        found = islice(read(texts_of(source.name, encoding), field, source.name), skip, None)
    for text, place in found:
        yield Piece(text, True, place)
