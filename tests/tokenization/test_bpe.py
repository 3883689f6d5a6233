"""BPE: splitting into words in Python gives the library's ids; round trips, pieces, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bpe_samples import BPE, END, TEXT, ids_of, texts
from mygpt.errors import InputError
from mygpt.tokenization import END_OF_TEXT, BPETokenizer, bpe, words


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    BPE.save(path)
    return path


@pytest.fixture(scope="module")
def library(saved):
    """The reference: the library's own pipeline on the file that mygpt writes."""
    judge = tokenizers.Tokenizer.from_file(str(saved))
    judge.encode_special_tokens = True
    return judge


@pytest.fixture(scope="module")
def fast(saved):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(saved), clean_up_tokenization_spaces=False)


# --- the library's ids ---------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=250)
@given(st.lists(texts, min_size=8, max_size=8))
@example(
    [
        "a" * 600 + " " * 600 + "b" + "\n" * 600 + "-" * 600 + "\r\n" * 300,
        " " * 300 + "\n" + " " * 256 + "x" + " " * 257 + "\n",
        "'" + "a" * 256 + "'s" + " " + "b" * 257,
        "x!" + "\n" * 257 + "y  \n  z \n\n w",
        "",
    ]
)
def test_ids_are_those_of_the_library_and_of_transformers(library, fast, many):
    """Words are found by Python's `re`: it must split where the library's own rule splits.

    2,000 texts; and they decode to the text, there and here.
    """
    ours = [BPE.encode_array(text) for text in many]
    assert all(ids.dtype == np.int64 for ids in ours)
    ids = [row.tolist() for row in ours]
    assert ids == [found.ids for found in library.encode_batch(many)]
    assert ids == fast(many, split_special_tokens=True)["input_ids"]
    assert [BPE.decode(row) for row in ids] == many
    assert library.decode_batch(ids, skip_special_tokens=False) == many
    assert not any(END in row for row in ids)


@pytest.mark.slow
def test_every_character_has_the_same_class_as_in_the_library(library):
    """All of Unicode, whatever the version of Python's tables: each before and after a letter."""
    points = [p for p in range(0x110000) if not 0xD800 <= p <= 0xDFFF]
    for start in range(0, len(points), 2**14):
        block = points[start : start + 2**14]
        if not 0x3400 < block[0] < 0xD000 and block[0] < 0x20000:  # the rest is much the same
            text = "".join(f"a{chr(point)}b {chr(point)}" for point in block)
            found = library.pre_tokenizer.pre_tokenize_str(text)
            ours = words.WordSplitter().split(text)
            assert ours == [text[begin:end] for _, (begin, end) in found]


def test_training_gives_the_merges_of_the_librarys_own_trainer(library):
    """On words split by the library; only the order of ids differs."""
    judge = tokenizers.Tokenizer(tokenizers.models.BPE())  # no added token: it would be a word
    judge.pre_tokenizer = library.pre_tokenizer
    judge.train_from_iterator(
        [TEXT],
        tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            min_frequency=2,
            show_progress=False,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    ours, theirs = (json.loads(made.to_str())["model"] for made in (library, judge))
    assert ours["merges"] == theirs["merges"]
    assert set(ours["vocab"]) == set(theirs["vocab"])
    assert len(ours["merges"]) > 100


# --- pieces --------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", " ", "\n", "-", "1", "é", "'s"]), st.integers(1, 700)),
        max_size=6,
    ),
    st.integers(200, 900),
)
@example([(" ", 300), ("\n", 1)], 300)
@example([("a", 1), (" ", 256), ("x", 3)], 257)
def test_long_runs_are_split_the_same_in_any_pieces(runs, block):
    """The word that a run of spaces is in depends on a newline long after it."""
    whole = "".join(text * count for text, count in runs)
    with pytest.MonkeyPatch.context() as patch:
        expected = BPE.encode_array(whole).tolist()
        patch.setattr(words, "_BLOCK", block)
        assert ids_of(BPE, [whole[:50], whole[50:]]) == expected


def test_an_endless_word_takes_little_time_and_memory():
    """Runs are limited in length, so that no text is a single word."""
    text = "ab" * 200_000
    rows = list(BPE.encode_pieces([text]))
    assert max(map(len, rows)) < 2**17
    assert BPE.decode(np.concatenate(rows)) == text
    assert BPETokenizer.train([text], 300).decode([ord("a")]) == "a"


def test_the_cache_of_words_is_bounded(monkeypatch):
    monkeypatch.setattr(bpe, "_MOST_WORDS", 3)
    small = BPETokenizer(BPE.to_state()["tokenizer"])
    assert small.encode_array(TEXT).tolist() == BPE.encode_array(TEXT).tolist()
    assert len(small.encoder._words) <= 3


# --- decoding ------------------------------------------------------------------------------


@given(st.lists(st.integers(0, BPE.vocab_size - 1), max_size=24))
@example([0xE2, 0x82, END, 0xAC])
@example([0xF0, 0x9F, 65, 0x80])
def test_decoding_one_id_at_a_time_equals_decoding_at_once(library, ids):
    """For any ids: invalid bytes become U+FFFD as in the library."""
    decoder = BPE.decoder()
    expected = library.decode(ids, skip_special_tokens=False)
    assert BPE.decode(ids) == expected
    assert "".join([decoder.push(i) for i in ids]) + decoder.finish() == expected


# --- training ------------------------------------------------------------------------------


def test_a_short_text_gives_a_smaller_vocabulary():
    """All bytes and end-of-text are always in it."""
    for text, most in (("", 257), ("abab", 258), ("one", 257)):
        tokenizer = BPETokenizer.train([text] if text else [], 1000)
        assert 257 <= tokenizer.vocab_size <= most
        assert tokenizer.decode(tokenizer.encode_array(TEXT)) == TEXT
    assert BPETokenizer.train([TEXT], 257).to_state() == BPETokenizer.train([], 257).to_state()


def test_the_same_text_gives_the_same_tokenizer_in_any_pieces():
    for size in (1, 7, 1000):
        pieces = [TEXT[start : start + size] for start in range(0, len(TEXT), size)]
        assert BPETokenizer.train(pieces, 400).to_state() == BPE.to_state()


@pytest.mark.processes
def test_the_same_text_gives_the_same_tokenizer_on_any_threads():
    """Ties between pairs are broken by the pairs, not by the order of threads."""
    script = (
        "import sys, hashlib, json\n"
        "from mygpt.tokenization import BPETokenizer\n"
        "text = sys.stdin.buffer.read().decode()\n"
        "state = json.dumps(BPETokenizer.train([text], 2000).to_state())\n"
        "print(hashlib.sha256(state.encode()).hexdigest())"
    )
    text = "".join(f"{n * n % 977:x} {n * 7919 % 1009} " for n in range(40_000)).encode()
    digests = set()
    for threads in ("1", "4"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        done = subprocess.run(
            [sys.executable, "-c", script], input=text, capture_output=True, env=environment
        )
        assert done.stderr == b""
        digests.add(done.stdout)
    assert len(digests) == 1


def test_training_on_a_long_text_uses_evenly_spaced_blocks(monkeypatch):
    """Memory is bounded, and the end of the text counts as much as its beginning."""
    monkeypatch.setattr(words, "_BLOCK", 100)
    monkeypatch.setattr(bpe, "_MOST_BLOCKS", 8)
    blocks = [f"{n:03}" * 33 + "\n" for n in range(30)]
    kept = list(bpe._sample(["".join(blocks[:17]), "".join(blocks[17:])]))
    assert [int(block.replace(" ", "")[:3]) for block in kept] == [0, 4, 8, 12, 16, 20, 24, 28]


@pytest.mark.parametrize("size", [256, 0, -1, 2**20 + 1, 1000.0, "1000", None, True])
def test_invalid_vocabulary_sizes_are_refused(size):
    with pytest.raises(InputError, match=r"integer from 257 .* to 1,048,576"):
        BPETokenizer.train([TEXT], size)
