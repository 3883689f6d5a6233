"""`<|endoftext|>` separates documents, in memory and in streams alike, unless it is text."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mygpt
from mygpt import training
from mygpt.checkpoint.container import read_arrays, write_arrays
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.cli import main
from mygpt.data import TokenStore, encode_documents
from mygpt.data.building import StoreProgress
from mygpt.errors import InputError
from mygpt.text import SEPARATOR, Document, find_sources, pieces, read_corpus
from mygpt.text.documents import parts_between_separators
from mygpt.text.streams import Piece, split_at_separators
from mygpt.tokenization import CharTokenizer
from mygpt.training.events import Event, Note
from store_samples import build_with

STORIES = [f"story {n} has {n % 7} cats.\n" for n in range(60)]
TINY = {
    "steps": 4, "batch_size": 4, "max_seq_len": 16, "embed_dim": 16, "num_layers": 1,
    "num_heads": 1, "sample_tokens": 0, "device": "cpu",
}  # fmt: skip


@pytest.fixture
def stories(tmp_path: Path) -> str:
    path = tmp_path / "stories.txt"
    path.write_text(f"{SEPARATOR}\n".join(STORIES))
    return str(path)


def silent(event: Event) -> None:
    pass


def parts(text: str | bytes) -> list[str | bytes]:
    return [part.text for part in parts_between_separators(Document("x", text))]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("one\n<|endoftext|>\ntwo\n", ["one\n", "two\n"]),  # TinyStories
        ("one<|endoftext|>two<|endoftext|>", ["one", "two"]),  # GPT-2's exports
        ("one\r\n<|endoftext|>\r\ntwo", ["one\r\n", "two"]),
        ("one\n\n<|endoftext|>\n\ntwo", ["one\n\n", "two"]),
        ("<|endoftext|>one<|endoftext|><|endoftext|>\ntwo", ["one", "two"]),
        ("one<|endoftext|> two", ["one", " two"]),
        ("<|endoftex|>, <|endoftext|", ["<|endoftex|>, <|endoftext|"]),
        (b"\xff one<|endoftext|>\n\xfe", [b"\xff one", b"\xfe"]),
        ("<|endoftext|>\n", []),
    ],
)
def test_a_separator_is_removed_with_the_line_ends_after_it(
    text: str | bytes, wanted: list[str | bytes]
) -> None:
    assert parts(text) == wanted


@given(
    st.lists(st.sampled_from([SEPARATOR, "\n", "\r", "a", "é", "<|endof", "<"]), max_size=30),
    st.integers(1, 9),
)
def test_a_stream_has_the_documents_of_the_text_in_memory(words: list[str], width: int) -> None:
    """The documents do not depend on the pieces, and contain no separator."""
    text = "".join(words)
    cut = [text[start : start + width] for start in range(0, len(text), width)]
    found, counts = [""], []
    source = iter([*(Piece(piece, False, 0) for piece in cut), Piece("", True, 0)])
    for piece, ends, _ in split_at_separators(source, counts.append):
        found[-1] += piece
        found += [""] * ends
    assert found.pop() == ""
    assert [document for document in found if document] == [p for p in parts(text) if p]
    assert sum(counts) == text.count(SEPARATOR)


def test_the_digest_is_that_of_the_file_whether_it_is_split_or_not(
    tmp_path: Path, stories: str
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("x")
    for names in ([stories], [stories, str(other), str(other)]):
        split, whole = (read_corpus(names, split=flag) for flag in (True, False))
        assert len(split.documents) == 60 + len(names) - 1
        assert len(whole.documents) == len(names)
        assert split.sha256 == whole.sha256
    assert (
        read_corpus([stories], split=True)
        .notes[0]
        .startswith(
            "<|endoftext|> separates the documents of 1 text: 60 documents (--no-split-documents"
        )
    )
    assert read_corpus([str(other)], split=True).notes == []
    empty = tmp_path / "empty.txt"
    empty.write_text(f"{SEPARATOR}\n")
    with pytest.raises(InputError, match=r"empty\.txt contains only <\|endoftext\|> and no text"):
        read_corpus([str(empty)], split=True)


@pytest.mark.kernels
def test_a_run_trains_on_documents_without_the_separators(stories: str, tmp_path: Path) -> None:
    notes: list[str] = []

    def listener(event: Event) -> None:
        notes.extend([event.text] if isinstance(event, Note) else [])

    writer = mygpt.train(stories, output=tmp_path / "run", listener=listener, **TINY)
    assert isinstance(writer.tokenizer, CharTokenizer)
    assert "|" not in writer.tokenizer.chars
    assert any("60 documents" in note for note in notes)
    corpus = read_checkpoint(tmp_path / "run" / "last.safetensors").provenance["corpus"]
    assert corpus["documents"] == 60
    assert corpus["split_documents"] is True
    # Resuming and reproducing use the same text.
    training.resume(tmp_path / "run", steps=6, listener=silent)
    training.replay(tmp_path / "run", output=tmp_path / "again", listener=silent)
    as_text = mygpt.train(
        stories, output=tmp_path / "text", split_documents=False, listener=silent, **TINY
    )
    assert "|" in as_text.tokenizer.chars  # type: ignore[attr-defined]


@pytest.mark.kernels
def test_a_text_for_the_tutorials_training_is_not_split(stories: str, tmp_path: Path) -> None:
    writer = mygpt.train(
        stories, output=tmp_path / "run", preset="tutorial", listener=silent, **TINY
    )
    assert "|" in writer.tokenizer.chars  # type: ignore[attr-defined]


@pytest.mark.kernels
def test_a_run_begun_before_documents_were_split_resumes_without_splitting(
    stories: str, tmp_path: Path
) -> None:
    """Its state does not record whether documents are split."""
    for name, steps in (("old", 4), ("new", 8)):
        mygpt.train(
            stories, output=tmp_path / name, split_documents=False, listener=silent,
            **{**TINY, "steps": steps, "schedule": "constant"},
        )  # fmt: skip
    path = tmp_path / "old" / "last.state.safetensors"
    arrays, values = read_arrays(path)
    del values["settings"]["split_documents"], values["provenance"]["corpus"]["split_documents"]
    write_arrays(path, {name: array.copy() for name, array in arrays.items()}, values)
    training.resume(tmp_path / "old", steps=8, listener=silent)
    old, new = (read_checkpoint(tmp_path / name / "last.safetensors") for name in ("old", "new"))
    for name, array in new.arrays.items():
        np.testing.assert_array_equal(old.arrays[name], array)


@pytest.mark.kernels
def test_eval_splits_as_the_model_was_trained(
    stories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--last 0.1` evaluates the validation text of training, with the same loss."""
    for flag in (True, False):
        run = tmp_path / f"run{flag}"
        mygpt.train(stories, output=run, split_documents=flag, listener=silent, **TINY)
        with pytest.raises(SystemExit) as left:
            main(["eval", str(run), stories, "--last", "0.1", "--json"])
        assert left.value.code == 0
        found = json.loads(capsys.readouterr().out)
        kept = read_checkpoint(run / "best.safetensors").provenance
        assert found["results"]["full"]["loss"] == pytest.approx(kept["val_loss"], rel=1e-6)
        with pytest.raises(SystemExit):
            main(["eval", str(run), stories])
        assert "the model was trained on this text" in capsys.readouterr().out


class Stopped(Exception):
    pass


def stopped_at_a_shard(build: Callable[..., TokenStore], out: Path) -> TokenStore | None:
    """Build until the next shard is committed; None if the build was stopped there."""
    index = out / "index.json"
    seen = json.loads(index.read_text())["tokens"] if index.exists() else 0

    def stop(progress: StoreProgress) -> None:
        if progress.committed > seen:
            raise Stopped

    try:
        return build(progress=stop)
    except Stopped:
        return None


def test_a_store_has_the_ids_of_the_text_in_memory(stories: str, tmp_path: Path) -> None:
    """Also if it is stopped after every job, and for JSON lines with several documents each."""
    lines = tmp_path / "x.jsonl"
    rows = [SEPARATOR.join(STORIES[n : n + 7]) for n in range(0, 60, 7)]
    lines.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    tokenizer = CharTokenizer.from_text("".join(STORIES), end_of_text=True)
    corpus = read_corpus([stories], split=True)
    wanted = encode_documents(corpus.documents, tokenizer)

    for file in (stories, str(lines)):
        out, starts = tmp_path / f"{Path(file).suffix}.store", 0
        build = partial(build_with, [file], out, tokenizer=tokenizer, shard_tokens=300)
        while (store := stopped_at_a_shard(build, out)) is None:
            starts += 1
        assert starts > 2
        np.testing.assert_array_equal(store.tokens[:], wanted)
        assert store.num_documents == 60
        assert store.num_bytes == corpus.num_bytes


def test_tokenizers_are_trained_without_separators(stories: str, tmp_path: Path) -> None:
    """From compressed and plain text: the separator's characters are not in the vocabulary."""
    sources = find_sources([stories])[0]
    assert sum(piece.ends for piece in pieces(sources[0], split=True)) == 60
    for name in ("bpe:300", "char"):
        store = build_with([stories], tmp_path / name, tokenizer=name)
        texts = [store.tokenizer.token_text(i) for i in range(257, store.tokenizer.vocab_size)]
        assert not any("|" in text for text in texts if name != "char")
        kept = build_with(
            [stories], tmp_path / f"{name}-kept", tokenizer=name, split_documents=False
        )
        assert kept.num_documents == 1
        assert SEPARATOR in kept.tokenizer.decode(kept.tokens[:100].tolist())


def test_a_store_begun_before_documents_were_split_is_opened_unchanged(
    stories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command opens it; it is refused only if --split-documents is given explicitly."""
    out = tmp_path / "old.store"
    build_with([stories], out, split_documents=False)
    index = json.loads((out / "index.json").read_text())
    del index["split_documents"]
    (out / "index.json").write_text(json.dumps(index))
    assert build_with([stories], out).num_documents == 1
    with pytest.raises(InputError, match="begun with split_documents False, not True"):
        build_with([stories], out, split_documents=True)
    assert build_with([stories], out, overwrite=True).num_documents == 60
    with pytest.raises(SystemExit) as left:
        main(["tokenize", stories, "--out", str(tmp_path / "new.store")])
    assert left.value.code == 0
    captured = capsys.readouterr()
    assert "60 documents" in captured.out
    assert "<|endoftext|> was found 59 times; it separates documents" in captured.err


@pytest.mark.kernels
def test_a_text_in_the_store_cache_is_split_like_one_in_memory(
    stories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path / "cache"))
    weights = []
    for above in ("10", "off"):
        monkeypatch.setenv("MYGPT_STORE_ABOVE", above)
        run = tmp_path / f"run{above}"
        mygpt.train(stories, output=run, tokenizer="char", listener=silent, **TINY)
        if above == "10":
            training.resume(run, steps=6, listener=silent)
        weights.append(read_checkpoint(run / "last.safetensors").tokenizer.to_state())
    assert weights[0] == weights[1]
    kept = mygpt.train(
        stories, output=tmp_path / "kept", tokenizer="char", split_documents=False,
        listener=silent, **TINY,
    )  # fmt: skip
    assert "|" in kept.tokenizer.chars  # type: ignore[attr-defined]
