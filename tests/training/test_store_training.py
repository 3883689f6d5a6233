"""Training from a token store: as from a text in memory, without loading the store into memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mygpt
from mygpt import training
from mygpt.cli import main
from mygpt.core.data import ShuffledWindows
from mygpt.data import StoredTokens, TokenStore, encode_documents, store_cache
from mygpt.data import building as storing
from mygpt.data.store_index import Index, Shard, SourceState
from mygpt.errors import InputError
from mygpt.text import Document, as_bytes
from mygpt.tokenization import BPETokenizer, ByteTokenizer, CharTokenizer
from mygpt.training import corpus, lifecycle, planning
from mygpt.training.config import TrainConfig
from mygpt.training.corpus import read_source
from mygpt.training.events import StepDone
from mygpt.training.progress import TrainingBatches
from training_runs import prepared

QUIET = [].append  # a listener that shows nothing
CPU = torch.device("cpu")
WORDS = ("the", "of", "and", "a", "to", "in", "is", "was", "he", "for", "it", "with", "as")
ALPHABET = CharTokenizer(sorted("abcdefghijklmnopqrstuvwxyz .\n"), end_of_text=True)
TINY = {"embed_dim": 16, "num_heads": 2, "num_layers": 1, "seq_len": 16, "batch_size": 4}
SMALL = {**TINY, "preset": "nano", "max_seq_len": 16, "steps": 12, "eval_every": 4}


def prose(length, seed=0):
    """Text of `length` characters."""
    draw = np.random.default_rng(seed)
    words = draw.choice(WORDS, length // 2)
    return (" ".join(words.tolist()) + ".\n" + "a" * length)[:length]


def write_store(folder, texts, tokenizer=ALPHABET, shard_tokens=3000):
    """A store of texts, one document each: the reference implementation of `mygpt tokenize`."""
    rows = [encode_documents([Document("", text)], tokenizer) for text in texts]
    starts = np.cumsum([0, *map(len, rows)])[:-1]
    ids = np.concatenate(rows)
    (folder / "shards").mkdir(parents=True)
    state = json.dumps(tokenizer.to_state()).encode()
    (folder / "tokenizer.json").write_bytes(state)
    shards, num_bytes = [], sum(len(as_bytes(text)) for text in texts)
    for number, begin in enumerate(range(0, len(ids), shard_tokens)):
        row = ids[begin : begin + shard_tokens]
        here = (starts[(starts >= begin) & (starts < begin + len(row))] - begin).astype("<i8")
        digests = []
        for suffix, part in (("tokens", row), ("documents", here)):
            data = part.astype(part.dtype.newbyteorder("<")).tobytes()
            (folder / "shards" / f"{number:06d}.{suffix}").write_bytes(data)
            digests.append(hashlib.sha256(data).hexdigest())
        shards.append(Shard(len(row), len(here), 0 if number else num_bytes, *digests))
    sources = (SourceState("test", 1, 1, len(texts), 0, True),)
    Index(
        name=folder.name, finished=True, asked="char", tokenizer=hashlib.sha256(state).hexdigest(),
        dtype=str(ids.dtype), shard_tokens=shard_tokens, field="text", encoding=None,
        sources=sources, shards=tuple(shards),
    ).write(folder)  # fmt: skip
    return ids


@pytest.fixture(scope="module")
def texts():
    """Two documents, of which the second is a tenth of the text."""
    return [prose(18_000, 1), prose(2_000, 2)]


@pytest.fixture(scope="module")
def store(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("stores") / "prose"
    write_store(folder, texts)
    return folder


@pytest.fixture
def plain(tmp_path, texts):
    """A folder with the same documents as files, and the tokenizer's file."""
    for name, text in zip(("a.txt", "b.txt"), texts, strict=True):
        (tmp_path / name).write_text(text)
    (tmp_path / "tokenizer").write_text(json.dumps(ALPHABET.to_state()))
    return tmp_path


def command(*arguments):
    """The exit code of `mygpt`."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def fit(files, run, **options):
    """A small run; its events."""
    events = []
    training.train(files, output=run, **{**SMALL, "listener": events.append, **options})
    return events


def losses(run):
    """Everything in a run's log but the times and the samples' copied passages."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    ignored = ("elapsed_s", "copied")
    return [{k: v for k, v in record.items() if k not in ignored} for record in records]


# --- windows -------------------------------------------------------------------------------


def test_windows_of_a_store_are_those_of_the_text_in_memory(store, texts):
    """The order depends on (seed, epoch) only, not on where the tokens are stored."""
    ids = encode_documents([Document("", text) for text in texts], ALPHABET)
    tokens = TokenStore.open(store).tokens
    assert len(tokens) == len(ids) > 6 * 3000
    for seq_len, batch_size, seed in ((16, 4, 0), (64, 33, 7), (5000, 3, 1)):
        stored, memory = (ShuffledWindows(row, seq_len, seed) for row in (tokens, ids))
        for step in (0, 1, 2, 17, 400, 10**6):
            batch = stored.batch(step, batch_size)
            assert batch.dtype == np.int64
            assert batch.shape == (batch_size, seq_len + 1)
            np.testing.assert_array_equal(batch, memory.batch(step, batch_size))


def config_of(**options):
    return TrainConfig(**{"batch_size": 6, "seq_len": 8, "lr": 1e-3, "steps": 10, **options})


def test_batches_of_every_stage_are_those_of_the_text_in_memory(store, texts):
    ids = encode_documents([Document("", text) for text in texts], ALPHABET)
    config = config_of(stages=((0.5, 40, 3), (0.8, 200, 2)), seed=3)
    both = [TrainingBatches(row, config, CPU) for row in (TokenStore.open(store).tokens, ids)]
    for stage in range(3):
        for number in range(50):
            one, other = (torch.stack(batches.batch(stage, number)) for batches in both)
            assert torch.equal(one, other)
            assert both[0].starts() == both[1].starts()
    assert both[0].first_window().tolist() == both[1].first_window().tolist()


@pytest.mark.slow
@settings(max_examples=40)
@given(
    batch_size=st.integers(1, 13),
    seq_len=st.integers(1, 30),
    seed=st.integers(0, 2**64 - 1),
    stage=st.integers(0, 1),
    number=st.integers(0, 2000),
    processes=st.integers(1, 5),
)
def test_the_batches_of_all_processes_are_that_of_one_process(
    batch_size, seq_len, seed, stage, number, processes
):
    """The concatenated rows of all ranks are the whole batch, in order, for any number of ranks."""
    config = config_of(
        batch_size=batch_size, seq_len=seq_len, seed=seed, stages=((0.5, 2 * seq_len, 5),)
    )
    tokens = np.arange(900)
    whole = TrainingBatches(tokens, config, CPU)
    inputs, targets = whole.batch(stage, number)
    feeds = [
        TrainingBatches(tokens, config, CPU, share=(rank, processes)) for rank in range(processes)
    ]
    parts = [feed.batch(stage, number) for feed in feeds]
    assert torch.equal(torch.cat([part[0] for part in parts]), inputs)
    assert torch.equal(torch.cat([part[1] for part in parts]), targets)
    assert max(len(part[0]) for part in parts) - min(len(part[0]) for part in parts) <= 1
    assert all(feed.starts() == whole.starts() for feed in feeds)


def test_a_process_reads_only_its_rows(store, monkeypatch):
    tokens = TokenStore.open(store).tokens
    read = []
    cut = StoredTokens.cut

    def counting(self, starts, length):
        read.append(len(starts))
        return cut(self, starts, length)

    monkeypatch.setattr(StoredTokens, "cut", counting)
    TrainingBatches(tokens, config_of(), CPU, share=(1, 3)).batch(0, 0)
    assert read == [2]


def test_the_tutorials_order_needs_a_text_in_memory(store):
    config = config_of(data_order="tutorial")
    with pytest.raises(InputError, match="needs all tokens in memory"):
        TrainingBatches(TokenStore.open(store).tokens, config, CPU)


# --- runs ----------------------------------------------------------------------------------


def test_a_run_on_a_store_equals_the_run_on_the_text(plain):
    """Bitwise equal losses, samples and bits per character, with the same split and order."""
    text = prose(20_005)  # a tenth of its characters and a tenth of its tokens are as many
    write_store(plain / "store", [text])
    (plain / "all.txt").write_text(text)
    received = [
        fit(plain / "store", plain / "stored"),
        fit(plain / "all.txt", plain / "read", tokenizer=str(plain / "tokenizer")),
    ]
    assert losses(plain / "stored") == losses(plain / "read")
    assert any("val_bits_per_char" in record for record in losses(plain / "stored"))
    ends = [events[-1] for events in received]
    assert ends[0].baselines.fivegram == ends[1].baselines.fivegram
    assert ends[0].baselines.rows()[0] == ends[1].baselines.rows()[0]
    assert ends[0].unigram == ends[1].unigram


def test_a_run_on_a_store_can_be_validated_on_a_text_or_another_store(store, plain, texts):
    write_store(plain / "validation", texts[1:])
    write_store(plain / "train", texts[:1])
    fit(plain / "train", plain / "by-text", val_file=plain / "b.txt")
    fit(plain / "train", plain / "by-store", val_file=plain / "validation")
    tokenizer = str(plain / "tokenizer")
    fit(plain / "a.txt", plain / "read", val_file=plain / "b.txt", tokenizer=tokenizer)
    assert losses(plain / "by-text") == losses(plain / "read")
    assert losses(plain / "by-store") == losses(plain / "read")
    training.resume(plain / "by-store", steps=14, listener=QUIET)


@pytest.mark.kernels
def test_the_default_recipe_trains_on_a_store(store, tmp_path, capsys):
    assert command("train", store, "--tokens", "20000", "-o", tmp_path / "run") == 0
    shown = capsys.readouterr().out
    assert "prose: 18,001 tokens + 2,001 for validation" in shown
    assert "copied" not in shown  # the text of a store cannot be searched
    assert "5-gram" in shown
    assert command("train", store, "--tokens", "20000", "--dry-run") == 0
    assert "expected validation loss" in capsys.readouterr().out


def weights_of(run):
    return mygpt.load_checkpoint(run / "last.safetensors")[0].state_dict()


def test_a_run_on_a_store_resumes_and_is_reproduced_bitwise(store, tmp_path):
    """Interrupted and resumed, or replayed, it has the weights of the uninterrupted run."""

    def interrupt(event):
        if isinstance(event, StepDone) and event.step == 5:
            signal.raise_signal(signal.SIGINT)

    fit(store, tmp_path / "whole", print_every=1)
    with pytest.raises(KeyboardInterrupt):
        fit(store, tmp_path / "parts", print_every=1, listener=interrupt)
    training.resume(tmp_path / "parts", listener=QUIET)
    training.replay(tmp_path / "whole", output=tmp_path / "again", listener=QUIET)
    whole = weights_of(tmp_path / "whole")
    for name in ("parts", "again"):
        other = weights_of(tmp_path / name)
        assert all(torch.equal(whole[part], other[part]) for part in whole)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_run_is_not_resumed_on_a_changed_store(store, tmp_path, texts):
    write_store(tmp_path / "text", texts)
    quiet = {"listener": QUIET}
    fit(tmp_path / "text", tmp_path / "run")
    os.rename(tmp_path / "text", tmp_path / "elsewhere")
    training.resume(tmp_path / "run", [tmp_path / "elsewhere"], steps=13, **quiet)
    write_store(tmp_path / "other", texts[::-1])
    with pytest.raises(InputError, match="has changed since the run began"):
        training.resume(tmp_path / "run", [tmp_path / "other"], steps=14, **quiet)


@pytest.mark.parametrize(
    ("name", "tokenizer", "validation", "counted"),
    [
        ("bytes", ByteTokenizer(), "plain text " * 90, True),
        ("no-text", ByteTokenizer(), b"\xff\xfe\x80" * 300, False),
        ("bpe", BPETokenizer.train([prose(5000)], 290), prose(1000), True),
    ],
)
def test_bits_per_character_are_known_if_tokens_are_text(
    tmp_path, name, tokenizer, validation, counted
):
    write_store(tmp_path / name, [prose(9000), validation], tokenizer)
    fit(tmp_path / name, tmp_path / "run")
    last = [record for record in losses(tmp_path / "run") if "val_loss" in record][-1]
    assert (last["val_bits_per_char"] is not None) == counted
    if counted:
        assert last["val_bits_per_char"] == pytest.approx(last["val_bits_per_byte"])


# --- the split, and baselines ----------------------------------------------------------------


def source_of(folder, val_fraction=0.1):
    settings = {"files": [str(folder)], "val_file": None, "encoding": None}
    return read_source(settings, val_fraction, allow_bytes=False)


def test_the_split_of_a_store_is_at_a_documents_start(tmp_path):
    """If one is within a hundredth of the tokens; else inside a document, as in memory."""
    ids = write_store(tmp_path / "near", ["a" * 17_930, "b" * 60, "c" * 2010])
    train, validation = source_of(tmp_path / "near").encode(ALPHABET)
    assert validation[:2].tolist() == [ALPHABET.end_of_text, *ALPHABET.encode("c").tolist()]
    assert len(train) + len(validation) == len(ids)
    write_store(tmp_path / "far", ["a" * 17_000, "b" * 3000])
    train, validation = source_of(tmp_path / "far").encode(ALPHABET)
    assert len(train) == int(20_002 * 0.9)
    assert validation[:1].tolist() == ALPHABET.encode("b").tolist()
    assert [len(part) for part in source_of(tmp_path / "far", 0.0).encode(ALPHABET)] == [20_002, 0]


@pytest.mark.kernels
def test_baselines_and_validation_use_a_part_of_a_huge_store(store, tmp_path, monkeypatch, capsys):
    """What would need a pass over the store uses its first tokens, with a note."""
    monkeypatch.setattr(corpus, "MOST_COUNTED", 4096)
    monkeypatch.setattr(planning, "_MOST_VAL_TOKENS", 512)
    assert command("train", store, "--tokens", "30000", "-o", tmp_path / "run") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "those of the first 4,096 of 20,002" in shown
    assert "validated on the first 512 of the 2,001 validation tokens" in shown
    for asked, used in ((700, 700), (0, 512)):
        ready = prepared(str(store), output=tmp_path / "new", **SMALL, val_tokens=asked)
        assert ready.start.config.val_tokens == used


@pytest.mark.kernels
def test_a_store_is_not_loaded_into_memory(tmp_path, monkeypatch):
    """Of a store of 2.4 MB, at most 100 kB are read at once.

    The limits of the statistics, which do not depend on the store's size, are reduced to that.
    """
    write_store(tmp_path / "large", [prose(600_000, n) for n in (1, 2)], shard_tokens=400_000)
    most = 50_000  # tokens
    monkeypatch.setattr(corpus, "MOST_COUNTED", most)
    for module, name in (
        (planning, "_MOST_VAL_TOKENS"),
        (lifecycle, "MOST_TRAIN_TOKENS"),
        (lifecycle, "MOST_TOKENS"),
    ):
        monkeypatch.setattr(module, name, most)
    monkeypatch.setattr(lifecycle, "MOST_BEFORE_BYTES", most)
    read = []
    whole, cut = StoredTokens.__getitem__, StoredTokens.cut

    def slicing(self, key):
        found = whole(self, key)
        read.append(len(found))
        return found

    def cutting(self, starts, length):
        read.append(len(starts) * length)
        return cut(self, starts, length)

    monkeypatch.setattr(StoredTokens, "__getitem__", slicing)
    monkeypatch.setattr(StoredTokens, "cut", cutting)
    for refused in ("__array__", "__iter__"):
        monkeypatch.setattr(StoredTokens, refused, None, raising=False)
    mygpt.train(tmp_path / "large", output=tmp_path / "run", listener=QUIET, tokens=9_000, seed=1)
    training.resume(tmp_path / "run", tokens=12_000, listener=QUIET)
    assert max(read) <= most + 1


# --- wrong input -----------------------------------------------------------------------------


def refusal(arguments, capsys):
    """The one-line error of a wrong command."""
    assert command("train", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def test_stores_and_options_that_do_not_fit_are_refused(store, plain, capsys):
    other = CharTokenizer(sorted(set(prose(100)) | {"#"}), end_of_text=True)
    write_store(plain / "other", [prose(1000)], other)
    write_store(plain / "short", [""])
    write_store(plain / "cut", [prose(5000)])
    shard = plain / "cut" / "shards" / "000001.tokens"
    shard.write_bytes(shard.read_bytes()[:-1])
    for arguments, said in (
        ([store, "--tokenizer", "byte"], "remove --tokenizer"),
        ([store, "--encoding", "latin-1"], "remove --encoding"),
        ([store, plain / "a.txt"], "is a token store and 1 more was named"),
        ([plain / "a.txt", store], "is a token store and 1 more was named"),
        ([store, "--preset", "tutorial"], "order of data needs all"),
        ([plain / "a.txt", "--val-file", store], "is a token store and a is not"),
        ([store, "--val-file", plain / "other"], "was tokenized in another way"),
        ([plain / "short"], "has 1 token: too short"),
        ([plain / "cut"], "is damaged"),
    ):
        assert said in refusal(arguments, capsys)
    assert not (plain / "runs").exists()


def test_a_model_is_fine_tuned_only_on_a_store_with_its_tokenizer(store, tmp_path, capsys):
    fit(store, tmp_path / "first")
    options = {"init_from": tmp_path / "first", "steps": 2, "listener": QUIET}
    training.train(store, output=tmp_path / "second", **options)
    write_store(tmp_path / "bytes", [prose(1000)], ByteTokenizer())
    error = refusal([tmp_path / "bytes", "--from", tmp_path / "first"], capsys)
    assert "in another way than the model that --from names" in error


# --- plain files past a threshold --------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A separate cache for the test; text of more than 10 kB is tokenized into a store."""
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MYGPT_STORE_ABOVE", "10000")
    monkeypatch.delenv("MYGPT_TOKEN_CACHE", raising=False)
    monkeypatch.setattr(store_cache, "_in_use", {})
    return tmp_path / "cache" / "stores"


@pytest.fixture
def built(monkeypatch):
    """A list of the stores that were built, not found in the cache."""
    made = []
    build = storing.build_store

    def counting(files, out, *options, **more):
        made.append(out)
        return build(files, out, *options, **more)

    monkeypatch.setattr(storing, "build_store", counting)
    return made


def test_a_large_text_is_tokenized_into_a_store_once(cache, built, plain):
    """The same command again uses it; the losses are those of an explicit store."""
    events = [event for name in ("one", "two") for event in fit(plain / "a.txt", plain / name)]
    assert len(built) == 1
    said = f"a has 18,000 bytes, so it is not read into memory: tokenized once into {cache}"
    assert said in " ".join(map(str, events))
    write_store(plain / "a", [(plain / "a.txt").read_text()], TokenStore.open(built[0]).tokenizer)
    fit(plain / "a", plain / "three")
    assert losses(plain / "one") == losses(plain / "two") == losses(plain / "three")
    assert "stored_as" in (plain / "one" / "config.toml").read_text()
    fit(plain / "b.txt", plain / "four")
    assert len(built) == 1  # it is below the limit


def test_a_run_resumes_on_the_cached_store(cache, built, plain, monkeypatch):
    """Also with another limit, or after the cache was emptied; but not with another text."""
    fit(plain / "a.txt", plain / "run")
    monkeypatch.setenv("MYGPT_STORE_ABOVE", "off")
    training.resume(plain / "run", steps=13, listener=QUIET)
    assert len(built) == 1
    shutil.rmtree(cache)
    store_cache._in_use.clear()
    training.resume(plain / "run", steps=14, listener=QUIET)
    assert len(built) == 2
    os.utime(plain / "a.txt")
    training.resume(plain / "run", steps=15, listener=QUIET)  # the same text, written again
    assert len(built) == 3
    (plain / "a.txt").write_text(prose(18_000, 5))
    with pytest.raises(InputError, match="has changed since the run began"):
        training.resume(plain / "run", steps=16, listener=QUIET)


def test_the_limit_is_an_environment_variable(cache, plain, monkeypatch, capsys):
    names, sources = [str(plain / "a.txt")], store_cache.large_sources
    assert len(sources(names, None)) == 1
    for value, large in (("17999", True), ("18000", False), ("off", False), ("", False)):
        monkeypatch.setenv("MYGPT_STORE_ABOVE", value)
        assert bool(sources(names, None)) == large
    monkeypatch.setattr(store_cache, "free_memory_bytes", lambda: 8 * 17_000)
    assert sources(names, None)  # more than an eighth of the free memory
    monkeypatch.setenv("MYGPT_STORE_ABOVE", "1GB")
    assert "MYGPT_STORE_ABOVE='1GB' must be a number of bytes" in refusal([plain / "a.txt"], capsys)


def test_some_large_texts_are_read_into_memory(cache, plain):
    """Standard input, JSON lines, bytes that are not text, and text for the tutorial's order."""
    (plain / "c.jsonl").write_text('{"text": "a"}\n' * 2000)
    (plain / "d.bin").write_bytes(b"\xff\xfe\0\1" * 5000 + b"\x80")
    for names in (["-"], [plain / "c.jsonl"], [plain / "a.txt", plain / "c.jsonl"]):
        assert not store_cache.large_sources([str(name) for name in names], None)
    assert not store_cache.large_sources([str(plain / "d.bin")], "utf-8")
    ready = prepared(plain / "a.txt", output=plain / "run", preset="tutorial")
    assert isinstance(ready.text.train_tokens, np.ndarray)


@pytest.mark.parametrize("tokenizer", ["auto", "char", "byte", "bpe:290", "file", "from"])
def test_a_large_text_has_the_same_tokenizer_as_a_short_one(cache, plain, tokenizer):
    text, options = plain / "a.txt", {"tokenizer": tokenizer}
    if tokenizer == "file":
        options = {"tokenizer": str(plain / "tokenizer")}
    if tokenizer == "from":
        fit(plain / "b.txt", plain / "first")
        options = {"init_from": plain / "first", "preset": "auto"}
    large = prepared(text, output=plain / "run", tokens=1000, **options)
    assert isinstance(large.text.train_tokens, StoredTokens)
    os.environ["MYGPT_STORE_ABOVE"] = "off"  # the fixture restores it
    short = prepared(text, output=plain / "run", tokens=1000, **options)
    if not tokenizer.startswith("bpe"):  # a store's is also trained on the validation text
        assert large.text.tokenizer.to_state() == short.text.tokenizer.to_state()
    assert large.text.tokenizer.kind == short.text.tokenizer.kind
    again = read_source(large.start.settings, 0.1, allow_bytes=False, known=large.text.tokenizer)
    assert again.sha256 == large.text.source.sha256


def test_a_text_with_many_distinct_characters_has_merges_of_bytes(cache, plain, monkeypatch):
    """A short one has bytes: merges would be of what occurs a few times."""
    (plain / "wide.txt").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 600))) * 10)
    stored = prepared(plain / "wide.txt", output=plain / "run", steps=5).text.tokenizer
    assert (stored.kind, stored.vocab_size) == ("bpe", 1024)
    monkeypatch.setenv("MYGPT_STORE_ABOVE", "off")
    short = prepared(plain / "wide.txt", output=plain / "run", steps=5).text.tokenizer
    assert short.kind == "byte"
    monkeypatch.setattr(corpus, "_LEAST_FOR_MERGES", 5000)
    enough = prepared(plain / "wide.txt", output=plain / "run", steps=5).text.tokenizer
    assert (enough.kind, enough.vocab_size) == ("bpe", 1024)


def test_the_least_recently_used_store_is_removed(cache, plain, monkeypatch):
    """Only if space is needed, and never one that a process uses."""
    for number in range(4):
        (plain / f"{number}.txt").write_text(prose(12_000, number))

    def stores():
        return {path.name for path in cache.iterdir() if path.is_dir()}

    def use(number, *, keep=False):
        before = stores() if cache.exists() else set()
        sources = store_cache.large_sources([str(plain / f"{number}.txt")], None)
        path = store_cache.cached_store(sources, "char").store.path
        if not keep:  # as if the process had ended
            store_cache._in_use.pop(path).release()
        return path.name, stores() - before

    first, second = use(0)[0], use(1)[0]
    third = use(2, keep=True)[0]
    for age, name in ((300, third), (200, second), (100, first)):
        os.utime(cache / f"{name}.lock", (time.time() - age,) * 2)
    monkeypatch.setattr(store_cache, "MOST_BYTES", 4 * 24_000)
    fourth = use(3)[0]
    assert stores() == {first, third, fourth}
    assert use(0) == (first, set())
    monkeypatch.setattr(store_cache, "DISK_KEPT", 1.1)  # the disk never has so much free
    assert use(1)[0] == second
    assert stores() == {second, third}


def test_a_damaged_store_is_rebuilt(cache, built, plain):
    fit(plain / "a.txt", plain / "one")
    (built[0] / "shards" / "000000.tokens").write_bytes(b"short")
    fit(plain / "a.txt", plain / "two")
    assert losses(plain / "one") == losses(plain / "two")
    (built[0] / "index.json").write_bytes(b"{")
    fit(plain / "a.txt", plain / "three")
    assert losses(plain / "one") == losses(plain / "three")


@pytest.mark.processes
def test_several_processes_build_a_store_only_once(cache, plain):
    """As with torchrun: one process builds it, the others wait and use it."""
    program = (
        "import sys; from mygpt.data import store_cache as c; "
        "f = c.cached_store(c.large_sources([sys.argv[1]], None), 'bpe:300'); "
        "print(f.built_s > 0, f.store.sha256)"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(plain / "a.txt")], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    lines = [process.communicate()[0].split() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert sorted(line[0] for line in lines) == ["False", "False", "True"]
    assert len({line[1] for line in lines}) == 1


@pytest.mark.kernels
def test_a_cache_without_disk_space_is_refused_with_a_remedy(cache, plain, monkeypatch, capsys):
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(store_cache.shutil, "disk_usage", lambda _: full)
    assert command("train", plain / "a.txt", "-o", plain / "run") == 3
    assert "MYGPT_CACHE=FOLDER moves the cache" in capsys.readouterr().err
