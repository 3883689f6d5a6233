"""Baselines: n-gram models against a slow implementation, compressors against their tools."""

from __future__ import annotations

import gzip
import importlib.util
import lzma
import math
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mygpt.errors import InputError
from mygpt.evaluation import baselines, ngram
from mygpt.evaluation.baselines import (
    Baselines,
    gzip_bits_per_byte,
    measure_baselines,
    ppmd_bits_per_byte,
    xz_bits_per_byte,
    zstd_bits_per_byte,
)
from mygpt.evaluation.ngram import Floats, Ints, ngram_losses, uniform_loss, unigram_loss
from mygpt.text import Document, read_corpus, split_documents
from mygpt.text.documents import TextSize
from mygpt.tokenization import ByteTokenizer

HAS_XZ = importlib.util.find_spec("_lzma") is not None


def slow_probability(train: list[int], context: list[int], token: int, size: int, n: int) -> float:
    """Interpolated modified Kneser-Ney with dictionaries, as in Chen & Goodman (1998)."""

    def grams(k: int) -> list[tuple[int, ...]]:
        row = [-1] * (k - 1) + train  # -1: before the beginning of the text
        return [tuple(row[i : i + k]) for i in range(len(train))]

    def probability(k: int, top: bool) -> float:
        if k == 0:
            return 1 / size
        counts = Counter(grams(k)) if top else Counter(gram[1:] for gram in set(grams(k + 1)))
        n1, n2, n3, n4 = (sum(c == i for c in counts.values()) for i in (1, 2, 3, 4))
        discount = [0.0, 0.5, 0.5, 0.5]
        if n1 and n2:
            y = n1 / (n1 + 2 * n2)
            discount[1] = 1 - 2 * y * n2 / n1
            discount[2] = 2 - 3 * y * n3 / n2
            discount[3] = 3 - 4 * y * n4 / n3 if n3 else 0.5
        discount = [min(max(d, 0.05 * i), 0.95 * i) for i, d in enumerate(discount)]
        history = tuple(context[len(context) - k + 1 :])
        after = defaultdict(int, {g[-1]: c for g, c in counts.items() if g[:-1] == history})
        lower = probability(k - 1, top=False)
        if not after:
            return lower
        freed = sum(discount[min(c, 3)] for c in after.values())
        return (after[token] - discount[min(after[token], 3)] + freed * lower) / sum(after.values())

    return probability(n, top=True)


def ngram_probabilities(train: Ints, test: Ints, vocab_size: int, order: int) -> Floats:
    """The probability of each token of `test` after the tokens before it."""
    grams = ngram.grams_of(train, test, vocab_size, order)
    return ngram.probabilities_of(grams, len(train), vocab_size, order)


@given(st.lists(st.integers(0, 3), max_size=40), st.data(), st.integers(1, 5))
def test_probabilities_agree_with_the_slow_implementation(
    train: list[int], data: st.DataObject, order: int
) -> None:
    context = data.draw(st.lists(st.integers(0, 4), min_size=5, max_size=5))
    for token in range(5):
        # The context is a part of the test text, so that it can be any.
        fast = ngram_probabilities(np.array(train, int), np.array([*context, token]), 5, order)[-1]
        assert fast == pytest.approx(slow_probability(train, context, token, 5, order), rel=1e-12)


@pytest.mark.parametrize(("size", "tokens"), [(7, 300), (65, 5000), (2**17, 3000)])
@pytest.mark.parametrize("order", [1, 2, 5])
def test_probabilities_sum_to_one(size: int, tokens: int, order: int) -> None:
    """Over a small vocabulary; of a large one over tokens that occur, and one for all others."""
    generator = np.random.default_rng(order)
    train = (size * generator.random(tokens) ** 6).astype(np.int64)
    train[tokens // 2 :] = train[: len(train) - tokens // 2]  # so that long contexts occur again
    tried = np.arange(size) if size < 100 else np.unique(train)
    unseen = size - len(tried)
    if unseen:
        tried = np.append(tried, np.setdiff1d(np.arange(size), tried)[0])
    for context in (train[50:54], train[51:55], np.array([1, 0, 5, 6]), np.array([6, 6, 6, 6])):
        rows = np.concatenate([np.tile(context, (len(tried), 1)), tried[:, None]], axis=1)
        probs = ngram_probabilities(train, rows.ravel(), size, order)[4::5]
        weights = np.ones(len(tried))
        if unseen:
            weights[-1] = unseen
        assert (probs > 0).all()
        assert probs @ weights == pytest.approx(1, abs=1e-9)


def test_discounts_are_always_above_zero() -> None:
    """With few twos and many threes the formula gives -3; unseen tokens would be impossible."""
    discounts = ngram.discounts_of(np.array([1, 2, 3, 3, 3, 3, 3]))
    assert (discounts > 0).tolist() == [False, True, True, True]
    assert (discounts <= 0.95 * np.arange(4)).all()


def test_keys_too_wide_for_one_word_get_the_same_ids() -> None:
    """N-grams of a vocabulary so large that a key and an index do not fit 64 bits together."""
    keys = (np.random.default_rng(0).random(3000) ** 3 * 50).astype(np.int64) * 2**56
    assert int(keys.max()).bit_length() + len(keys).bit_length() > 63
    _, firsts, ids = np.unique(keys, return_index=True, return_inverse=True)
    found_ids, num_ids, found_firsts = ngram._unique_ids(keys)
    assert num_ids == len(firsts)
    assert (found_firsts == firsts).all()
    assert (found_ids == ids).all()


def test_baselines_by_hand() -> None:
    assert uniform_loss(4) == pytest.approx(1.386294, abs=1e-6)
    train, test = np.array([0, 0, 0, 1]), np.array([0, 1, 2])
    # counts + 1 = 4, 2, 1 of 7
    expected = -(math.log(4 / 7) + math.log(2 / 7) + math.log(1 / 7)) / 3
    assert unigram_loss(train, test, 3) == pytest.approx(expected)
    assert ngram_losses(train, test, 3, [1]) == [unigram_loss(train, test, 3)]
    with pytest.raises(InputError, match="at least one token"):
        ngram_losses(train, test[:0], 3, [2])
    with pytest.raises(InputError, match="of at least 1"):
        ngram_losses(train, test, 3, [0])


def test_without_a_training_text_predictions_are_uniform() -> None:
    test = np.arange(10, dtype=np.uint16)
    empty = np.zeros(0, np.uint16)
    assert ngram_losses(empty, test, 10, [1, 2, 5]) == pytest.approx([math.log(10)] * 3)


def test_long_texts_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the end of the training text and the beginning of the test text, which are adjacent."""
    row = np.random.default_rng(0).integers(0, 9, 1000)
    train, test = row[:800], row[800:]
    expected = ngram_losses(train[-300:], test[:50], 9, [1, 3])
    other = ngram_losses(train[:300], test[:50], 9, [1, 3])
    monkeypatch.setattr(ngram, "MOST_TRAIN_TOKENS", 300)
    monkeypatch.setattr(ngram, "MOST_TEST_TOKENS", 50)
    assert ngram_losses(train, test, 9, [1, 3]) == expected != other


def test_tiny_shakespeare(shakespeare: Path) -> None:
    """Losses that other runs are compared with; the last tenth of the text is not read."""
    text = shakespeare.read_bytes()
    ids = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)[1]
    began = time.monotonic()
    train, test = ids[: int(len(ids) * 0.81)], ids[int(len(ids) * 0.81) : int(len(ids) * 0.9)]
    losses = ngram_losses(train, test, 65, [1, 2, 5])
    assert losses == pytest.approx([3.3082, 2.4958, 1.5273], abs=0.002)
    assert time.monotonic() - began < 10  # 0.6 s on an idle machine


def test_sizes_are_those_of_the_compression_tools() -> None:
    text = b"It was the best of times, it was the worst of times. " * 20
    assert gzip_bits_per_byte(text) == len(gzip.compress(text, 9)) * 8 / len(text)
    if HAS_XZ:
        size = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
        assert xz_bits_per_byte(text) == size * 8 / len(text)


@pytest.mark.parametrize(
    "bits_per_byte", [xz_bits_per_byte, zstd_bits_per_byte, ppmd_bits_per_byte]
)
def test_a_text_that_repeats_the_text_before_it_adds_almost_nothing(bits_per_byte: Any) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 20_000, np.uint8).tobytes()
    alone, again = bits_per_byte(noise), bits_per_byte(noise, before=noise)
    if alone is None:
        pytest.skip("this compressor is not installed")
    assert alone > 8
    assert abs(again) < 0.2


def test_zstd_gives_its_librarys_size() -> None:
    zstandard = pytest.importorskip("zstandard")  # Python 3.14 has a module of its own
    compress, text = baselines._zstd(), b"to be or not to be" * 99
    assert compress is not None
    assert zstd_bits_per_byte(text) == len(compress(text)) * 8 / len(text)
    assert zstandard.ZstdDecompressor().decompress(compress(text)) == text


def test_ppmd_gives_its_librarys_size() -> None:
    """And a second text is compressed better after a first one of its kind."""
    pyppmd = pytest.importorskip("pyppmd")
    text = "".join(f"{n} times {n} is {n * n}. " for n in range(300)).encode()
    size = len(baselines._ppmd(text))
    assert ppmd_bits_per_byte(text) == size * 8 / len(text)
    decoder = pyppmd.Ppmd8Decoder(16, 2**26, 0)
    assert bytes(decoder.decode(baselines._ppmd(text), len(text))) == text
    after = ppmd_bits_per_byte(text[2000:], text[:2000])
    assert after is not None
    assert after < size * 8 / len(text)


def test_a_python_without_lzma_has_no_xz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "find_spec", lambda name: None)  # zstd is not found either
    document = Document("", "abcabcabc")
    ids = ByteTokenizer().encode_array("abcabcabc")
    rows = measure_baselines(
        ids, ids, 257, test_documents=[document], predicted=TextSize(1, 1)
    ).rows()
    assert not {"xz -9e", "zstd -19", "PPMd -o16"} & {row.name for row in rows}


def test_zstd_and_ppmd_are_computed_where_there_is_time() -> None:
    """In a run of half a minute they took a tenth of the time."""
    document, ids = Document("", "abcabcabc"), ByteTokenizer().encode_array("abcabcabc")
    how = {"test_documents": [document], "predicted": TextSize(1, 1)}
    hurried = measure_baselines(ids, ids, 257, others_s=0.0, **how)
    assert (hurried.zstd, hurried.ppmd) == (None, None)
    assert hurried.xz is not None
    unhurried = measure_baselines(ids, ids, 257, others_s=60.0, **how)
    assert (unhurried.zstd is None) == (baselines.zstd_bits_per_byte(b"a") is None)
    assert (unhurried.ppmd is None) == (importlib.util.find_spec("pyppmd") is None)


@given(st.lists(st.text("aé日🙂", max_size=5), max_size=5), st.integers(0, 20))
def test_first_and_last_bytes_of_documents(texts: list[str], most: int) -> None:
    """A document may be a part of a longer string, and a cut may split a character."""
    documents = [Document("", f"<{text}>", 1, len(text) + 1) for text in texts]
    whole = "".join(texts).encode()
    assert baselines.first_bytes(documents, most) == whole[:most]
    assert baselines.last_bytes(documents, most) == whole[max(0, len(whole) - most) :]


@pytest.fixture(scope="module")
def measured() -> Baselines:
    parts = split_documents(read_corpus().documents, 0.1)
    tokenizer = ByteTokenizer()
    text = [b"".join(str(document.text).encode() for document in part) for part in parts]
    train, test = (tokenizer.encode_array(part) for part in text)
    return measure_baselines(
        train, test, 257, train_documents=parts[0], test_documents=parts[1],
        predicted=TextSize(len(test), len(test)),
    )  # fmt: skip


@pytest.mark.slow
def test_rows_are_sorted_from_worst_to_best(measured: Baselines) -> None:
    rows = measured.rows()
    names = [row.name for row in rows]
    always = [name for name in names if name not in ("xz -9e", "zstd -19", "PPMd -o16")]
    assert always == ["uniform", "unigram", "bigram", "gzip -9", "5-gram"]
    bits = [row.bits_per_byte for row in rows]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] == pytest.approx(math.log2(257))  # a byte is a token here
    for row in rows:
        compressor = row.name in ("gzip -9", "xz -9e", "zstd -19", "PPMd -o16")
        assert (row.loss is None) == compressor
        if row.loss is not None:
            assert row.bits_per_byte == pytest.approx(row.loss / math.log(2))
    assert measured.bounds == ""


def test_sizes_and_units_of_a_text_of_two_byte_characters() -> None:
    """Tokens have two characters; a text of bytes has no number of characters."""
    how = {"test_documents": [Document("", "éè" * 50)], "predicted": TextSize(50, 200)}
    tokens = np.zeros(50, np.uint16)
    measured = measure_baselines(tokens[:0], tokens, 4, **how)
    assert (measured.tokens, measured.num_bytes, measured.num_chars) == (50, 200, 100)
    assert measured.bits_per_byte(math.log(4)) == pytest.approx(50 * 2 / 200)
    assert [row.name for row in measured.rows() if row.loss is not None] == ["uniform"]
    assert measured.fivegram is None
    as_bytes = {**how, "test_documents": [Document("", b"\xff\xfe")]}
    assert measure_baselines(tokens[:0], tokens, 4, **as_bytes).num_chars is None
    with pytest.raises(InputError, match="at least one"):
        measure_baselines(tokens, tokens[:0], 4, **how)


def test_bounds_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "MOST_TRAIN_TOKENS", 5)
    monkeypatch.setattr(ngram, "MOST_TEST_TOKENS", 4)
    monkeypatch.setattr(baselines, "MOST_XZ_BYTES", 3)
    ids, documents = np.zeros(10, np.uint16), [Document("", "abcdefghij")]
    found = measure_baselines(ids, ids, 4, test_documents=documents, predicted=TextSize(9, 9))
    assert found.bounds == (
        "n-grams of the last 5 tokens, scored on the first 4 tokens, "
        "xz, zstd and PPMd on the first 3 bytes"
    )
