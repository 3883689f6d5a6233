"""Files of records, each with a text: lines of JSON, JSON, CSV, TSV and Parquet tables.

Each function yields the texts of one field, in order, and the bytes of the file that have been
read. What is no such record is refused with its place.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mygpt.errors import InputError
from mygpt.text.compression import without_compression_suffix
from mygpt.text.reading import shown

FIELD = "text"  # that holds the text where none is named
_KINDS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "table",
}
_TABLE_ROWS = 256  # of a table that are in memory at a time
_LONGEST = 2**28  # characters of a record
_DELIMITERS = ",;\t|"
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)")
_SPACE = re.compile(r"[ \t\r\n]*")

Texts = Iterable[tuple[str, int]]
Record = tuple[str, int]


def kind_of(name: str) -> str:
    """How a file of that name holds documents: "lines", "json", "csv", "table", else "text"."""
    return _KINDS.get(Path(without_compression_suffix(name)).suffix.lower(), "text")


def texts_of_lines(texts: Texts, field: str, name: str) -> Iterator[Record]:
    """One object a line; a line of white space is none."""
    for number, (line, read) in enumerate(_lines(texts, name), start=1):
        if line and not line.isspace():
            yield _text_in(line, field, f"{shown(name)}, line {number:,}"), read


def _lines(texts: Texts, name: str) -> Iterator[tuple[str, int]]:
    waiting: list[str] = []
    read = 0
    for text, read in texts:
        first, *others = text.split("\n")
        waiting.append(first)
        if sum(map(len, waiting)) > _LONGEST:
            raise InputError(
                f"{shown(name)} has a line of more than {_LONGEST:,} characters, which is no record"
            )
        for line in others:
            yield "".join(waiting), read
            waiting = [line]
    if any(waiting):
        yield "".join(waiting), read


def _text_in(line: str, field: str, place: str) -> str:
    """The text in a line's object."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f'{place} is no object: each line is one, as {{"{field}": "..."}}')
    return _field_of(content, field, place)


def _field_of(content: dict[str, Any], field: str, place: str) -> str:
    if field not in content:
        has = ", ".join(map(repr, list(content)[:5])) or "none"
        raise InputError(f"{place} has no field {field!r} (it has {has}): name it with --field")
    text = content[field]
    if not isinstance(text, str):
        raise InputError(f"{place}: field {field!r} is no text, but {text!r:.40}")
    return _complete_characters(text, place)


def _complete_characters(text: str, place: str) -> str:
    """`text`, or `InputError` for a lone surrogate in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        wrong = ord(text[error.start])
        raise InputError(
            f"{place}: character {error.start:,} is the lone surrogate U+{wrong:04X}: remove it"
        ) from None
    return text


def texts_of_json(texts: Texts, field: str, name: str) -> Iterator[Record]:
    """The texts or objects of an array, or objects one after another."""
    values = _Values(texts, shown(name))
    for number, value in enumerate(values, start=1):
        place = f"{shown(name)}, record {number:,}"
        if isinstance(value, str):
            yield _complete_characters(value, place), values.read
        elif isinstance(value, dict):
            yield _field_of(value, field, place), values.read
        else:
            raise InputError(
                f"{place} is neither an object nor a text, but {value!r:.40}: give an array of "
                f'objects, as [{{"{field}": "..."}}]'
            )


class _Values:
    """The values of a JSON file, one after another; an array's elements where it is one.

    Attributes:
        read: bytes of the file that have been read.
    """

    def __init__(self, texts: Texts, place: str) -> None:
        self.read = 0
        self._texts = iter(texts)
        self._place = place
        self._buffer, self._at, self._ended = "", 0, False
        self._decoder = json.JSONDecoder()

    def __iter__(self) -> Iterator[Any]:
        in_array = self._next_character() == "["
        self._at += in_array
        count = 0
        while (character := self._next_character()) != "":
            if in_array and character == "]":
                self._at += 1
                if self._next_character():
                    raise InputError(f"{self._place} is no JSON: there is more behind its array")
                return
            if in_array and count:
                if character != ",":
                    raise InputError(f"{self._place} is no JSON: no comma after record {count:,}")
                self._at += 1
                self._next_character()
            yield self._value()
            count += 1
        if in_array:
            raise InputError(f"{self._place} is no complete JSON: it ends inside its array")

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except RecursionError as error:
                raise InputError(f"{self._place} is no JSON: {error}") from None
            except ValueError as error:
                if self._ended or len(self._buffer) - self._at > _LONGEST:
                    raise InputError(f"{self._place} is no JSON: {error}") from None
            else:
                if end < len(self._buffer) or self._ended:  # a number may have more digits
                    self._at = end
                    return value
            self._fill()

    def _next_character(self) -> str:
        """The next character that is no white space, which stays; "" at the end."""
        while True:
            found = _SPACE.match(self._buffer, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._buffer) or self._ended:
                return self._buffer[self._at : self._at + 1]
            self._fill()

    def _fill(self) -> None:
        """Read as much again as is waiting, so that a long record is not tried at every block."""
        parts = [self._buffer[self._at :]]
        least, length = len(parts[0]), 0
        self._at = 0
        while not self._ended and length <= least:
            text, self.read = next(self._texts, (None, self.read))
            self._ended = text is None
            parts.append(text or "")
            length += len(parts[-1])
        self._buffer = "".join(parts)


def texts_of_csv(texts: Texts, field: str, name: str) -> Iterator[Record]:
    """One row each; the first row has the columns' names."""
    csv.field_size_limit(_LONGEST)
    place = shown(name)
    lines = _LinesWithEnds(texts)
    heading = next(iter(lines), "")
    delimiter = max(_DELIMITERS, key=heading.count)
    try:
        columns = next(csv.reader([heading], delimiter=delimiter), [])
        if field not in columns:
            has = ", ".join(f"{column!r:.40}" for column in columns[:5]) or "none"
            raise InputError(
                f"{place} has no column {field!r} (it has {has}): name it with --field"
            )
        column = columns.index(field)
        rows = csv.reader(iter(lines), delimiter=delimiter)
        for row in rows:
            if not row:
                continue
            line = f"{place}, line {rows.line_num + 1:,}"
            if column >= len(row):
                raise InputError(
                    f"{line} has {len(row)} columns, and {field!r} is column {column + 1}"
                )
            yield row[column], lines.read
    except csv.Error as error:
        raise InputError(f"{place} is no CSV: {error}") from None


class _LinesWithEnds:
    """A text's lines with their ends, of which a carriage return alone is one.

    Attributes:
        read: bytes of the file that have been read.
    """

    def __init__(self, texts: Texts) -> None:
        self.read = 0
        self._lines = self._found(texts)

    def __iter__(self) -> Iterator[str]:
        return self._lines

    def _found(self, texts: Texts) -> Iterator[str]:
        waiting: list[str] = []
        for text, self.read in texts:
            if waiting and waiting[-1].endswith("\r"):  # its line's end may be in two pieces
                text = waiting.pop() + text
            end = max(text.rfind("\n"), text.rfind("\r", 0, max(0, len(text) - 1))) + 1
            if end:
                yield from _LINE.findall("".join([*waiting, text[:end]]))
                waiting.clear()
            waiting.append(text[end:])
        rest = "".join(waiting)
        if rest:
            yield rest


def texts_of_table(name: str, field: str, size: int, skip: int) -> Iterator[Record]:
    """One row each of a *.parquet of that size, but for the first `skip`."""
    place = shown(name)
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            f"{place}: reading *.parquet needs pyarrow: pip install 'mygpt[parquet]'"
        ) from None
    try:
        with parquet.ParquetFile(name) as table:
            _check_column(table.schema_arrow, field, place, arrow)
            rows = max(1, table.metadata.num_rows)
            first = 0
            for group in range(table.num_row_groups):
                length = table.metadata.row_group(group).num_rows
                if first + length > skip:
                    for row, text in _rows_of_group(table, group, field, first):
                        if row >= skip:
                            read = size * (row + 1) // rows
                            yield _cell(text, field, f"{place}, row {row + 1:,}"), read
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
