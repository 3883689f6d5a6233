"""Files that are not plain UTF-8 text are recognised, and read or refused with a remedy."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import sqlite3
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zstandard

from mygpt.cli import main
from mygpt.errors import InputError
from mygpt.text import find_sources, pieces, read_corpus
from mygpt.text.file_types import signature_of, unmarked_encoding
from text_samples import write
from training_runs import prepared

PROSE = "First Citizen:\r\nBefore we proceed, hear me speak.\n"
LANGUAGES = (
    PROSE,
    "Быть или не быть, вот в чём вопрос.\n" * 3,
    "生存还是毁灭，这是一个值得考虑的问题。\n默然忍受命运的暴虐的毒箭。\n" * 3,
    "صوت صفير البلبل\nهيج قلبي الثمل\n",
    "naïve 🙂 café\n",
    "hi",
    "… and “so” on … • €\n",
    "色は匂へど ひらがなとカタカナ OK, この世は夢の中。\n" * 5,
)


def zipped(*names: str, first: bytes = b"") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        if first:
            archive.writestr("mimetype", first)
        for name in names:
            archive.writestr(name, "content " * 100)
    return file.getvalue()


def in_numpy() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    return file.getvalue()


def in_a_database(folder: Path) -> bytes:
    connection = sqlite3.connect(folder / "database")
    connection.execute("create table a (b)")
    connection.commit()
    connection.close()
    return (folder / "database").read_bytes()


def in_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = len(PROSE)
        archive.addfile(info, io.BytesIO(PROSE.encode()))
    return file.getvalue()


KINDS = {
    "a Word document": zipped("[Content_Types].xml", "_rels/.rels", "word/document.xml"),
    "an Excel workbook": zipped("[Content_Types].xml", "xl/workbook.xml"),
    "an OpenDocument text": zipped(first=b"application/vnd.oasis.opendocument.text"),
    "an EPUB book": zipped(first=b"application/epub+zip"),
    "a zip archive": zipped("poems.txt"),
    "a PyTorch checkpoint": zipped("archive/data.pkl"),
    "an archive of NumPy arrays": in_numpy(),
    "a tar archive": in_tar(),
    "a PDF document": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n",
    "an image": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "an audio file": b"ID3\3\0\0\0\0\0\x21TIT2",
    "a bzip2 file": bz2.compress(PROSE.encode()),
    "an xz or LZMA file": lzma.compress(PROSE.encode()),
    "a 7-Zip archive": b"7z\xbc\xaf\x27\x1c\0\4",
    "a RAR archive": b"Rar!\x1a\x07\x01\0",
    "a compiled program": b"\x7fELF\2\1\1\0",
    "a Python pickle": pickle.dumps({"text": PROSE}),
    "a safetensors model": struct.pack("<Q", 60) + b'{"weight":{"dtype":"F32"}}',
    "a GGUF model": b"GGUF\3\0\0\0",
    "a Parquet table": b"PAR1\x15\4\x15\0",
    "a NumPy array": b"\x93NUMPY\1\0v\0{'descr': '<f4'}",
}


def streamed(path: str, encoding: str | None = None) -> str:
    source = find_sources([path], encoding=encoding)[0][0]
    return "".join(piece.text for piece in pieces(source, encoding=encoding))


def refusals(path: str, encoding: str | None = None) -> list[str]:
    """The errors of reading into memory and of reading as a stream."""
    found = []
    for read in (lambda: read_corpus([path], encoding=encoding), lambda: streamed(path, encoding)):
        with pytest.raises(InputError) as refused:
            read()
        found.append(str(refused.value))
    assert not any("\n" in line for line in found)
    return found


@pytest.mark.parametrize("kind", [*KINDS, "an SQLite database"])
def test_a_file_of_another_type_is_refused_with_its_type(kind: str, tmp_path: Path) -> None:
    data = KINDS[kind] if kind in KINDS else in_a_database(tmp_path)
    path = write(tmp_path / "a.txt", data + b"\0" * 40)
    for message in refusals(path):
        assert f"a.txt is {kind}, not plain text: " in message
    compressed = write(tmp_path / "a.txt.gz", gzip.compress(data))
    assert f"a.txt.gz is {kind}" in refusals(compressed)[0]
    with pytest.raises(InputError, match="--tokenizer byte trains on its bytes"):
        prepared(path, output=tmp_path / "run", steps=1)
    corpus = read_corpus([path], allow_bytes=True)
    assert corpus.documents[0].whole == data + b"\0" * 40
    assert f"it is read as bytes although it is {kind}" in corpus.notes[0]


@pytest.mark.parametrize(
    "text",
    [
        *LANGUAGES,
        "PK is short for pack",
        "BZh and MZ and Rar! and GGUF, PAR1, ID3, RIFF, OggS",
        "MZ is the mark of Mark Zbikowski",
        "PAR1 PAR2",
        "GGUF files hold models",
        "ID3 tags",
        "ORC and OTTO",
        "one\r\ntwo\rthree\n\0four",
        "\0\0",
        "abc\0def\n" * 20,
        "abc\0" * 20,
        "NUL\0is\0between\0words\0" * 20,
        "x" * 300 + "ustar",
    ],
)
def test_plain_text_is_not_taken_for_another_type(text: str, tmp_path: Path) -> None:
    data = text.encode()
    assert signature_of(data) is None
    assert unmarked_encoding(data) is None
    path = write(tmp_path / "a.txt", data)
    assert read_corpus([path]).documents[0].text == text
    assert streamed(path) == text


@pytest.mark.parametrize("name", ["a.txt", "a", "a.bin"])
@pytest.mark.parametrize("how", ["gzip", "zstd"])
def test_compressed_text_is_decompressed_whatever_its_name(
    how: str, name: str, tmp_path: Path
) -> None:
    pack = gzip.compress if how == "gzip" else zstandard.ZstdCompressor().compress
    path = write(tmp_path / name, pack(PROSE.encode()))
    assert read_corpus([path]).documents[0].text == PROSE
    assert streamed(path) == PROSE
    for notes in (read_corpus([path]).notes, find_sources([path])[1]):
        assert len(notes) == 1
        assert f"{name}: this is a {how} file; it " in notes[0]
    inside = write(tmp_path / "folder" / name, pack(PROSE.encode()))
    assert streamed(str(Path(inside).parent)) == PROSE
    assert read_corpus([str(Path(inside).parent)]).documents[0].text == PROSE


def test_compressed_text_from_standard_input_is_decompressed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = gzip.compress(PROSE.encode())
    pipe = io.BufferedReader(io.BytesIO(data))  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(pipe))
    assert read_corpus(["-"]).documents[0].text == PROSE


def test_a_compressed_file_in_a_compressed_file_is_refused_with_its_type(tmp_path: Path) -> None:
    twice = gzip.compress(gzip.compress(PROSE.encode()))
    assert "is a gzip file, not plain text" in refusals(write(tmp_path / "a.gz", twice))[0]


# --- encodings -----------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", LANGUAGES)
def test_utf16_without_a_byte_order_mark_is_refused_with_the_encoding(
    text: str, codec: str, tmp_path: Path
) -> None:
    """It was once read as UTF-8 with NUL characters."""
    path = write(tmp_path / "a.txt", text.encode(codec))
    family = codec.rpartition("-")[0].upper()
    for message in refusals(path):
        assert f"seems to be {family} without a byte-order mark: give --encoding {codec}" in message
    assert "--encoding" in refusals(path, "utf-8")[0]
    assert read_corpus([path], encoding=codec).documents[0].text == text
    assert streamed(path, codec) == text
    assert isinstance(read_corpus([path], allow_bytes=True).documents[0].whole, bytes)


def test_a_byte_order_mark_must_agree_with_the_encoding_given(tmp_path: Path) -> None:
    """The mark of the same encoding is removed; that of another one is refused."""
    for codec, bom in (("utf-8", b"\xef\xbb\xbf"), ("utf-16-le", b"\xff\xfe")):
        path = write(tmp_path / "a.txt", bom + PROSE.encode(codec))
        assert read_corpus([path], encoding=codec).documents[0].text == PROSE
        assert streamed(path, codec) == PROSE
        for message in refusals(path, "latin-1"):
            assert f"byte-order mark of {codec}: do not give --encoding latin-1" in message
    path = write(tmp_path / "a.txt", PROSE.encode("utf-16"))
    assert read_corpus([path], encoding="utf-16").documents[0].text == PROSE


def test_files_of_a_folder_in_another_encoding_get_a_note(tmp_path: Path) -> None:
    """They were once skipped like images, without a remedy."""
    write(tmp_path / "d/a.txt", b"text")
    write(tmp_path / "d/b.txt", "café\n".encode("latin-1"))
    write(tmp_path / "d/c.txt", PROSE.encode("utf-16-le"))
    write(tmp_path / "d/d.txt", b"x" * 100_000 + b"\xe9")
    write(tmp_path / "d/e.png", KINDS["an image"])
    folder = str(tmp_path / "d")
    corpus, (sources, notes) = read_corpus([folder]), find_sources([folder])
    assert [document.text for document in corpus.documents] == ["text"]
    hint = "in {}, text that is not UTF-8: {}; name its encoding with --encoding (utf-16-le, it"
    assert hint.format(folder, "b.txt, c.txt, d.txt") in corpus.notes[1]
    assert hint.format(folder, "b.txt, c.txt") in notes[1]
    assert [Path(source.name).name for source in sources] == ["a.txt", "d.txt"]
    for name in "ad":
        (tmp_path / "d" / f"{name}.txt").unlink()
    for message in refusals(folder):
        assert "contains no text file (hidden files are skipped); in" in message
        assert "--encoding" in message


def test_notes_on_unusual_text(tmp_path: Path) -> None:
    for data, encoding, message in (
        (b"old\rMac\rlines", None, "lines end with carriage returns only"),
        ("old\rMac".encode("utf-16"), None, "lines end with carriage returns only"),
        (b"{\\rtf1\\ansi text}", None, "this is RTF"),
        (b"<!DOCTYPE html><p>text", None, "this is HTML"),
        (b"a\0b", None, "NUL characters"),
        ("café".encode(), "latin-1", "valid UTF-8, and latin-1 decodes it to other characters"),
    ):
        path = write(tmp_path / "a.txt", data)
        for notes in (
            read_corpus([path], encoding=encoding).notes,
            find_sources([path], encoding=encoding)[1],
        ):
            assert len(notes) == 1
            assert notes[0].startswith(f"{path}: ")
            assert message in notes[0]
    for data in (b"one\r\ntwo\rthree\n", b"one line", b"caf\xc3\xa9"):
        assert read_corpus([write(tmp_path / "a.txt", data)]).notes == []


def test_the_same_remark_on_several_files_is_one_note(tmp_path: Path) -> None:
    for number in range(6):
        write(tmp_path / f"d/{number}.txt", b"old\rMac")
    notes = read_corpus([str(tmp_path / "d")]).notes
    assert len(notes) == 1
    assert "2.txt and 3 more: lines end" in notes[0]


def test_the_commands_print_the_error_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.txt", KINDS["a Word document"])
    for command in (
        ["train", path, "--dry-run"],
        ["tokenize", path, "--out", str(tmp_path / "store")],
    ):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert "a.txt is a Word document, not plain text: save it as plain text" in lines[0]
