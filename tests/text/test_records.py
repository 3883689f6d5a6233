"""Files of records (JSON lines, JSON, CSV, Parquet): the text of each record is a document."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mygpt.cli import main
from mygpt.data import TokenStore, store_cache, store_request
from mygpt.data.token_store import StoredTokens
from mygpt.errors import InputError
from mygpt.text import RecordOptions, find_sources, pieces, read_corpus, reading
from mygpt.text import records as records_module
from mygpt.text.records import texts_of_csv, texts_of_json
from mygpt.training import resume, train
from mygpt.training.run import RunFolder
from store_samples import build_with
from text_samples import documents, write
from training_runs import prepared

TEXTS = ["The sea, wide.", 'A "ship"\nsails\r\non; far', "日本語 é", "last"]
SMALL = {"preset": "nano", "embed_dim": 16, "num_heads": 2, "num_layers": 1, "steps": 2}
SMALL |= {"max_seq_len": 8, "batch_size": 2, "tokenizer": "byte"}
LENIENT = RecordOptions(lines_may_be_plain=True)


def in_csv(texts: list[str], field: str = "text", **how: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, **how)  # type: ignore[arg-type]
    writer.writerows([["id", field], *([n, text] for n, text in enumerate(texts))])
    return file.getvalue().encode()


def in_json(texts: list[str], field: str = "text", indent: int | None = None) -> bytes:
    return json.dumps([{"id": 1, field: text} for text in texts], indent=indent).encode()


def in_lines(texts: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 1, field: text}).encode() + b"\n" for text in texts)


FINE = in_lines(["fine"])
FILES = {
    "a.jsonl": in_lines(TEXTS),
    "a.NDJSON": in_lines(TEXTS),
    "a.JSONL": in_lines(TEXTS),
    "a.ndjson.gz": gzip.compress(in_lines(TEXTS)),
    "a.json": in_json(TEXTS),
    "pretty.json": in_json(TEXTS, indent=2),
    "texts.Json": json.dumps(TEXTS).encode(),
    "lines.json": in_lines(TEXTS),
    "a.csv": in_csv(TEXTS),
    "a.CSV.GZ": gzip.compress(in_csv(TEXTS)),
    "semicolons.csv": in_csv(TEXTS, delimiter=";"),
    "a.tsv": in_csv(TEXTS, delimiter="\t"),
    "marked.csv": b"\xef\xbb\xbf" + in_csv(TEXTS),
    "wide.csv": in_csv(TEXTS).decode().encode("utf-16"),
    "line-feeds.csv": in_csv(TEXTS, lineterminator="\n"),
    "old-mac.csv": in_csv(TEXTS, lineterminator="\r"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_its_records(name: str, tmp_path: Path) -> None:
    """Suffixes are case-insensitive; *.ndjson and *.json were once read as plain text."""
    path = write(tmp_path / name, FILES[name])
    corpus = read_corpus([path], records=LENIENT)
    assert [document.text for document in corpus.documents] == TEXTS
    assert corpus.notes == [f"{path}: the field 'text' of each record is read (--field)"]
    for records in (LENIENT, RecordOptions(), RecordOptions("text")):
        assert documents(path, records=records) == TEXTS
    source = find_sources([path])[0][0]
    assert [piece.text for piece in pieces(source, skip_rows=2)] == TEXTS[2:]
    assert [document.text for document in read_corpus([path]).documents] != TEXTS  # as older runs


def test_records_of_a_table_in_memory(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "d" / "a.PARQUET"
    path.parent.mkdir()
    parquet.write_table(pa.table({"body": TEXTS}), path)
    for place in (path, path.parent):
        corpus = read_corpus([str(place)], records=RecordOptions("body"))
        assert [document.text for document in corpus.documents] == TEXTS


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1))
def test_csv_and_json_are_read_in_pieces_of_any_length(texts: list[str]) -> None:
    for data, read in ((in_csv(texts), texts_of_csv), (in_json(texts, indent=1), texts_of_json)):
        content = data.decode()
        for length in (1, 3, 7, 10**6):
            cut = [(content[at : at + length], 1) for at in range(0, len(content), length)]
            assert [text for text, _ in read(cut, "text", "name")] == texts


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_a_file_without_the_field_is_plain_text_with_a_note(name: str, tmp_path: Path) -> None:
    """The note names `--field` and the existing fields."""
    make = {"jsonl": in_lines, "json": in_json}.get(name.rpartition(".")[2], in_csv)
    path = write(tmp_path / name, make(TEXTS, field="answer"))
    corpus = read_corpus([path], records=LENIENT)
    plain = read_corpus([path]).documents[0].text
    assert [document.text for document in corpus.documents] == [plain]
    assert "".join(documents(path, records=LENIENT)) == plain
    for notes in (corpus.notes, find_sources([path], records=LENIENT)[1]):
        assert len(notes) == 1
        named = r"'answer'\): name it with --field( answer)?; the whole file is read as plain text"
        assert re.search(named, notes[0])
        assert ("--field answer" in notes[0]) == ("json" in name), (
            "of a table, names alone are read"
        )
    assert documents(path, records=RecordOptions("answer")) == TEXTS
    with pytest.raises(InputError, match=r"'body' \(it has 'id', 'answer'\)"):
        documents(path, records=RecordOptions("body"))
    with pytest.raises(InputError, match=r"'body' \(it has 'id', 'answer'\)"):
        read_corpus([path], records=RecordOptions("body"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'[{"text": "a"}, 5]', "record 2 must be an object or a string, not 5"),
        ("a.json", b'[{"text": "a"}, {"text": null}]', "record 2: field 'text' must be a string"),
        ("a.json", b'[{"text": "a"}', "ends inside its array"),
        ("a.json", b'[{"text": "a"}] more', "there is more after its array"),
        ("a.json", b'["a" "b"]', "no comma after record 1"),
        ("a.json", b'["a", "b\\ud800"]', "record 2: character 1 is the lone surrogate U+D800"),
        ("a.json", b'["a", ' + b"[" * 100_000, "is not valid JSON"),
        ("a.jsonl", FINE + b"{", "line 2 is not valid JSON"),
        ("a.jsonl", FINE + b"[1]", "line 2 is not an object"),
        ("a.jsonl", FINE + b'{"body": "x"}', "(it has 'body'): name it with --field body"),
        ("a.jsonl", FINE + b'{"text": 5}', "line 2: field 'text' must be a string, not 5"),
        ("a.jsonl", FINE + b'{"text": null}', "must be a string, not None"),
        ("a.jsonl", FINE + b'{"text": "a\\ud800"}', "line 2: character 1 is the lone surrogate"),
        ("a.jsonl", FINE + b"[" * 100_000, "line 2 is not valid JSON"),
        ("a.csv", b"id,text\n1,a\n2\n", "line 3 has 1 columns, but 'text' is column 2"),
    ],
)
def test_an_invalid_later_record_is_refused_with_its_position(
    name: str, data: bytes, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, data)
    for read in (
        lambda: read_corpus([path], records=LENIENT),
        lambda: documents(path, records=LENIENT),
    ):
        with pytest.raises(InputError) as refused:
            read()
        assert message in str(refused.value)
        assert name in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_field_is_refused_if_only_plain_text_is_named(tmp_path: Path) -> None:
    """It was once ignored."""
    plain, lines = write(tmp_path / "a.txt", b"text"), write(tmp_path / "b.jsonl", in_lines(TEXTS))
    for read in (lambda f: read_corpus([plain], records=f), lambda f: documents(plain, records=f)):
        with pytest.raises(
            InputError, match=r"--field text applies to \*\.jsonl.*remove the option"
        ):
            read(RecordOptions("text"))
    assert documents(plain, lines, records=RecordOptions("text")) == ["text", *TEXTS]


def test_standard_input_is_json_lines_if_a_field_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for records, expected in (
        (RecordOptions("text"), TEXTS),
        (RecordOptions(), [in_lines(TEXTS).decode()]),
    ):
        stream = io.TextIOWrapper(io.BytesIO(in_lines(TEXTS)))
        monkeypatch.setattr(sys, "stdin", stream)
        assert documents("-", records=records) == expected


# --- runs and stores -----------------------------------------------------------------------


def test_runs_on_records_of_this_and_older_versions_are_resumed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", in_lines(TEXTS * 20))
    train(path, output=tmp_path / "new", listener=lambda _: None, **SMALL)
    state, _ = RunFolder.of(tmp_path / "new").load_state()
    assert state.settings["field"] == ""
    assert state.provenance["corpus"]["documents"] == 80
    resume(tmp_path / "new", steps=3, listener=lambda _: None)
    with pytest.raises(InputError, match="field=answer cannot change"):
        resume(tmp_path / "new", steps=4, field="answer", listener=lambda _: None)

    settings = {name: state.settings[name] for name in ("files", "val_file", "encoding")}
    from mygpt.training.corpus import read_source

    old = read_source(settings, 0.1, allow_bytes=True)
    assert next(document.text for document in old.documents).startswith('{"id": 1')  # type: ignore[union-attr]
    plain = prepared(path, output=tmp_path / "tutorial", preset="tutorial")
    assert plain.text.source.num_documents == 1


def test_a_validation_file_can_be_records_or_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", in_lines(TEXTS * 20, field="body"))
    lines = write(tmp_path / "v.csv", in_csv(["one text", "two texts"], field="body"))
    text = write(tmp_path / "v.txt", b"one plain text")
    for val_file, count in ((lines, 2), (text, 1)):
        ready = prepared(path, output=tmp_path / "run", field="body", val_file=val_file, **SMALL)
        assert len(ready.text.source.val_documents) == count


def test_large_files_of_records_are_tokenized_into_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "a.csv", in_csv(TEXTS * 100))
    short = prepared(path, output=tmp_path / "run", tokenizer="byte", steps=1)
    monkeypatch.setenv("MYGPT_STORE_ABOVE", "2000")
    large = prepared(path, output=tmp_path / "run", tokenizer="byte", steps=1)
    assert isinstance(large.text.train_tokens, StoredTokens)
    assert large.text.source.num_documents == short.text.source.num_documents == 400
    assert large.text.source.num_bytes == short.text.source.num_bytes
    without = write(tmp_path / "b.jsonl", in_lines(TEXTS * 100, field="body"))
    plain = prepared(without, output=tmp_path / "run", tokenizer="byte", steps=1)
    assert isinstance(plain.text.train_tokens, StoredTokens)
    assert plain.text.source.num_documents == 1


def test_compressed_text_that_is_large_uncompressed_is_tokenized_into_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of 2.9 MB once became 3 GB in memory, three times."""
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path / "cache"))
    text = b"".join(b"%d bottles of beer\n" % n for n in range(20_000))
    path = write(tmp_path / "a.txt.gz", gzip.compress(text))
    size = Path(path).stat().st_size
    monkeypatch.setenv("MYGPT_STORE_ABOVE", str(2 * size))
    ready = prepared(path, output=tmp_path / "run", tokenizer="byte", steps=1)
    assert isinstance(ready.text.train_tokens, StoredTokens)
    assert ready.text.source.num_bytes == len(text)
    said = "bytes when packed, so it is not read into memory"
    assert any(said in note for note in ready.start.notes)
    monkeypatch.setenv("MYGPT_STORE_ABOVE", str(len(text)))
    assert not store_cache.large_sources([path], None)


def test_tokenize_reads_csv_records_but_continues_an_older_store_as_plain_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.csv", in_csv(TEXTS * 10, field="body"))
    command = ["tokenize", path, "--tokenizer", "byte", "--out"]
    with pytest.raises(SystemExit) as ended:
        main([*command, str(tmp_path / "new"), "--field", "body"])
    assert not ended.value.code
    assert "40 documents" in capsys.readouterr().out
    monkeypatch.setattr(store_request, "READING_VERSION", 1)
    store = build_with([path], tmp_path / "old", tokenizer="byte")
    monkeypatch.undo()
    index = json.loads((tmp_path / "old" / "index.json").read_text())
    del index["reading"]
    (tmp_path / "old" / "index.json").write_text(json.dumps(index))
    again = build_with([path], tmp_path / "old", tokenizer="byte")
    assert again.sha256 == store.sha256 == TokenStore.open(tmp_path / "old").sha256
    assert again.num_documents == 1


@pytest.mark.slow
def test_compressed_files_that_expand_far_more_than_text_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a one-line error and before all of it is read: text or records, gzip or zstd."""
    monkeypatch.setattr(reading, "_SMALL_UNCOMPRESSED", 2**18)
    line = in_lines(["again and again " * 8])
    member = gzip.compress(line * 2**14)
    frames = zstandard.ZstdCompressor().compress(line * 2**15)
    for name, data in (
        ("a.txt.gz", member * 8),
        ("a.jsonl.gz", member * 8),
        ("named.txt", member * 8),
        ("a.txt.zst", frames * 4),
        ("a.jsonl.zst", frames * 4),
    ):
        path = write(tmp_path / name, data)
        with pytest.raises(
            InputError, match=r"expands to more than 100 times its compressed size.*decompress it"
        ):
            read_corpus([path], records=LENIENT)
        monkeypatch.setenv("MYGPT_STORE_ABOVE", str(2**22))
        with pytest.raises(InputError, match="expands to more than 100 times its compressed size"):
            store_cache.large_sources([path], None, LENIENT)


def test_a_line_beyond_the_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_module, "_LONGEST", 1000)
    path = write(tmp_path / "a.jsonl", b'{"text": "' + b"x" * 600_000)
    with pytest.raises(InputError, match=r"a\.jsonl has a line of more than 1,000 characters"):
        documents(path, records=RecordOptions("text"))
