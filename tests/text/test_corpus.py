"""Reading a corpus: text is not changed, its memory is limited, and errors are one line."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import socket
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mygpt.data import encode_documents
from mygpt.errors import InputError, OutOfMemoryError
from mygpt.text import (
    Corpus,
    Document,
    documents,
    find_sources,
    read_corpus,
    reading,
    split_documents,
)
from mygpt.text import corpus as corpus_module
from mygpt.tokenization import ByteTokenizer, CharTokenizer
from text_samples import texts, write


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


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe\r\n")))
    corpus = read_corpus(["-"])
    assert corpus.name == "stdin"
    assert corpus.documents[0].text == "from a pipe\r\n"
    with pytest.raises(InputError, match="named twice"):
        read_corpus(["-", "-"])


def test_a_folder_gives_its_text_files_in_order_and_a_note_on_skipped_files(
    tmp_path: Path,
) -> None:
    """Hidden files, runs and stores are skipped silently."""
    folder = tmp_path / "d"
    write(folder / "b.txt", b"second")
    write(folder / "a.md", b"first")
    write(folder / "sub/c.gz", gzip.compress(b"third"))
    for name in (".git/config", "run/last.state.safetensors", "run/log.txt"):
        write(folder / name, b"not read")
    for name in ("store/index.json", "store/shards/notes.txt"):
        write(folder / name, b"not read")
    for name, data in (("image.png", b"\x89PNG\xff\xfe"), ("no.zst", b"-"), ("nul", b"\0b")):
        write(folder / name, data)
    write(folder / "empty.txt", b"")
    note = f"skipped 4 files in {folder} that are not text: empty.txt, image.png, no.zst, ..."
    corpus = read_corpus([str(folder)])
    assert [document.text for document in corpus.documents] == ["first", "second", "third"]
    assert corpus.notes == find_sources([str(folder)])[1] == [note]


def test_patterns_are_sorted_and_must_match(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", b"B")
    write(tmp_path / "a.txt", b"A")
    assert texts(str(tmp_path / "*.txt")) == ["A", "B"]
    with pytest.raises(InputError, match="no file matches"):
        texts(str(tmp_path / "*.nothing"))
    assert texts(write(tmp_path / "a[1].txt", b"odd name")) == ["odd name"]


def test_missing_and_empty_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.txt does not exist"):
        read_corpus([str(tmp_path / "nowhere.txt")])
    with pytest.raises(InputError, match=r"empty\.txt is empty"):
        read_corpus([write(tmp_path / "empty.txt", b"")])
    with pytest.raises(InputError, match="a file name is empty"):
        read_corpus([""])


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


def watch_blocks(monkeypatch: pytest.MonkeyPatch, action: Callable[[bytes], object]) -> None:
    """Call `action` with each block after it has been read."""

    def watched(name: str, **options: bool) -> Iterator[tuple[bytes, int]]:
        for block, read in reading.blocks_of(name, **options):
            yield block, read
            action(block)

    monkeypatch.setattr(corpus_module, "blocks_of", watched)


# --- files that change ---------------------------------------------------------------------


def test_a_file_that_changes_while_it_is_read_gets_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it were memory-mapped, shrinking would end the process."""
    path = tmp_path / "a.txt"
    monkeypatch.setattr(reading, "_BLOCK", 100_000)
    for action, length in (
        (lambda: os.truncate(path, 150_000), 150_000),
        (lambda: path.write_bytes(b"b" * 350_000), 350_000),
        (path.unlink, 300_000),
    ):
        write(path, b"a" * 300_000)
        actions = iter([action])
        with monkeypatch.context() as patch:
            watch_blocks(patch, lambda _, actions=actions: next(actions, list)())
            corpus = read_corpus([str(path)])
        assert len(corpus.documents[0]) == length
        note = f"{path}: it changed while it was read: --resume may read different text"
        assert corpus.notes == [note]
    assert read_corpus([write(path, b"a")]).notes == []


# --- memory --------------------------------------------------------------------------------


def say_free(monkeypatch: pytest.MonkeyPatch, num_bytes: int | None) -> None:
    monkeypatch.setattr(corpus_module, "free_memory_bytes", lambda: num_bytes)


def test_a_file_that_does_not_fit_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the memory needed, the memory free, and how much of the text fits."""
    path = write(tmp_path / "a.txt", b"")
    os.truncate(path, 10**10)
    say_free(monkeypatch, 3 * 10**9)
    monkeypatch.setattr(corpus_module, "blocks_of", None)
    message = (
        r"a\.txt is 10\.0 GB: training on it needs 37\.5 GB of memory, and 3\.0 GB are free; "
        r"train on a part of it, 800\.0 MB at most"
    )
    with pytest.raises(OutOfMemoryError, match=message):
        read_corpus([path])


def test_a_text_that_fits_is_read_the_same_whatever_memory_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.txt", b"a" * 1000)
    for free in (3750, 10**12, None):  # (1 + 2) bytes each, and a quarter more
        say_free(monkeypatch, free)
        assert texts(path) == ["a" * 1000]
    say_free(monkeypatch, 3749)
    with pytest.raises(OutOfMemoryError, match=r"is 1\.0 kB: .*a part of it, 999 bytes at most"):
        read_corpus([path])


def test_files_are_refused_by_their_total_size_including_those_read_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (write(tmp_path / "d" / name, b"a" * 1000) for name in "ab")
    compressed = write(tmp_path / "d/c.gz", gzip.compress(b"a" * 1000))
    say_free(monkeypatch, 7000)
    for paths in ([a, b], [str(tmp_path / "d")], [str(tmp_path / "d/[ab]")]):
        with pytest.raises(OutOfMemoryError, match=r"the text in \d files is 2\.0 kB"):
            read_corpus(paths)
    with pytest.raises(
        OutOfMemoryError, match=r"c\.gz is more than 1\.0 kB: .* before needs .* 8[56]\d bytes"
    ):
        read_corpus([a, compressed])
    assert len(texts(compressed)) == 1


def test_decompression_and_pipes_stop_at_the_memory_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While they are read, not after: a file can expand to a thousand times its size."""
    say_free(monkeypatch, 10**7)
    bomb = write(tmp_path / "a.gz", gzip.compress(bytes(10**6)) * 100)
    seen: list[int] = []
    watch_blocks(monkeypatch, lambda block: seen.append(len(block)))
    with pytest.raises(OutOfMemoryError, match=r"a\.gz is more than \d\.\d MB"):
        read_corpus([bomb])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes(10**8))))
    with pytest.raises(OutOfMemoryError, match=r"standard input is more than \d\.\d MB"):
        read_corpus(["-"])
    assert sum(seen) < 10**7


def test_one_wide_character_widens_the_whole_string(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python stores all characters of a string in the width of the widest: 1, 2 or 4 bytes."""
    for char, needed in (("€", 2), ("🙂", 4)):
        length = 100_000 + len(char.encode())
        path = write(tmp_path / "a.txt", b"a" * 100_000 + char.encode())
        say_free(monkeypatch, int(1.25 * (needed * 100_001 + 2 * length)))
        assert len(read_corpus([path]).documents[0]) == 100_001
        say_free(monkeypatch, int(1.25 * (needed * 100_001 + 2 * length)) - 2)
        with pytest.raises(OutOfMemoryError):
            read_corpus([path])


def test_a_memory_error_while_reading_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.txt", b"text")

    def no_memory(*args: object, **options: object) -> str:
        raise MemoryError

    monkeypatch.setattr("mygpt.text.corpus.texts_of", no_memory)
    with pytest.raises(OutOfMemoryError, match=r"out of memory while reading .*a\.txt"):
        read_corpus([path])


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("ab \n")], ids="bc")
def test_memory_from_file_to_tokens_is_at_most_the_estimate(
    tmp_path: Path, tokenizer: ByteTokenizer | CharTokenizer
) -> None:
    """The string, two bytes per byte of the text, and copies of single pieces."""
    length = 24 * 2**20
    path = write(tmp_path / "a.txt", b"ab \n" * (length // 4))
    encode_documents([Document("warm", "ab \n")], tokenizer)
    tracemalloc.start()
    try:
        corpus = read_corpus([path])
        before, after = split_documents(corpus.documents, 0.1)
        assert corpus.num_bytes == length
        assert len(corpus.sha256) == 64
        rows = [encode_documents(part, tokenizer) for part in (before, after)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert abs(sum(map(len, rows)) - length) <= 2
    assert 3 * length < peak < (1 + 2 * 1.125) * length + 24 * 2**20


def test_a_missing_file_gets_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("A book.")
    (tmp_path / "notes.md").write_text("Notes.")
    with pytest.raises(
        InputError, match=r"bok.txt does not exist: did you mean .*/book.txt\? name"
    ):
        read_corpus([str(tmp_path / "bok.txt")])
    with pytest.raises(InputError, match=r"xyz does not exist: name a text file"):
        read_corpus([str(tmp_path / "xyz")])
