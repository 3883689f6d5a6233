"""A note warns if validation text is also in the training text: its loss is then too low."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mygpt.text import Document
from mygpt.text.documents import overlap_note
from store_samples import build_with
from training_runs import prepared

TEXT = "".join(f"Line {n} of the sea, the ship and the shore {n * n}.\n" for n in range(400))
OTHER = "".join(f"Nothing of {n} is in the first text, {n * 7} times.\n" for n in range(60))
SAME = "is in the training text: the validation loss measures"


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


def notes(text: str, val_file: str, folder: Path, **options: object) -> str:
    ready = prepared(text, val_file=val_file, output=folder / "run", steps=1, **options)  # type: ignore[arg-type]
    return "\n".join(ready.start.notes)


@pytest.mark.parametrize("tokenizer", ["char", "bpe:300"])
def test_a_validation_file_that_is_in_the_training_text_gets_a_note(tokenizer, tmp_path) -> None:
    """The same file, a link, a compressed copy, other line ends, a part, and a longer text."""
    text = write(tmp_path / "a.txt", TEXT)
    (tmp_path / "link.txt").symlink_to(text)
    (tmp_path / "copy.gz").write_bytes(gzip.compress(TEXT.encode()))
    write(tmp_path / "crlf.txt", TEXT.replace("\n", "\r\n"))
    write(tmp_path / "part.txt", TEXT[1000:3000])
    write(tmp_path / "around.txt", f"Before.\n{TEXT}After.\n")
    write(tmp_path / "other.txt", OTHER)
    for name in ("a.txt", "link.txt", "copy.gz", "crlf.txt", "part.txt", "around.txt"):
        val_file = str(tmp_path / name)
        assert f"{val_file} {SAME}" in notes(text, val_file, tmp_path, tokenizer=tokenizer)
    assert "training text" not in notes(
        text, str(tmp_path / "other.txt"), tmp_path, tokenizer=tokenizer
    )


def test_validation_documents_in_the_training_text_are_counted(tmp_path: Path) -> None:
    documents = OTHER.splitlines()
    both = [json.dumps({"text": text}) for text in documents]
    text = write(tmp_path / "a.jsonl", "\n".join(both[:40]))
    val_file = write(tmp_path / "v.jsonl", "\n".join(both[30:]))
    found = notes(text, val_file, tmp_path)
    assert f"10 of the 30 documents of {val_file} are also in the training text" in found


def test_short_equal_documents_are_ignored() -> None:
    train = [Document(str(n), text) for n, text in enumerate(["yes", "no", TEXT])]
    validation = [Document("a", "yes"), Document("b", OTHER)]
    assert overlap_note(train, validation, "v") == []
    assert overlap_note(
        train, [Document("a", "yes")], "v"
    )  # unless it is the whole validation text


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_validation_text_that_is_in_the_training_store_gets_a_note(tokenizer, tmp_path) -> None:
    text, other = write(tmp_path / "a.txt", TEXT), write(tmp_path / "b.txt", OTHER)
    part = write(tmp_path / "part.txt", TEXT[1000:9000])
    store = build_with([text], tmp_path / "store", tokenizer=tokenizer)
    build_with([text], tmp_path / "same", tokenizer=store.tokenizer)
    build_with([other], tmp_path / "other", tokenizer=store.tokenizer)
    for name in (text, part, str(tmp_path / "same")):
        assert f"{name} {SAME}" in notes(str(store.path), name, tmp_path)
    for name in (other, str(tmp_path / "other")):
        assert SAME not in notes(str(store.path), name, tmp_path)
