"""`mygpt tokenize` as a user meets it: what it prints, where, with which exit code."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mygpt
from mygpt.data import TokenStore, encode_documents
from mygpt.text import read_corpus
from mygpt.tokenization import BPETokenizer, ByteTokenizer
from shell import Shell

pytestmark = pytest.mark.slow

TEXT = "the quick brown fox jumps over the lazy dog. " * 200


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fox.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys, "tokenize")


def test_a_store_and_the_line_about_it(here: Path, shell: Shell) -> None:
    code, out, err = shell("fox.txt", "--out", "fox.store")
    store = TokenStore.open(here / "fox.store", check=True)
    assert (code, err) == (0, "")
    assert out.startswith(
        f"fox.store: 1 document, {len(store.tokens):,} tokens of {len(TEXT):,} bytes, "
    )
    assert out.endswith("next: mygpt train fox.store\n")
    wanted = encode_documents(read_corpus(["fox.txt"]).documents, store.tokenizer)
    assert store.tokens[:].tolist() == wanted.tolist()
    code, out, err = shell("fox.txt", "--out", "fox.store")
    assert (code, err) == (0, "")
    assert out.startswith("fox.store exists already: 1 document")
    code, out, err = shell("fox.txt", "--out", "fox.store", "--overwrite", "-q")
    assert (code, out, err) == (0, "", "")


def test_tokenizers_by_name_and_by_file(here: Path, shell: Shell) -> None:
    """A name, a tokenizer's JSON, another store, a run: all give the tokenizer they say."""
    mygpt.train(
        here / "fox.txt",
        output=here / "run",
        preset="nano",
        tokenizer="bpe:275",
        embed_dim=16,
        num_layers=1,
        max_seq_len=16,
        steps=1,
        listener=lambda event: None,
        command="mygpt train fox.txt",
    )
    BPETokenizer.train([TEXT], 270).save(here / "bpe.json")
    sizes = {"byte": 257, "char": 29, "bpe:280": 280, "bpe.json": 270, "s0": 257, "run": 275}
    sizes["run/last.safetensors"] = 275
    for number, (name, size) in enumerate(sizes.items()):
        code, _, err = shell("fox.txt", "--out", f"s{number}", "--tokenizer", name)
        assert (code, err) == (0, ""), name
        store = TokenStore.open(here / f"s{number}")
        assert store.tokenizer.vocab_size == size, name
        decoded = store.tokenizer.decode(store.tokens[:].tolist())
        assert decoded == "<|endoftext|>" + TEXT


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere.txt", "--out", "s"], "nowhere.txt does not exist"),
        (["fox.txt", "--out", "."], "contains other files ('fox.txt')"),
        (["fox.txt", "--out", "fox.txt"], "give another --out"),
        (["fox.txt", "--out", ""], "--out is empty"),
        (["fox.txt", "--out", "s", "--tokenizer", "bpa"], "tokenizer='bpa' is not known"),
        (["fox.txt", "--out", "s", "--tokenizer", "bpe:x"], "tokenizer='bpe:x': SIZE must be"),
        (["fox.txt", "--out", "s", "--tokenizer", "bpe:99999999"], "from 257 (all bytes, and end"),
        (["fox.txt", "--out", "s", "--tokenizer", "bpe:5"], "tokenizer='bpe:5': SIZE must be"),
        (["fox.txt", "--out", "s", "--tokenizer", "fox.txt"], "fox.txt is not a tokenizer's JSON"),
        (["fox.txt", "--out", "s", "--shard-tokens", "0"], "shard_tokens=0"),
        (["fox.txt", "--out", "s", "--workers", "-1"], "workers=-1"),
        (["fox.txt", "--out", "s", "--encoding", "klingon"], "encoding='klingon'"),
        (["fox.txt"], "--out"),
    ],
)
def test_refusals_are_one_line(args: list[str], message: str, here: Path, shell: Shell) -> None:
    assert message in shell.refused(*args)


@pytest.mark.processes
def test_standard_input(here: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text that the tokenizer is trained on is encoded too; standard input twice is refused."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert shell("-", "--out", "s", "--tokenizer", "bpe:300")[0] == 0
    store = TokenStore.open(here / "s")
    assert store.tokenizer.decode(store.tokens[:].tolist()) == "<|endoftext|>" + TEXT
    assert "--overwrite" in shell.refused("-", "--out", "s", "--tokenizer", "bpe:300")
    refused = shell.refused("-", "--out", "c", "--tokenizer", "char")
    assert "write the text to a file first" in refused


def test_a_field_and_what_was_passed_over(here: Path, shell: Shell) -> None:
    (here / "d").mkdir()
    (here / "d" / "x.jsonl").write_text(json.dumps({"body": "one"}) + "\n")
    (here / "d" / "noise").write_bytes(b"\0")
    code, _, err = shell(
        "d", "--out", "s", "--tokenizer", "byte", "--field", "body", "--workers", 0
    )
    assert (code, err) == (0, "skipped 1 files in d that are not text: noise\n")
    assert TokenStore.open(here / "s").tokens[:].tolist() == [256, *b"one"]
    assert shell.refused("d/x.jsonl", "--out", "t", "--tokenizer", "byte") == (
        "mygpt: d/x.jsonl, line 1 has no field 'text' (it has 'body'): name it with --field body\n"
    )


@pytest.mark.processes
def test_ctrl_c_keeps_what_is_there(here: Path) -> None:
    """Two signals of a terminal: to the command and to its processes."""
    with open("long.txt", "w") as file:
        file.write(TEXT * 3000)  # 27 MB
    BPETokenizer.train([TEXT], 290).save(here / "bpe.json")
    options = ["--tokenizer", "bpe.json", "--shard-tokens", "100000", "--workers", "2"]
    command = [sys.executable, "-m", "mygpt", "tokenize", "long.txt", "--out", "s", *options]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while child.poll() is None and not (here / "s/shards/000002.tokens").exists():
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=20)
    assert child.returncode == 130, err
    assert out == ""
    assert err.startswith("stopped; ")
    assert err.endswith("tokens are in s: the same command continues from there\n")
    assert err.count("\n") == 1
    kept = json.loads((here / "s/index.json").read_text())
    assert kept["tokens"] > 0
    assert not kept["finished"]


def test_help_has_an_example(shell: Shell) -> None:
    out = shell.printed("--help")
    assert "Example: mygpt tokenize" in " ".join(out.split())
    assert ByteTokenizer.kind in out
