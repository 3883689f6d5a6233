"""Reading text: what comes in comes in as it is, and what cannot is refused in one line."""

from __future__ import annotations

import gzip
import io
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mygpt.errors import InputError
from mygpt.text import Document, read_corpus, split_documents


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def texts(*paths: str, **options: object) -> list[str | bytes]:
    return [document.text for document in read_corpus(paths, **options).documents]  # type: ignore[arg-type]


def test_line_ends_stay_what_they_are(tmp_path: Path) -> None:
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
def test_byte_order_marks_are_understood_and_left_out(
    tmp_path: Path, codec: str, bom: bytes
) -> None:
    path = write(tmp_path / "a.txt", bom + "naïve 🙂".encode(codec))
    assert texts(path) == ["naïve 🙂"]


def test_named_encoding(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "café".encode("latin-1"))
    assert texts(path, encoding="latin-1") == ["café"]
    with pytest.raises(InputError, match=r"encoding='klingon' is not known"):
        texts(path, encoding="klingon")


def test_what_is_not_utf8_is_refused_with_its_place_and_the_remedy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"good\xff")
    with pytest.raises(InputError, match=r"a\.txt is not utf-8: byte 0xff at position 4.*latin-1"):
        texts(path)
    assert texts(path, allow_bytes=True) == [b"good\xff"]


def test_gzip_is_unpacked_and_a_cut_one_refused(tmp_path: Path) -> None:
    packed = gzip.compress(b"packed text")
    assert texts(write(tmp_path / "a.txt.gz", packed)) == ["packed text"]
    for broken in (packed[:-9], b"not gzip", packed[:12] + b"\xff" + packed[13:]):
        with pytest.raises(InputError, match=r"b\.gz is not a whole gzip file"):
            texts(write(tmp_path / "b.gz", broken))


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe\r\n")))
    corpus = read_corpus(["-"])
    assert corpus.name == "stdin"
    assert corpus.documents[0].text == "from a pipe\r\n"


def test_a_folder_gives_its_text_files_in_order_and_tells_what_it_passed_over(
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
        f"passed over 3 files in {tmp_path / 'd'} without text: empty.txt, image.png, zeros.bin"
    ]


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "d/zeros.bin", b"\0\0")
    with pytest.raises(InputError, match="holds no text file"):
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


def test_nothing_named_is_the_built_in_corpus() -> None:
    corpus = read_corpus()
    assert corpus.name == "python-reference"
    assert corpus.num_bytes > 300_000
    assert "assert" in [document.name for document in corpus.documents]


def test_the_digest_sees_text_and_borders(tmp_path: Path) -> None:
    """["ab", "c"] and ["a", "bc"] are the same bytes in a row, and not the same corpus."""
    ab, c = write(tmp_path / "1", b"ab"), write(tmp_path / "2", b"c")
    a, bc = write(tmp_path / "3", b"a"), write(tmp_path / "4", b"bc")
    digests = {read_corpus(pair).sha256 for pair in ([ab, c], [a, bc], [c, ab], [ab], [a, bc])}
    assert len(digests) == 4


def test_the_digest_of_one_file_is_the_files_own(shakespeare: Path) -> None:
    expected = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert read_corpus([str(shakespeare)]).sha256 == expected


@given(st.lists(st.text(min_size=1), min_size=1), st.floats(0.0, 0.99))
def test_a_split_loses_nothing_and_cuts_where_it_says(parts: list[str], fraction: float) -> None:
    documents = [Document(str(i), part) for i, part in enumerate(parts)]
    before, after = split_documents(documents, fraction)
    joined = ["".join(str(document.text) for document in half) for half in (before, after)]
    assert "".join(joined) == "".join(parts)
    assert len(joined[0]) == int(len("".join(parts)) * (1.0 - fraction))
    assert all(document.text for document in [*before, *after])
