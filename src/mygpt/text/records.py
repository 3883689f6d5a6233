"""Read one field of the records in a JSON-lines, JSON, CSV, TSV or Parquet file.

Each `texts_of_*` function yields, in order, the text of that field and the number of bytes read of
the file so far. An invalid record raises `InputError` with its line, row or number.
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

FIELD = "text"  # the default field
_KINDS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "table",
}
_TABLE_ROWS = 256  # of a table that are in memory at a time
_LONGEST = 2**28  # characters of a record; more are refused
_DELIMITERS = ",;\t|"
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)")
_SPACE = re.compile(r"[ \t\r\n]*")

Texts = Iterable[tuple[str, int]]
Record = tuple[str, int]


def kind_of(name: str) -> str:
    """The format that a file name indicates: "lines", "json", "csv", "table", else "text"."""
    return _KINDS.get(Path(without_compression_suffix(name)).suffix.lower(), "text")


def texts_of_lines(texts: Texts, field: str, name: str) -> Iterator[Record]:
    """The texts in JSON lines, one object per line; blank lines are skipped."""
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
                f"{shown(name)} has a line of more than {_LONGEST:,} characters, the limit for a "
                "record: split it into shorter records"
            )
        for line in others:
            yield "".join(waiting), read
            waiting = [line]
    if any(waiting):
        yield "".join(waiting), read


def _text_in(line: str, field: str, place: str) -> str:
    """The text in the JSON object on a line."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(
            f'{place} is not an object: each line must be one, for instance {{"{field}": "..."}}'
        )
    return _field_of(content, field, place)


def _field_of(content: dict[str, Any], field: str, place: str) -> str:
    if field not in content:
        has = ", ".join(map(repr, list(content)[:5])) or "none"
        raise InputError(f"{place} has no field {field!r} (it has {has}): name it with --field")
    text = content[field]
    if not isinstance(text, str):
        raise InputError(f"{place}: field {field!r} must be a string, not {text!r:.40}")
    return _complete_characters(text, place)


def _complete_characters(text: str, place: str) -> str:
    """Return `text`; raise `InputError` if it contains a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        wrong = ord(text[error.start])
        raise InputError(
            f"{place}: character {error.start:,} is the lone surrogate U+{wrong:04X}, which is "
            "not a character: remove it"
        ) from None
    return text


def texts_of_json(texts: Texts, field: str, name: str) -> Iterator[Record]:
    """The texts in a JSON array of objects or strings, or in a sequence of such values."""
    values = _Values(texts, shown(name))
    for number, value in enumerate(values, start=1):
        place = f"{shown(name)}, record {number:,}"
        if isinstance(value, str):
            yield _complete_characters(value, place), values.read
        elif isinstance(value, dict):
            yield _field_of(value, field, place), values.read
        else:
            raise InputError(
                f"{place} must be an object or a string, not {value!r:.40}: give an array of "
                f'objects, for instance [{{"{field}": "..."}}]'
            )


class _Values:
    """Iterates over the elements of a JSON array, or over a sequence of JSON values.

    Attributes:
        read: number of bytes read of the file so far.
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
                    raise InputError(
                        f"{self._place} is not valid JSON: there is more after its array"
                    )
                return
            if in_array and count:
                if character != ",":
                    raise InputError(
                        f"{self._place} is not valid JSON: no comma after record {count:,}"
                    )
                self._at += 1
                self._next_character()
            yield self._value()
            count += 1
        if in_array:
            raise InputError(f"{self._place} is not complete JSON: it ends inside its array")

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except RecursionError as error:
                raise InputError(f"{self._place} is not valid JSON: {error}") from None
            except ValueError as error:
                if self._ended or len(self._buffer) - self._at > _LONGEST:
                    raise InputError(f"{self._place} is not valid JSON: {error}") from None
            else:
                if end < len(self._buffer) or self._ended:  # a number may have more digits
                    self._at = end
                    return value
            self._fill()

    def _next_character(self) -> str:
        """The next character after white space, without consuming it; "" at the end."""
        while True:
            found = _SPACE.match(self._buffer, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._buffer) or self._ended:
                return self._buffer[self._at : self._at + 1]
            self._fill()

    def _fill(self) -> None:
        """Double the buffer, so that the time for a long record stays linear in its length."""
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
    """The texts in a column of a CSV or TSV file, whose first row has the columns' names."""
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
                    f"{line} has {len(row)} columns, but {field!r} is column {column + 1}: give "
                    "each row all columns"
                )
            yield row[column], lines.read
    except csv.Error as error:
        raise InputError(f"{place} is not valid CSV: {error}") from None


class _LinesWithEnds:
    """Iterates over lines with their line ends: \\n, \\r\\n or \\r.

    Attributes:
        read: number of bytes read of the file so far.
    """

    def __init__(self, texts: Texts) -> None:
        self.read = 0
        self._lines = self._found(texts)

    def __iter__(self) -> Iterator[str]:
        return self._lines

    def _found(self, texts: Texts) -> Iterator[str]:
        waiting: list[str] = []
        for text, self.read in texts:
            if waiting and waiting[-1].endswith("\r"):  # a \r\n may be split between two pieces
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
    """The texts in a column of a *.parquet file.

    Args:
        name: of the file.
        field: the column.
        size: of the file in bytes, from which the position after a row is estimated.
        skip: rows to skip.
    """
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
        reason = (str(error).splitlines() or ["unknown error"])[0]
        raise InputError(f"{place} is not a complete Parquet file: {reason:.120}") from None


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
        raise InputError(
            f"{place}: column {field!r} contains {kind}, not text: name a text column with --field"
        )


def _cell(text: Any, field: str, place: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{place}: column {field!r} must be text, not {text!r:.40}")
    return text
