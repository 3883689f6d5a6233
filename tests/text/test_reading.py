"""Reading files into memory: files that change, and the limit of memory."""

from __future__ import annotations

import gzip
import io
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mygpt.data import encode_documents
from mygpt.errors import OutOfMemoryError
from mygpt.text import Document, read_corpus, reading, split_documents
from mygpt.text import corpus as corpus_module
from mygpt.tokenization import ByteTokenizer, CharTokenizer


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def texts(*paths: str, **options: object) -> list[str | bytes]:
    return [document.text for document in read_corpus(paths, **options).documents]  # type: ignore[arg-type]


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
