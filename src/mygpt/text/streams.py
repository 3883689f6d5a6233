"""Read the documents of a source as a stream, so that they need not fit into memory.

A plain file is one document, and so is each record of a file of records (a line of a *.jsonl, a
row of a *.csv). Only a few blocks are in memory at a time. Input that is not text is refused with
its position.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mygpt.errors import InputError
from mygpt.text.documents import LINE_ENDS, SEPARATOR
from mygpt.text.reading import blocks_of, shown, texts_of
from mygpt.text.records import FIELD, RECORDS_OF, kind_of, texts_of_table

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
    def has_changed(self) -> bool:
        """Whether a regular file was changed or removed since it was found."""
        now = (-1, -1)
        with contextlib.suppress(OSError):
            status = os.stat(self.name)
            now = status.st_size, status.st_mtime_ns
        return self.is_lasting and now != (self.size, self.modified_ns)

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
        kinds = ("json", "csv", "lines") if self.lines_may_be_plain else ("json", "csv")
        strict = self.legacy_names or self.field is not None
        if strict or source.kind not in kinds or not source.is_lasting:
            return None
        try:
            some = next(_records(source, FIELD, encoding, 0), None)
        except InputError as error:
            return str(error)
        return None if some is not None else f"{shown(source.name)} has no record"


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
        found = _plain_text(source, encoding) if not skipped else iter(())
    else:
        found = _records(source, field, encoding, skipped)
    if split:
        found = _after(split_at_separators(found, on_separators), skip_rows)
    left = skip_characters
    for piece in found:
        text = piece.text[left:]
        left -= len(piece.text) - len(text)
        if piece.ends:
            left = 0
        yield piece._replace(text=text)


def _plain_text(source: TextSource, encoding: str | None) -> Iterator[Piece]:
    read = 0
    for text, read in texts_of(blocks_of(source.name), source.name, encoding):
        yield Piece(text, False, read)
    yield Piece("", True, read)


def _records(source: TextSource, field: str, encoding: str | None, skip: int) -> Iterator[Piece]:
    """The text of each record, without the first `skip`."""
    if source.kind == "table":
        found = texts_of_table(source.name, field, source.size)
    else:
        texts = texts_of(blocks_of(source.name), source.name, encoding)
        found = RECORDS_OF[source.kind](texts, field, source.name)
    for text, read in islice(found, skip, None):
        yield Piece(text, True, read)


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
