"""Reading documents as a stream: every format gives the same text, and errors have a position."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

from mygpt.errors import InputError
from mygpt.text import RecordOptions, find_sources, name_of, pieces
from text_samples import documents

TEXTS = ["first\u2028line é\r\nnext", "日本語 " * 3, "", "last\n"]


def as_lines(texts: list[str], field: str = "text") -> str:
    return "".join(json.dumps({"id": 1, field: t}, ensure_ascii=False) + "\n" for t in texts)


def refused(*paths: object, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        documents(*paths, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what is read --------------------------------------------------------------------------


def compressed(data: bytes, ending: str) -> bytes:
    if ending == ".gz":
        half = len(data) // 2  # two members, one after the other
        return gzip.compress(data[:half]) + gzip.compress(data[half:])
    if ending == ".zst":
        half = len(data) // 2
        pack = zstandard.ZstdCompressor().compress
        return pack(data[:half]) + pack(data[half:])
    return data


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_plain_and_compressed_text(ending: str, tmp_path: Path) -> None:
    """Longer than the blocks that are read, which split characters."""
    text = "é日\r\n" * 200_000
    path = tmp_path / f"x.txt{ending}"
    path.write_bytes(compressed(text.encode(), ending))
    assert documents(path) == [text]
    for skip in (1, 300_001, len(text)):
        assert documents(path, skip_characters=skip) == [text[skip:]]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_each_json_line_is_a_document(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.jsonl{ending}"
    content = "\n \t\n" + as_lines(TEXTS) + as_lines(["no end of line"]).rstrip("\n")
    path.write_bytes(compressed(content.encode(), ending))
    texts = [*TEXTS, "no end of line"]
    assert documents(path) == texts
    assert documents(path, skip_rows=1, skip_characters=2) == [texts[1][2:], *texts[2:]]


def test_each_table_row_is_a_document(tmp_path: Path) -> None:
    """In several row groups, as string, large string and dictionary columns."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    texts = [f"row {n} é" for n in range(1000)]
    strings = pa.array(texts)
    for column in (strings, strings.cast(pa.large_string()), strings.dictionary_encode()):
        path = tmp_path / "x.parquet"
        parquet.write_table(pa.table({"n": range(1000), "body": column}), path, row_group_size=300)
        assert documents(path, records=RecordOptions("body")) == texts
        assert documents(path, records=RecordOptions("body"), skip_rows=301) == texts[301:]


def test_name_of_paths() -> None:
    assert name_of(["x/some.jsonl.zst"]) == "some-jsonl"
    assert name_of(["x/some.txt.gz", "other"]) == "some"
    assert name_of(["-"]) == "stdin"


# --- what is refused -----------------------------------------------------------------------


def test_an_undecodable_byte_is_refused_with_its_position(tmp_path: Path) -> None:
    """After valid blocks, and within an incomplete character."""
    good = "é".encode() * 300_000
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\xff more")
    assert f"{path} is not utf-8: byte 0xff at position 600003;" in refused(path)
    path.write_bytes(good + b"\xc3")
    assert "byte 0xc3 at position 600000" in refused(path)
    path.write_bytes(b"a" * (2**18 - 1) + b"\xc3" + b"b" * 10)
    assert "byte 0xc3 at position 262143" in refused(path)
    path.write_bytes("ab\ud800".encode("utf-16-le", "surrogatepass"))
    assert "position 4" in refused(path, encoding="utf-16-le")


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_truncated_compressed_files_are_refused(ending: str, tmp_path: Path) -> None:
    """zstandard's own reader returns a shorter text for a truncated file."""
    path = tmp_path / f"x.txt{ending}"
    whole = compressed(os.urandom(50_000).hex().encode(), ending)
    path.write_bytes(whole[:-10])
    assert f"{path} is not a complete" in refused(path)
    for broken in (whole + b"and more", b"not compressed", whole[:12] + b"\xff" + whole[13:]):
        path.write_bytes(broken)
        assert f"{path} is not a complete" in refused(path)


def test_invalid_tables_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"n": [1, 2], "text": ["a", None]}), path)
    assert "row 2: column 'text' must be a string, not None" in refused(path)
    assert "has no column 'body' (it has 'n', 'text')" in refused(
        path, records=RecordOptions("body")
    )
    assert "column 'n' contains int64, not text" in refused(path, records=RecordOptions("n"))
    path.write_bytes(path.read_bytes()[:-9])
    assert "is not a complete Parquet file" in refused(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'mygpt-train[parquet]'" in refused(path)


@pytest.mark.slow
def test_a_piece_is_at_most_one_block(tmp_path: Path) -> None:
    """So that little of a long file is in memory."""
    path = tmp_path / "x.txt.zst"
    path.write_bytes(zstandard.ZstdCompressor(level=19).compress(bytes(2**26)))  # 64 MB in 2 kB
    source = find_sources([str(path)])[0][0]
    longest = max(len(piece.text) for piece in pieces(source))
    assert longest <= 2**26  # one read of the file gives all of it
    path.write_bytes(zstandard.ZstdCompressor(level=1).compress(os.urandom(2**21).hex().encode()))
    longest = max(len(piece.text) for piece in pieces(source))
    assert longest < 2**19
