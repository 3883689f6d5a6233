"""Files and helpers for the tests of reading text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mygpt.text import RecordOptions, find_sources, pieces, read_corpus


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def texts(*paths: str, **options: object) -> list[str | bytes]:
    """The documents read into memory."""
    return [document.text for document in read_corpus(paths, **options).documents]  # type: ignore[arg-type]


def documents(
    *paths: object, records: RecordOptions | None = None, encoding: str | None = None, **skip: int
) -> list[str]:
    """The documents of a stream, each complete."""
    records = records or RecordOptions()
    names: Sequence[str] = [str(path) for path in paths]
    found = [""]
    for source in find_sources(names, encoding=encoding, records=records)[0]:
        for text, ends, read in pieces(source, field=records.field_name, encoding=encoding, **skip):
            assert 0 <= read <= source.size or not source.is_lasting
            found[-1] += text
            found += [""] * ends
    assert found[-1] == ""
    return found[:-1]
