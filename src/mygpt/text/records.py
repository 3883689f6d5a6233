"""Read one field of the records in a JSON-lines, JSON, CSV, TSV or Parquet file.

Each `texts_of_*` function yields, in order, the text of that field and the number of bytes read of
the file so far. An invalid record raises `InputError` with its line, row or number.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from mygpt.errors import InputError, install_extra
from mygpt.text.reading import shown, without_compression_suffix

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
_SPACE = re.compile(r"[ \t\r\n]*")

Texts = Iterable[tuple[str, int]]
Record = tuple[str, int]


def kind_of(name: str) -> str:
    """The format that a file name indicates: "lines", "json", "csv", "table", else "text"."""
    return _KINDS.get(Path(without_compression_suffix(name)).suffix.lower(), "text")


def texts_of_lines(texts: Texts, field: str, name: str) -> Iterator[Record]:
    """The texts in JSON lines, one object per line; blank lines are skipped."""
    for number, (line, read) in enumerate(_lines(texts, name), start=1):
        if not line.isspace():
            yield _text_in(line, field, f"{shown(name)}, line {number:,}"), read


def _lines(texts: Texts, name: str) -> Iterator[tuple[str, int]]:
    """Lines with their ends (\\n, \\r\\n or \\r), and the number of bytes read of the file."""
    undivided = io.IncrementalNewlineDecoder(None, translate=False)  # keeps \r\n in one piece
    waiting: list[str] = []  # pieces of an incomplete line
    read = 0
    for text, read in texts:
        for line in io.StringIO(undivided.decode(text), newline=""):
            waiting.append(line)
            if line[-1] in "\r\n":
                yield "".join(waiting), read
                waiting.clear()
        if sum(map(len, waiting)) > _LONGEST:
            raise InputError(
                f"{shown(name)} has a line of more than {_LONGEST:,} characters, the limit for a "
                "record: split it into shorter records"
            )
    waiting.append(undivided.decode("", final=True))
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
        texts = {name: value for name, value in content.items() if isinstance(value, str)}
        longest = max(texts, key=lambda name: len(texts[name]), default="")
        raise _no_field(place, "field", field, list(content), longest)
    return _string(content[field], place, f": field {field!r}")


def _no_field(
    place: str, what: str, field: str, names: Sequence[str], likely: str = ""
) -> InputError:
    """The error of a missing field, with the fields that there are; `likely` may be the text."""
    has = ", ".join(f"{name!r:.40}" for name in names[:5]) or "none"
    option = f"--field {shlex.quote(likely)}" if likely.isprintable() and likely else "--field"
    return InputError(f"{place} has no {what} {field!r} (it has {has}): name it with {option}")


def _string(value: Any, place: str, what: str = "") -> str:
    """Return a string; raise `InputError` for another value or a lone surrogate."""
    if not isinstance(value, str):
        raise InputError(f"{place}{what} must be a string, not {value!r:.40}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        wrong = ord(value[error.start])
        raise InputError(
            f"{place}: character {error.start:,} is the lone surrogate U+{wrong:04X}, which is "
            "not a character: remove it"
        ) from None
    return value


def texts_of_json(texts: Texts, field: str, name: str) -> Iterator[Record]:
    """The texts in a JSON array of objects or strings, or in a sequence of such values."""
    values = _Values(texts, shown(name))
    for number, value in enumerate(values, start=1):
        place = f"{shown(name)}, record {number:,}"
        if isinstance(value, str):
            yield _string(value, place), values.read
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
        number = 0
        while (character := self._next_character()) != "":
            if in_array and character == "]":
                self._at += 1
                if self._next_character():
                    raise self._invalid("there is more after its array")
                return
            if in_array and number:
                if character != ",":
                    raise self._invalid(f"no comma after record {number:,}")
                self._at += 1
                self._next_character()
            yield self._value()
            number += 1
        if in_array:
            raise self._invalid("it ends inside its array")

    def _invalid(self, why: object) -> InputError:
        return InputError(f"{self._place} is not valid JSON: {why}")

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
                if end < len(self._buffer) or self._ended:  # a number may have more digits
                    self._at = end
                    return value
            except RecursionError as error:
                raise self._invalid(error) from None
            except ValueError as error:
                if self._ended or len(self._buffer) - self._at > _LONGEST:
                    raise self._invalid(error) from None
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
    place, read = shown(name), 0

    def line_of(found: tuple[str, int]) -> str:
        nonlocal read
        line, read = found
        return line

    remaining = map(line_of, _lines(texts, name))
    heading = next(remaining, "")
    delimiter = max(_DELIMITERS, key=heading.count)
    try:
        columns = next(csv.reader([heading], delimiter=delimiter), [])
        if field not in columns:
            raise _no_field(place, "column", field, columns)
        column = columns.index(field)
        rows = csv.reader(remaining, delimiter=delimiter)
        for row in rows:
            if row and column >= len(row):
                raise InputError(
                    f"{place}, line {rows.line_num + 1:,} has {len(row)} columns, but {field!r} is "
                    f"column {column + 1}: give each row all columns"
                )
            if row:
                yield row[column], read
    except csv.Error as error:
        raise InputError(f"{place} is not valid CSV: {error}") from None


def texts_of_table(name: str, field: str, size: int) -> Iterator[Record]:
    """The texts in a column of a *.parquet file of `size` bytes, which gives the bytes read."""
    place = shown(name)
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            f"{place}: reading *.parquet needs pyarrow: {install_extra('parquet')}"
        ) from None
    try:
        with parquet.ParquetFile(name) as table:
            _check_column(table.schema_arrow, field, place, arrow)
            numbers = count(1)
            for batch in table.iter_batches(_TABLE_ROWS, columns=[field]):
                for text, number in zip(batch.column(0).to_pylist(), numbers, strict=False):
                    row = _string(text, f"{place}, row {number:,}", f": column {field!r}")
                    yield row, size * number // table.metadata.num_rows
    except InputError:
        raise
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or ["unknown error"])[0]
        raise InputError(f"{place} is not a complete Parquet file: {reason:.120}") from None


def _check_column(schema: Any, field: str, place: str, arrow: Any) -> None:
    if field not in schema.names:
        raise _no_field(place, "column", field, schema.names)
    kind = schema.field(field).type
    kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
    if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
        raise InputError(
            f"{place}: column {field!r} contains {kind}, not text: name a text column with --field"
        )


RECORDS_OF = {"lines": texts_of_lines, "json": texts_of_json, "csv": texts_of_csv}
