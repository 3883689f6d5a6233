"""Documents as a stream, however long the text: plain files, *.gz, *.zst, *.jsonl, *.parquet.

A plain file is one document; a line of a *.jsonl and a row of a *.parquet are one each. Little of
them is in memory at a time. What is no text is refused with its place, as `read_corpus` does.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mygpt.errors import InputError
from mygpt.text.decoding import NotDecodedError, begins_as_text, check_encoding, remarks
from mygpt.text.documents import LINE_ENDS, SEPARATOR
from mygpt.text.folder import Place, files_below
from mygpt.text.kinds import FIRST_BYTES, why_no_text
from mygpt.text.reading import file_errors, notes_of, packing_of_file, shown
from mygpt.text.streams_files import blocks_of, texts_of
from mygpt.text.unpacking import packing_named, without_packing

_TABLE_ROWS = 256  # of a table that are in memory at a time


@dataclass(frozen=True)
class TextSource:
    """A file of documents.

    Attributes:
        name: its path, or "-" for standard input.
        size: its bytes; -1 for standard input and pipes.
        modified_ns: when it was last changed; -1 for standard input and pipes.
        kind: "text" is one document, "lines" one a line, "table" one a row.
        packing: "gzip", "zstd", or "" for none; of standard input and pipes what the name says.
    """

    name: str
    size: int
    modified_ns: int
    kind: str
    packing: str = ""

    @property
    def is_lasting(self) -> bool:
        """Whether it can be read a second time."""
        return self.size >= 0

    @property
    def is_plain(self) -> bool:
        """Whether its bytes are the text's, neither packed nor in a table."""
        return self.kind != "table" and not self.packing


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


def find_sources(
    paths: Sequence[str], *, encoding: str | None = None
) -> tuple[list[TextSource], list[str]]:
    """The files that names, folders, patterns and "-" stand for, in order, and notes.

    A folder gives its files as for `read_corpus`: no hidden ones, no runs and stores of ours, and
    only what begins as text, *.jsonl, *.parquet or packed text. Nothing is read but beginnings.

    Raises:
        InputError: for what is missing, empty, or a device.
    """
    check_encoding(encoding)
    found: list[TextSource] = []
    notes: list[str] = []
    said = _Notes(encoding)
    for path in paths:
        if path != "-" and "\0" not in path and os.path.isdir(path):
            place = Place([], Path(path))
            found += _in_folder(place, encoding, said)
            notes += place.notes(encoding)
        else:
            for name in _matches(path):
                found.append(_named(name))
                said.take(found[-1], _start_of(found[-1], encoding))
    if sum(source.name == "-" for source in found) > 1:
        raise InputError("standard input is named twice: it can be read once")
    return found, notes + said.lines()


class _Notes:
    """What has to be known about the files that are read, each thing said once."""

    def __init__(self, encoding: str | None) -> None:
        self._encoding = encoding
        self._remarks: dict[str, list[str]] = {}

    def take(self, source: TextSource, start: bytearray) -> None:
        """Keep what there is to say about a file that begins so."""
        found = remarks(start, self._encoding) if start else []
        if source.packing != packing_named(source.name):
            found.append(f"this is a {source.packing} file, whose text is unpacked")
        for remark in found:
            self._remarks.setdefault(f": {remark}", []).append(shown(source.name))

    def lines(self) -> list[str]:
        """A line for each thing."""
        return notes_of(self._remarks)


def _matches(path: str) -> list[str]:
    if not path:
        raise InputError("a file name is empty: name a text file, or - for standard input")
    if path == "-" or "\0" in path or os.path.exists(path) or not glob.has_magic(path):
        return [path]
    found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
    if not found:
        raise InputError(f"no file matches {path!r}")
    return found


def _named(name: str) -> TextSource:
    with file_errors(name):
        status = None if name == "-" else os.stat(name)
    kind = _kind(name)
    if status is None or not stat.S_ISREG(status.st_mode):
        if kind == "table":
            raise InputError(f"{shown(name)} is no file: a *.parquet cannot come through a pipe")
        return TextSource(name, -1, -1, kind, packing_named(name))
    if not status.st_size:
        raise InputError(f"{shown(name)} is empty: there is no text in it")
    packing = "" if kind == "table" else packing_of_file(name)
    return TextSource(name, status.st_size, status.st_mtime_ns, kind, packing)


def _kind(name: str) -> str:
    return {".jsonl": "lines", ".parquet": "table"}.get(Path(without_packing(name)).suffix, "text")


def _in_folder(place: Place, encoding: str | None, said: _Notes) -> list[TextSource]:
    """The sources of a folder; what is none joins the place's passed over."""
    assert place.folder is not None
    sources: list[TextSource] = []
    for path in sorted(files_below(place.folder)):
        start = bytearray()
        try:
            source = _named(str(path))
            start = _start_of(source, encoding)
            may_be_text = source.kind == "table" or begins_as_text(start, encoding)
        except NotDecodedError as error:
            start, may_be_text = bytearray(error.start), False
        except InputError:  # it cannot be read, or is empty
            may_be_text = False
        if may_be_text:
            sources.append(source)
            said.take(source, start)
        else:
            place.pass_over(path, start)
    if not sources:
        raise place.none_found(encoding)
    return sources


def _start_of(source: TextSource, encoding: str | None) -> bytearray:
    """The first bytes of a file's text, unpacked; none of a table and of what is read only once.

    Raises:
        NotDecodedError: where they say that it is not text.
    """
    if not source.is_lasting or source.kind == "table":
        return bytearray()
    with contextlib.closing(blocks_of(source.name, FIRST_BYTES)) as blocks:
        start = next(blocks, (b"", 0))[0]
    if (why := why_no_text(start, encoding)) is not None:
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
    met: Callable[[int], None] | None = None,
) -> Iterator[Piece]:
    """A source's documents in pieces, in order; every document's last piece says that it ends.

    Args:
        source: from `find_sources`.
        field: of an object or a table that holds the text.
        encoding: None is UTF-8, or what a byte-order mark says.
        split: whether `SEPARATOR` separates documents of a file, or of a line or row.
        skip_rows: documents to leave out; of those that are split the parts count.
        skip_characters: of the one after those, to leave out.
        met: hears how many more separators were found, as they come.

    Raises:
        InputError: for what is no text, no whole file, or has no such field, with its place.
    """
    skipped = 0 if split else skip_rows
    if source.kind == "text":
        found = _whole(source, encoding) if not skipped else iter(())
    elif source.kind == "lines":
        found = _documents_of_lines(source, field, encoding, skipped)
    else:
        found = _documents_of_table(source, field, skipped)
    if split:
        found = _after(split_at_separators(found, met), skip_rows)
    left = skip_characters
    for piece in found:
        text = piece.text[left:]
        left -= len(piece.text) - len(text)
        if piece.ends:
            left = 0
        yield piece._replace(text=text)


def split_at_separators(
    found: Iterator[Piece], met: Callable[[int], None] | None = None
) -> Iterator[Piece]:
    """Documents in pieces, each ended at a `SEPARATOR`, which goes with the line ends behind it.

    Documents without text come too, as a piece that is empty. `met` hears how many separators
    have come.
    """
    waiting, behind = "", False  # what may begin a separator; whether one has just ended
    for text, ends, read in found:
        *before, text = (waiting + text).split(SEPARATOR)
        if before and met is not None:
            met(len(before))
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


def _documents_of_lines(
    source: TextSource, field: str, encoding: str | None, skip: int
) -> Iterator[Piece]:
    """One object a line; a line of white space is none."""
    for number, (line, read) in enumerate(_lines(texts_of(source.name, encoding)), start=1):
        if not line or line.isspace():
            continue
        if skip:
            skip -= 1
            continue
        yield Piece(_field_of(line, field, f"{shown(source.name)}, line {number:,}"), True, read)


def _lines(texts: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    waiting: list[str] = []
    read = 0
    for text, read in texts:
        first, *others = text.split("\n")
        waiting.append(first)
        for line in others:
            yield "".join(waiting), read
            waiting = [line]
    if any(waiting):
        yield "".join(waiting), read


def _field_of(line: str, field: str, place: str) -> str:
    """The text in a line's object."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f'{place} is no object: each line is one, as {{"{field}": "..."}}')
    if field not in content:
        has = ", ".join(map(repr, list(content)[:5])) or "none"
        raise InputError(f"{place} has no field {field!r} (it has {has}): name it with --field")
    text = content[field]
    if not isinstance(text, str):
        raise InputError(f"{place}: field {field!r} is no text, but {text!r:.40}")
    return _whole_characters(text, place)


def _whole_characters(text: str, place: str) -> str:
    """`text`, or `InputError` for a lone surrogate in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        wrong = ord(text[error.start])
        raise InputError(
            f"{place}: character {error.start:,} is the lone surrogate U+{wrong:04X}: remove it"
        ) from None
    return text


def _documents_of_table(source: TextSource, field: str, skip: int) -> Iterator[Piece]:
    """One document a row of a *.parquet."""
    place = shown(source.name)
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            f"{place}: reading *.parquet needs pyarrow: pip install 'mygpt[parquet]'"
        ) from None
    try:
        with parquet.ParquetFile(source.name) as table:
            _check_column(table.schema_arrow, field, place, arrow)
            rows = max(1, table.metadata.num_rows)
            first = 0
            for group in range(table.num_row_groups):
                length = table.metadata.row_group(group).num_rows
                if first + length > skip:
                    for row, text in _rows_of_group(table, group, field, first):
                        if row >= skip:
                            read = source.size * (row + 1) // rows
                            yield Piece(_cell(text, field, f"{place}, row {row + 1:,}"), True, read)
                first += length
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, InputError):
            raise
        told = (str(error).splitlines() or ["unknown"])[0]
        raise InputError(f"{place} is no whole Parquet file: {told:.120}") from None


def _rows_of_group(table: Any, group: int, field: str, first: int) -> Iterator[tuple[int, Any]]:
    row = first
    for batch in table.iter_batches(_TABLE_ROWS, row_groups=[group], columns=[field]):
        for text in batch.column(0).to_pylist():
            yield row, text
            row += 1


def _check_column(schema: Any, field: str, place: str, arrow: Any) -> None:
    if field not in schema.names:
        has = ", ".join(map(repr, schema.names[:5]))
        raise InputError(f"{place} has no column {field!r} (it has {has}): name it with --field")
    kind = schema.field(field).type
    kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
    if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
        raise InputError(f"{place}: column {field!r} holds {kind}, no text: name one with --field")


def _cell(text: Any, field: str, place: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{place}: column {field!r} is no text, but {text!r:.40}")
    return text
