"""Building token stores: the ids are those of `encode_documents`, also after interruptions."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mygpt.checkpoint.locks import RunLock
from mygpt.data import TokenStore, building, encoding
from mygpt.data.building import StoreProgress
from mygpt.data.encoding import Chunker
from mygpt.data.token_store import StoredTokens
from mygpt.errors import CheckpointError, InputError, StorageError
from mygpt.text import RecordOptions, read_corpus
from mygpt.tokenization import (
    CharTokenizer,
    ForeignTokenizer,
    Tokenizer,
)
from mygpt.tokenization.tokenizer_json import _KNOWN_RULES, TokenizerFile
from mygpt.tokenization.words import WordSplitter
from store_samples import (
    OURS,
    TEXTS,
    TOKENIZERS,
    build_with,
    bytes_of,
    gpt2_like,
    lines_of,
    reference_ids,
)

# --- content -------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_tokens", [100, 2**24])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_those_of_encode_documents(name: str, shard_tokens: int, tmp_path: Path) -> None:
    """Split into shards or not; the positions where documents begin are the same too."""
    tokenizer = TOKENIZERS[name]()
    file = lines_of(tmp_path / "x.jsonl")
    made = build_with([file], tmp_path / "s", tokenizer=tokenizer, shard_tokens=shard_tokens)
    wanted = reference_ids(tokenizer)
    np.testing.assert_array_equal(made.tokens[:], wanted)
    assert made.tokens.dtype == wanted.dtype
    assert made.num_documents == len(TEXTS)
    assert made.num_bytes == sum(len(text.encode()) for text in TEXTS)
    lengths = [len(reference_ids(tokenizer, [text])) for text in TEXTS]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    np.testing.assert_array_equal(made.document_starts(0, len(made.tokens)), starts)
    np.testing.assert_array_equal(made.document_starts(1, int(starts[2])), starts[1:2])
    assert (len(made.shards) > 1) == (shard_tokens == 100)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["ours", "gpt-2's rule", "unigram"])
def test_any_number_of_processes_gives_the_same_files(name: str, tmp_path: Path) -> None:
    """However many processes encode."""
    tokenizer = TOKENIZERS[name]()
    plain = tmp_path / "x.txt"
    plain.write_text("\n".join(TEXTS))
    for workers in (0, 2):
        out = tmp_path / f"s{workers}"
        build_with([str(plain)], out, tokenizer=tokenizer, shard_tokens=300, workers=workers)
    assert bytes_of(tmp_path / "s0") == bytes_of(tmp_path / "s2")


def test_an_encoding_process_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, mygpt.data.encoding; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_other_programs_can_map_a_shard(store: TokenStore) -> None:
    """As nanoGPT does: `np.memmap` of 16-bit integers without a header."""
    shard = np.memmap(store.path / "shards" / "000000.tokens", "<u2", "r")
    np.testing.assert_array_equal(shard, store.tokens[: len(shard)])


ODD = st.text(st.sampled_from("aZé 1.'\n\r\t日。\u00a0\u180e\u3099s!½\U0001f600"), max_size=300)


@given(ODD, st.integers(1, 40))
@example("a" * 700 + " b" + " " * 600 + "\n\nc", 3)
@example("x\n\ny\n z!\n\n\nw'll 12 34\r\n\r\nA", 1)
@pytest.mark.parametrize("name", ["ours", "gpt-2's rule"])
def test_chunk_boundaries_are_word_boundaries(name: str, text: str, length: int) -> None:
    """On texts of characters that the rules for words distinguish."""
    tokenizer = _CUT[name]
    chunker = Chunker(tokenizer, length)
    parts = _chunks(chunker, [text])
    assert "".join(parts) == text
    assert b"".join(map(tokenizer.encode_part, parts)) == tokenizer.encode_part(text)
    # The chunks do not depend on the pieces the text arrives in.
    assert _chunks(chunker, list(text)) == parts


_CUT: dict[str, Tokenizer] = {"ours": OURS, "gpt-2's rule": gpt2_like()}


def _chunks(chunker: Chunker, pieces: list[str]) -> list[str]:
    parts, waiting, seen = [], "", 0
    for piece in pieces:
        waiting += piece
        begin = 0
        while (end := chunker.find(waiting, begin, seen)) is not None:
            parts.append(waiting[begin:end])
            begin = end
        waiting = waiting[begin:]
        seen = len(waiting)
    return [*parts, waiting] if waiting else parts


MIXED = st.text(
    st.sampled_from("aZsSéſKı 1½.'\n\r\t日\u00a0\u180e\u3099!\x1c\x85lLvVrReE_"), max_size=80
)


@given(MIXED)
@example("".join(f"a{chr(c)}b {chr(c)} '{chr(c)}x\n" for c in range(0x3000)))
@pytest.mark.parametrize("rule", range(1 + len(_KNOWN_RULES)))
def test_the_words_of_known_rules_are_the_librarys(rule: int, text: str) -> None:
    """GPT-2's, Llama 3's and Qwen2's rules, applied in Python, give the library's ids."""
    tokenizer, library = _OTHERS[rule]
    ids = np.frombuffer(tokenizer.encode_part(text), np.int32)
    assert ids.tolist() == library.encode(text, add_special_tokens=False).ids


def _with_rule(rule: str | None) -> tuple[Tokenizer, Any]:
    state = gpt2_like().to_state()
    if rule is not None:
        cut = {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}
        last = {**state["tokenizer"]["pre_tokenizer"], "use_regex": False}
        state["tokenizer"]["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [cut, last]}
    return ForeignTokenizer.from_state(state), TokenizerFile(state["tokenizer"]).build()


_OTHERS = [_with_rule(rule) for rule in (None, *sorted(_KNOWN_RULES))]


def test_a_text_without_a_word_boundary(tmp_path: Path) -> None:
    """A million consecutive letters: mygpt's rule limits a run, and so can split there."""
    text = "a" * 300_000
    file = lines_of(tmp_path / "x.jsonl", [text])
    made = build_with([file], tmp_path / "s", tokenizer=OURS, shard_tokens=1000)
    assert len(made.shards) > 2
    np.testing.assert_array_equal(made.tokens[:], reference_ids(OURS, [text]))


def test_later_text_can_change_more_than_the_last_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A line end joins the white space before it, which would otherwise be two words."""
    monkeypatch.setattr(encoding, "_SLACK", 1279)
    text = "a" * 1024 + "\n" * 10 + "\t" * 246 + "\n" + "x" * 3000
    parts = _chunks(Chunker(OURS, 1), [text])
    assert len(parts) > 2
    split = WordSplitter().split
    assert [word for part in parts for word in split(part)] == split(text)


# --- resuming ------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def test_a_build_stopped_after_every_job_gives_the_same_store(small: Path, tmp_path: Path) -> None:
    """It is stopped once at each job and then continued; the files are the same."""
    out, starts = tmp_path / "again", 0
    file = str(tmp_path / "x.jsonl")

    def stop(progress: StoreProgress) -> None:
        if progress.committed > seen:
            raise Stopped

    while starts < 50:
        seen = sum(
            json.loads((out / "index.json").read_text())["tokens"] for _ in range(starts > 0)
        )
        try:
            build_with([file], out, tokenizer=OURS, shard_tokens=500, progress=stop)
            break
        except Stopped:
            starts += 1
    assert starts >= 3
    assert bytes_of(out) == bytes_of(small)


def test_a_killed_process_leaves_the_committed_shards(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between writing a shard and the index: the shard is built once more, none is duplicated."""
    out, file = tmp_path / "again", str(tmp_path / "x.jsonl")
    real, calls = building.write_durably, []

    def dying(path: Path, *args: Any, **options: Any) -> None:
        real(path, *args, **options)
        calls.append(path)
        if len(calls) == 4:  # the tokenizer, a shard's two files, the next one's first
            raise Stopped

    monkeypatch.setattr(building, "write_durably", dying)
    with pytest.raises(Stopped):
        build_with([file], out, tokenizer=OURS, shard_tokens=500)
    monkeypatch.undo()
    assert (out / "shards" / "000001.tokens").exists()
    assert len(json.loads((out / "index.json").read_text())["shards"]) == 1
    build_with([file], out, tokenizer=OURS, shard_tokens=500)
    assert bytes_of(out) == bytes_of(small)


def test_a_resumed_build_uses_the_trained_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = lines_of(tmp_path / "x.jsonl")

    def stop(progress: StoreProgress) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        build_with([file], tmp_path / "s", tokenizer="bpe:300", shard_tokens=500, progress=stop)
    monkeypatch.setattr(building, "make_tokenizer", None)
    made = build_with([file], tmp_path / "s", tokenizer="bpe:300", shard_tokens=500)
    assert made.tokenizer.vocab_size == 300
    np.testing.assert_array_equal(made.tokens[:], reference_ids(made.tokenizer))


def test_another_request_is_refused(small: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "x.jsonl")
    other = lines_of(tmp_path / "other.jsonl", ["other"])
    same: dict[str, Any] = {"tokenizer": OURS, "shard_tokens": 500}
    before = bytes_of(small)
    for files, changed, message in (
        ([other], {}, "other sources"),
        ([file, other], {}, "other sources"),
        ([file], {"tokenizer": "byte"}, "tokenizer"),
        ([file], {"shard_tokens": 501}, "shard_tokens"),
        ([file], {"encoding": "latin-1"}, "encoding"),
        ([file], {"records": RecordOptions("body")}, "field"),
    ):
        with pytest.raises(InputError, match=message):
            build_with(files, small, **same | changed)
    os.utime(file, ns=(0, 0))
    with pytest.raises(InputError, match="has changed since"):
        build_with([file], small, **same)
    assert bytes_of(small) == before
    replaced = build_with([other], small, **same, overwrite=True)
    assert replaced.num_documents == 1
    assert len(list((small / "shards").iterdir())) == 2


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    file = lines_of(tmp_path / "x.jsonl")

    def change(progress: StoreProgress) -> None:
        with open(file, "a") as text:
            text.write('{"text": "more"}\n')

    with pytest.raises(InputError, match="changed while it was read"):
        build_with([file], tmp_path / "s", tokenizer=OURS, shard_tokens=500, progress=change)


def test_a_folder_with_other_files_is_not_overwritten(tmp_path: Path) -> None:
    file = lines_of(tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="contains other files"):
        build_with([file], tmp_path, tokenizer="byte")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="give another --out"):
        build_with([file], tmp_path / "file", tokenizer="byte")
    assert sorted(os.listdir(tmp_path)) == ["file", "x.jsonl"]


def test_a_store_whose_lock_is_a_link_is_refused_with_the_link(tmp_path: Path) -> None:
    """The error once said that another process was writing, which was wrong."""
    file = lines_of(tmp_path / "x.jsonl")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        build_with([file], tmp_path / "s", tokenizer="byte")
    assert not os.path.lexists(tmp_path / "elsewhere")


def test_only_one_process_can_write_a_store(small: Path, tmp_path: Path) -> None:
    with RunLock(small), pytest.raises(InputError, match="is in use by process"):
        build_with([str(tmp_path / "x.jsonl")], small, tokenizer=OURS, shard_tokens=500)


def test_a_worker_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mygpt import processes
    from mygpt.errors import MygptError

    monkeypatch.setattr(processes, "_PROGRAM", "import sys, json; {0!r}; sys.exit(7)")
    file = lines_of(tmp_path / "x.jsonl")
    with pytest.raises(MygptError, match="ended with code 7"):
        build_with([file], tmp_path / "s", tokenizer=OURS, workers=1)


def test_the_error_for_text_that_cannot_be_encoded_names_the_file(tmp_path: Path) -> None:
    file = lines_of(tmp_path / "x.jsonl")
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"x\.jsonl: characters that are not in"):
            build_with([file], tmp_path / "s", tokenizer=CharTokenizer("ab"), workers=workers)


def test_large_vocabularies_have_32_bit_shards(tmp_path: Path) -> None:
    """More than 65,536 ids need 32 bits."""
    tokenizer = CharTokenizer([chr(0x10000 + n) for n in range(70_000)])
    text = "".join(chr(0x10000 + n) for n in range(0, 70_000, 7))
    file = lines_of(tmp_path / "x.jsonl", [text])
    made = build_with([file], tmp_path / "s", tokenizer=tokenizer, shard_tokens=3000)
    assert made.tokens.dtype == np.int32
    np.testing.assert_array_equal(made.tokens[:], reference_ids(tokenizer, [text]))
    assert isinstance(made.tokens, StoredTokens)


@pytest.mark.processes
def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    """A store of a thousand shards once kept a file open for each, and failed during training."""
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh\n" * 40_000)
    store = build_with([text], tmp_path / "store", tokenizer="byte", shard_tokens=1000)
    code = (
        "import resource, sys, numpy as np\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (290, 290))\n"
        "from mygpt.data import TokenStore\n"
        "tokens = TokenStore.open(sys.argv[1]).tokens\n"
        "for start in range(0, len(tokens) - 8, 700):\n"
        "    tokens.cut(np.array([start]), 8)\n"
    )
    assert len(store.shards) > 300
    done = subprocess.run([sys.executable, "-c", code, str(store.path)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-500:]


def test_a_folder_of_text_is_read_without_stores_in_it(tmp_path: Path) -> None:
    """A store's index was once read as text when its parent folder was named."""
    (tmp_path / "poem.txt").write_text("One poem alone.")
    build_with([tmp_path / "poem.txt"], tmp_path / "store", tokenizer="byte")
    names = [document.name for document in read_corpus([str(tmp_path)]).documents]
    assert names == [str(tmp_path / "poem.txt")]


@pytest.mark.parametrize("name", ["index.json", "tokenizer.json", "shards", "shards/000000.tokens"])
def test_a_link_inside_a_store_is_refused_with_its_name(tmp_path: Path, name: str) -> None:
    """`tokenize` once wrote through links in a store from an archive."""
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh\n" * 100)
    store = tmp_path / "store"
    build_with([text], store, tokenizer="byte")
    victim = tmp_path / "victim"
    (store / name).rename(victim)
    (store / name).symlink_to(victim)
    before = victim.read_bytes() if victim.is_file() else sorted(victim.iterdir())
    with pytest.raises(CheckpointError, match=f"{name} is a symbolic link"):
        TokenStore.open(store).tokens[:]
    with contextlib.suppress(InputError):  # the link itself may be replaced
        build_with([text], store, tokenizer="byte", overwrite=True)
    assert (victim.read_bytes() if victim.is_file() else sorted(victim.iterdir())) == before


def test_a_build_stops_if_its_folder_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, store, moved = tmp_path / "text.txt", tmp_path / "store", tmp_path / "moved"
    text.write_text("abcdefgh\n" * 1000)
    inner = building._Building._add

    def rename(self: Any, *how: Any) -> None:
        inner(self, *how)
        if store.exists():
            store.rename(moved)
            store.mkdir()

    with monkeypatch.context() as patch:
        patch.setattr(building._Building, "_add", rename)
        with pytest.raises(StorageError, match=r"store was renamed to .*moved"):
            build_with([text], store, tokenizer="byte", shard_tokens=1000)
    assert os.listdir(store) == []
    assert build_with([text], moved, tokenizer="byte", shard_tokens=1000).num_documents


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no modes of files")
def test_the_files_of_a_private_store_are_private_whatever_the_umask(tmp_path: Path) -> None:
    """Stores in the cache are private; else another user could change the tokens."""
    text, store = tmp_path / "text.txt", tmp_path / "store"
    text.write_text("abcdefgh\n" * 100)
    store.mkdir(0o700)
    before = os.umask(0)
    try:
        build_with([text], store, tokenizer="byte")
    finally:
        os.umask(before)
    modes = {path.lstat().st_mode & 0o777 for path in store.rglob("*") if path.is_file()}
    assert (modes, (store / "shards").stat().st_mode & 0o777) == ({0o600}, 0o700)
