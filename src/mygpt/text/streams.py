"""Read documents as a stream, so that the text need not fit into memory.

A plain file is one document, and so is each record of a file of records (a line of a *.jsonl, a
row of a *.csv). Only a few blocks are in memory at a time. Input that is not text is refused with
its position, as by `read_corpus`.
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

# The version of the rules for reading files, which runs and stores record. Since version 2 the
# first bytes are checked too, and files of records are read as such.
READING_VERSION = 2


@dataclass(frozen=True)
class TextSource:
    """A file, or standard input, that contains documents.

    Attributes:
        name: path, or "-" for standard input.
        size: of the file in bytes; -1 for standard input and pipes.
        modified_ns: time of the last change in ns; -1 for standard input and pipes.
        kind: the format: "text" (one document), "lines" (one per line), "csv" and "table" (one per
            row), "json" (one per object).
        compression: "gzip", "zstd", or "" for none; for standard input and pipes by name only.
        uncompressed_bytes: a lower bound on the uncompressed size, if it was measured; else 0.
    """

    name: str
    size: int
    modified_ns: int
    kind: str
    compression: str = ""
    uncompressed_bytes: int = 0

    @property
    def is_lasting(self) -> bool:
        """Whether it can be read more than once: a regular file."""
        return self.size >= 0

    @property
    def num_bytes(self) -> int:
        """Its size in bytes, uncompressed where that was measured; -1 if unknown."""
        return max(self.size, self.uncompressed_bytes)

    @property
    def is_plain(self) -> bool:
        """Whether reading can start at any line: neither compressed nor CSV, JSON or Parquet."""
        return self.kind in ("text", "lines") and not self.compression


class Piece(NamedTuple):
    """A piece of a document.

    Attributes:
        text: may be empty.
        ends: whether it is the document's last piece.
        read: number of bytes read of the file so far; 0 if unknown.
    """

    text: str
    ends: bool
    read: int


@dataclass(frozen=True)
class RecordOptions:
    """Options for reading files of records (JSON lines, JSON, CSV, Parquet).

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
        """The field to read: `field`, or "text" if that is None."""
        return FIELD if self.field is None else self.field

    def kind(self, name: str) -> str:
        """The format that a file name indicates, as in `TextSource.kind`."""
        if name == "-":
            return "text" if self.field is None else "lines"
        if self.legacy_names:
            ending = Path(name.removesuffix(".gz").removesuffix(".zst")).suffix
            return {".jsonl": "lines", ".parquet": "table"}.get(ending, "text")
        return kind_of(name)

    def why_plain(self, source: TextSource, encoding: str | None) -> str | None:
        """Why a file is read as plain text despite its name; None if it is read as records."""
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
    """The files that paths, folders, glob patterns and "-" stand for, in order, and notes.

    A folder is searched as by `read_corpus`. Only the first bytes of files are read, and the
    first record of files of records.

    Raises:
        InputError: if a path is missing, empty or a device, or if a field is named and no file
            contains records.
    """
    check_encoding(encoding)
    found: list[TextSource] = []
    notes: list[str] = []
    file_notes = _Notes(encoding)
    for path in paths:
        if path != "-" and "\0" not in path and os.path.isdir(path):
            group = FileGroup([], Path(path))
            found += _in_folder(group, encoding, records, file_notes)
            notes += group.notes(encoding)
        else:
            for name in _matches(path):
                source = source_of(name, records)
                start = _start_of(source, encoding)
                found.append(file_notes.check(source, start, records))
    if sum(source.name == "-" for source in found) > 1:
        raise InputError(
            "standard input (-) is named twice, but can be read only once: name it once"
        )
    require_field_used(records, [source.kind for source in found])
    return found, notes + file_notes.lines()


def require_field_used(records: RecordOptions, kinds: Sequence[str]) -> None:
    """Raise `InputError` if a field is named but no file has fields: it would be ignored."""
    if records.field is not None and records.refuse_unused and kinds and set(kinds) == {"text"}:
        raise InputError(
            f"--field {records.field} applies to *.jsonl, *.ndjson, *.json, *.csv, *.tsv and "
            "*.parquet, and only plain text is named: remove the option"
        )


class _Notes:
    """Collects notes on files; the same remark on several files becomes one note."""

    def __init__(self, encoding: str | None) -> None:
        self._encoding = encoding
        self._remarks: dict[str, list[str]] = {}
        self._single: list[str] = []

    def check(self, source: TextSource, start: bytearray, records: RecordOptions) -> TextSource:
        """Add notes on a file with these first bytes; returns the source with its actual kind."""
        found = remarks(start, self._encoding) if start else []
        if source.compression != compression_by_name(source.name):
            found.append(f"this is a {source.compression} file; it is decompressed")
        for remark in found:
            self._remarks.setdefault(f": {remark}", []).append(shown(source.name))
        if (why := records.why_plain(source, self._encoding)) is None:
            return source
        self._single.append(plain_text_note(why))
        return replace(source, kind="text")

    def lines(self) -> list[str]:
        """The notes, one line each."""
        return notes_of(self._remarks) + self._single


def plain_text_note(why: str) -> str:
    """The note on a file that is named like a file of records but is read as plain text."""
    return f"{why}; the whole file is read as plain text"


def _matches(path: str) -> list[str]:
    if not path:
        raise InputError("a file name is empty: name a text file, or - for standard input")
    if path == "-" or "\0" in path or os.path.exists(path) or not glob.has_magic(path):
        return [path]
    found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
    if not found:
        raise InputError(f"no file matches {path!r}: check the pattern and its folder")
    return found


def source_of(name: str, records: RecordOptions) -> TextSource:
    """The source for a file or standard input ("-"); raises as `find_sources` does."""
    with file_errors(name):
        status = None if name == "-" else os.stat(name)
    kind = records.kind(name)
    if status is None or not stat.S_ISREG(status.st_mode):
        if kind == "table":
            raise InputError(
                f"{shown(name)} is not a regular file: *.parquet cannot be read from a pipe"
            )
        return TextSource(name, -1, -1, kind, compression_by_name(name))
    if not status.st_size:
        raise InputError(f"{shown(name)} is empty: name a file with text")
    compression = "" if kind == "table" else compression_of_file(name)
    return TextSource(name, status.st_size, status.st_mtime_ns, kind, compression)


def _in_folder(
    group: FileGroup, encoding: str | None, records: RecordOptions, file_notes: _Notes
) -> list[TextSource]:
    """The sources in a folder; other files are added to `group.skipped`."""
    assert group.folder is not None
    sources: list[TextSource] = []
    for path in sorted(files_below(group.folder)):
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
            sources.append(file_notes.check(source, start, records))
        else:
            group.skip(path, start)
    if not sources:
        raise group.none_found(encoding)
    return sources


def _start_of(source: TextSource, encoding: str | None) -> bytearray:
    """The first decompressed bytes of a file; empty for a table and for a pipe.

    Raises:
        NotDecodedError: if they show that it is not text.
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
    """A source's documents in pieces, in order; `Piece.ends` marks each document's last piece.

    Args:
        source: from `find_sources`.
        field: the field of a record that contains the text.
        encoding: None is UTF-8, or the encoding that a byte-order mark names.
        split: whether `SEPARATOR` separates documents within a file, line or row.
        skip_rows: number of documents to skip, counted after splitting.
        skip_characters: number of characters to skip in the document after those.
        on_separators: called with the number of separators found in each piece.

    Raises:
        InputError: if the source is not text, is incomplete, or lacks the field, with the
            position.
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
    waiting, behind = "", False  # a possible start of a separator; whether one has just ended
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
    """The length of the longest prefix of `SEPARATOR` that the text ends with."""
    longest = min(len(text), len(SEPARATOR) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(SEPARATOR[:n])), 0)


def _after(found: Iterator[Piece], skip: int) -> Iterator[Piece]:
    """The pieces after the first `skip` documents."""
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
    """The text of each record, without the first `skip`."""
    if source.kind == "table":
        found = texts_of_table(source.name, field, source.size, skip)
    else:
        read = {"lines": texts_of_lines, "json": texts_of_json, "csv": texts_of_csv}[source.kind]
        found = islice(read(texts_of(source.name, encoding), field, source.name), skip, None)
    for text, place in found:
        yield Piece(text, True, place)
