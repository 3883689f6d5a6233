"""Reading a corpus: text is not changed, and what cannot be read is refused in one line."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import socket
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mygpt.errors import InputError
from mygpt.text import Corpus, Document, documents, read_corpus, reading, split_documents


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def texts(*paths: str, **options: object) -> list[str | bytes]:
    return [document.text for document in read_corpus(paths, **options).documents]  # type: ignore[arg-type]


def test_line_ends_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one\r\ntwo\rthree\n\0four")
    assert texts(path) == ["one\r\ntwo\rthree\n\0four"]


@pytest.mark.parametrize(
    ("codec", "bom"),
    [
        ("utf-8", b"\xef\xbb\xbf"),
        ("utf-16-le", b"\xff\xfe"),
        ("utf-16-be", b"\xfe\xff"),
        ("utf-32-le", b"\xff\xfe\0\0"),
        ("utf-32-be", b"\0\0\xfe\xff"),
    ],
)
def test_byte_order_marks_select_the_encoding_and_are_removed(
    tmp_path: Path, codec: str, bom: bytes
) -> None:
    path = write(tmp_path / "a.txt", bom + "naïve 🙂".encode(codec))
    assert texts(path) == ["naïve 🙂"]


def test_named_encoding(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "café".encode("latin-1"))
    assert texts(path, encoding="latin-1") == ["café"]
    with pytest.raises(InputError, match=r"encoding='klingon' is not known"):
        texts(path, encoding="klingon")


def test_invalid_utf8_is_refused_with_its_position_and_a_remedy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"good\xff")
    with pytest.raises(InputError, match=r"a\.txt is not utf-8: byte 0xff at position 4.*latin-1"):
        texts(path)
    assert texts(path, allow_bytes=True) == [b"good\xff"]


def test_gzip_is_decompressed_and_a_truncated_file_refused(tmp_path: Path) -> None:
    compressed = gzip.compress(b"some text")
    assert texts(write(tmp_path / "a.txt.gz", compressed)) == ["some text"]
    for broken in (compressed[:-9], b"not gzip", compressed[:12] + b"\xff" + compressed[13:]):
        with pytest.raises(InputError, match=r"b\.gz is not a complete gzip file"):
            texts(write(tmp_path / "b.gz", broken))


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe\r\n")))
    corpus = read_corpus(["-"])
    assert corpus.name == "stdin"
    assert corpus.documents[0].text == "from a pipe\r\n"


def test_a_folder_gives_its_text_files_in_order_and_a_note_on_skipped_files(
    tmp_path: Path,
) -> None:
    write(tmp_path / "d/b.txt", b"second")
    write(tmp_path / "d/a.md", b"first")
    write(tmp_path / "d/sub/c.gz", gzip.compress(b"third"))
    write(tmp_path / "d/.git/config", b"hidden")
    write(tmp_path / "d/image.png", b"\x89PNG\xff\xfe")
    write(tmp_path / "d/zeros.bin", b"a\0b")
    write(tmp_path / "d/empty.txt", b"")
    corpus = read_corpus([str(tmp_path / "d")])
    assert [document.text for document in corpus.documents] == ["first", "second", "third"]
    assert corpus.notes == [
        f"skipped 3 files in {tmp_path / 'd'} that are not text: empty.txt, image.png, zeros.bin"
    ]


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "d/zeros.bin", b"\0\0")
    with pytest.raises(InputError, match="contains no text file"):
        read_corpus([str(tmp_path / "d")])


def test_patterns_are_sorted_and_must_match(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", b"B")
    write(tmp_path / "a.txt", b"A")
    assert texts(str(tmp_path / "*.txt")) == ["A", "B"]
    with pytest.raises(InputError, match="no file matches"):
        texts(str(tmp_path / "*.nothing"))


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a[1].txt", b"odd name")) == ["odd name"]


def test_missing_and_empty_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.txt does not exist"):
        read_corpus([str(tmp_path / "nowhere.txt")])
    with pytest.raises(InputError, match=r"empty\.txt is empty"):
        read_corpus([write(tmp_path / "empty.txt", b"")])


def test_no_path_is_the_built_in_corpus() -> None:
    corpus = read_corpus()
    assert corpus.name == "python-reference"
    assert corpus.num_bytes > 300_000
    assert "assert" in [document.name for document in corpus.documents]


def test_the_digest_depends_on_text_and_document_boundaries(tmp_path: Path) -> None:
    """["ab", "c"] and ["a", "bc"] have the same concatenation and are different corpora."""
    ab, c = write(tmp_path / "1", b"ab"), write(tmp_path / "2", b"c")
    a, bc = write(tmp_path / "3", b"a"), write(tmp_path / "4", b"bc")
    digests = {read_corpus(pair).sha256 for pair in ([ab, c], [a, bc], [c, ab], [ab], [a, bc])}
    assert len(digests) == 4


def test_the_digest_of_one_file_is_the_files_own(shakespeare: Path) -> None:
    expected = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert read_corpus([str(shakespeare)]).sha256 == expected


@given(st.lists(st.one_of(st.text(), st.binary()), min_size=1), st.integers(1, 5))
def test_pieces_concatenate_to_the_text_and_its_digest(
    parts: list[str | bytes], length: int
) -> None:
    """The digest of several files is that of their concatenated digests, however they are split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_PIECE", length)
        docs = [Document(str(i), part) for i, part in enumerate(parts)]
        for doc in docs:
            pieces = list(doc.pieces())
            assert doc.text[:0].join(pieces) == doc.text  # type: ignore[arg-type]
            assert all(0 < len(piece) <= length for piece in pieces)
        data = [part if isinstance(part, bytes) else part.encode() for part in parts]
        digests = [hashlib.sha256(part).digest() for part in data]
        expected = digests[0] if len(data) == 1 else hashlib.sha256(b"".join(digests)).digest()
        assert Corpus("name", docs).sha256 == expected.hex()
        assert Corpus("name", docs).num_bytes == sum(map(len, data))


@given(st.lists(st.text(min_size=1), min_size=1), st.floats(0.0, 0.99))
def test_a_split_keeps_all_text_and_has_the_requested_fraction(
    parts: list[str], fraction: float
) -> None:
    documents = [Document(str(i), part) for i, part in enumerate(parts)]
    before, after = split_documents(documents, fraction)
    joined = ["".join(str(document.text) for document in half) for half in (before, after)]
    assert "".join(joined) == "".join(parts)
    assert len(joined[0]) == int(len("".join(parts)) * (1.0 - fraction))
    assert all(document.text for document in [*before, *after])


def test_a_split_copies_no_text() -> None:
    """A second copy of a long text may not fit into memory."""
    whole = Document("long", "first second third")
    (before,), (after,) = split_documents([whole], 0.5)
    assert (before.text, after.text) == ("first sec", "ond third")
    assert before.whole is after.whole is whole.whole
    (first,), (second,) = split_documents([after], 0.5)
    assert (first.text, second.text) == ("ond ", "third")
    assert ["".join(part.pieces()) for part in (first, second)] == ["ond ", "third"]  # type: ignore[arg-type]


# --- encodings -----------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["utf-7", "utf-16", "utf-32-be", "unicode_escape", "hz", "cp037"])
def test_unusual_encodings_are_read(tmp_path: Path, codec: str) -> None:
    path = write(tmp_path / "a.txt", "one two\r\nthree".encode(codec))
    assert texts(path, encoding=codec) == ["one two\r\nthree"]


@pytest.mark.parametrize(
    "codec", ["", "rot13", "zlib", "idna", "punycode", "undefined", "a\0b", "é"]
)
def test_codecs_that_are_not_text_encodings_are_refused(codec: str) -> None:
    """Codecs from text to text, from bytes to bytes, and those for host names."""
    with pytest.raises(InputError, match=r"encoding=.* is not known: try utf-8"):
        read_corpus(["nowhere.txt"], encoding=codec)


def test_a_lone_surrogate_that_a_codec_accepts_is_refused_with_its_position(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"ab+2AA-c")
    with pytest.raises(
        InputError, match=r"is not utf-7: character 2 is the lone surrogate U\+D800"
    ):
        texts(path, encoding="utf-7")
    assert texts(path, encoding="utf-7", allow_bytes=True) == [b"ab+2AA-c"]


# --- files that are not text ---------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero")
def test_devices_are_refused_before_they_are_read() -> None:
    """/dev/zero has no end."""
    with pytest.raises(InputError, match="/dev/zero is a device, not a text file"):
        read_corpus(["/dev/zero"])
    with pytest.raises(InputError, match="/dev/null is empty"):
        read_corpus(["/dev/null"])


def test_standard_input_that_is_closed_or_a_device_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input is closed"):
        read_corpus(["-"])
    with open("/dev/zero", "rb") as zeros:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(zeros))
        with pytest.raises(InputError, match="standard input is a device"):
            read_corpus(["-"])


def test_a_pipe_is_read_to_its_end_and_one_without_a_writer_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a pipe without a writer would otherwise wait for ever, without a message."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"x" * 300_000,), daemon=True)
    writer.start()
    assert texts(str(pipe)) == ["x" * 300_000]
    writer.join()
    monkeypatch.setattr(reading, "_WRITER_WAIT_S", 0.05)
    with pytest.raises(
        InputError, match=r"no process wrote to the pipe .*pipe: start the writing process"
    ):
        read_corpus([str(pipe)])


def test_a_pause_of_a_pipes_writer_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that another program made non-blocking gives b"" both at a pause and at the end."""
    reading_end, writing_end = os.pipe()
    os.set_blocking(reading_end, False)

    def write_haltingly() -> None:
        with open(writing_end, "wb", buffering=0) as pipe:
            pipe.write(b"one ")
            threading.Event().wait(0.1)
            pipe.write(b"two")

    with open(reading_end, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        writer = threading.Thread(target=write_haltingly)
        writer.start()
        assert texts("-") == ["one two"]
        writer.join()


def test_a_folder_skips_what_is_not_a_regular_file(tmp_path: Path) -> None:
    """A large file that is not text is not read completely."""
    write(tmp_path / "d/a.txt", b"text")
    os.mkfifo(tmp_path / "d/pipe")
    (tmp_path / "d/zeros").symlink_to("/dev/zero")
    (tmp_path / "d/broken").symlink_to("nowhere")
    (tmp_path / "d/above").symlink_to("..")
    with socket.socket(socket.AF_UNIX) as unix, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "d")
        unix.bind("socket")
    os.truncate(write(tmp_path / "d/sparse", b"\x89"), 10**13)
    corpus = read_corpus([str(tmp_path / "d")])
    assert [document.text for document in corpus.documents] == ["text"]
    assert corpus.notes == [f"skipped 1 files in {tmp_path / 'd'} that are not text: sparse"]


def test_a_file_whose_later_bytes_are_not_text_is_skipped(tmp_path: Path) -> None:
    write(tmp_path / "d/a.txt", b"text")
    write(tmp_path / "d/0.bin", b"x" * 100_000 + b"\xff")
    write(tmp_path / "d/1.bin", b"x" * 100_000 + b"\0")
    write(tmp_path / "d/2.gz", gzip.compress(os.urandom(200_000))[:-9])
    corpus = read_corpus([str(tmp_path / "d")])
    assert [document.text for document in corpus.documents] == ["text"]
    assert corpus.notes[0].endswith("that are not text: 0.bin, 1.bin, 2.gz")


def test_names_are_shown_on_one_line(tmp_path: Path) -> None:
    for name in ("one\ntwo", "bell\a", "\udcff"):
        with pytest.raises(InputError) as refused:
            read_corpus([str(tmp_path / name)])
        assert str(refused.value).isprintable()
    with pytest.raises(InputError, match="contains a NUL"):
        read_corpus(["a\0b"])


def test_a_model_folder_given_as_text_is_refused_with_the_options_for_models(
    tmp_path: Path,
) -> None:
    (tmp_path / "best.safetensors").write_bytes(b"\0")
    with pytest.raises(
        InputError, match="contains a model: name a text file, and give the model with --from"
    ):
        read_corpus([str(tmp_path)])
