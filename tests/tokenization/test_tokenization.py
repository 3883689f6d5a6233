"""Tokenizers: the tutorial's figures, round trips, incremental decoding, and refusals."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from bpe_samples import BPE, ids_of, texts
from mygpt import BPETokenizer, ByteTokenizer, CharTokenizer
from mygpt.errors import InputError, StorageError, UnknownTokenError
from mygpt.tokenization import END_OF_TEXT, from_state, load_tokenizer, words

BYTES = ByteTokenizer()
TUTORIAL_TEXT = "I love AI ! I love AI !"

# --- the tutorial's figures ----------------------------------------------------------------


def test_experiment_34_char_tokenizer():
    tokenizer = CharTokenizer.from_text(TUTORIAL_TEXT)
    assert tokenizer.vocab_size == 8
    assert tokenizer.chars == [" ", "!", "A", "I", "e", "l", "o", "v"]
    assert tokenizer.stoi == {char: i for i, char in enumerate(" !AIelov")}
    assert tokenizer.itos == dict(enumerate(" !AIelov"))
    ids = tokenizer.encode(TUTORIAL_TEXT)
    assert ids.dtype == torch.int64
    assert ids.ndim == 1
    assert ids[:12].tolist() == [3, 0, 5, 6, 7, 4, 0, 2, 3, 0, 1, 0]
    assert tokenizer.decode(ids) == TUTORIAL_TEXT
    assert tokenizer.end_of_text is None


def test_the_saved_file_is_byte_for_byte_the_tutorials(tmp_path):
    path = tmp_path / "tokenizer.json"
    CharTokenizer.from_text("I love AI !").save(path)
    assert path.read_bytes() == b'{"chars": [" ", "!", "A", "I", "e", "l", "o", "v"]}'
    loaded = CharTokenizer.load(path)
    assert loaded.chars == [" ", "!", "A", "I", "e", "l", "o", "v"]
    assert loaded.end_of_text is None


def test_unknown_characters_raise_an_error():
    """A KeyError as in the tutorial; it lists each of them once, and the position of the first."""
    tokenizer = CharTokenizer.from_text("abc")
    with pytest.raises(KeyError) as caught:
        tokenizer.encode("abzcqz\n")
    assert isinstance(caught.value, UnknownTokenError)
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert r"vocabulary of 3: '\n' 'q' 'z' (first at position 2)" in message
    with pytest.raises(UnknownTokenError, match="vocabulary of 4: 'q'"):  # as models state it
        CharTokenizer("abc", end_of_text=True).encode("q")
    with pytest.raises(
        UnknownTokenError,
        match=r" 'é' '\u0301' '\\u202e' \(U\+00E9 U\+0301 U\+202E; first at position 0\)",
    ):
        tokenizer.encode("\u202eaé\u0301")
    with pytest.raises(UnknownTokenError, match="and 80 more"):
        tokenizer.encode("".join(map(chr, range(200, 300))))


# --- round trips ---------------------------------------------------------------------------


def all_for(text):
    """A tokenizer of each kind that mygpt trains, all of which know the text."""
    chars = text or "\0"
    return (
        BYTES,
        BPE,
        CharTokenizer.from_text(chars),
        CharTokenizer.from_text(chars, end_of_text=True),
    )


@given(texts)
@example("\x00\r\n\r\ufeff\ufffd")
@example("é\u0301 e\u0301 \U0001f600\u200d")
@example(END_OF_TEXT)
def test_every_text_round_trips(text):
    """Without normalisation; the incremental decoder emits complete characters only."""
    for tokenizer in all_for(text):
        ids = tokenizer.encode_array(text)
        assert ids.dtype == np.int64
        assert tokenizer.encode(text).tolist() == ids.tolist()
        assert tokenizer.end_of_text not in ids.tolist()
        assert tokenizer.decode(ids) == text
        decoder, shown = tokenizer.decoder(), ""
        for i in ids.tolist():
            shown += decoder.push(i)
            assert text.startswith(shown)
        assert decoder.finish() == ""
        assert shown == text
        lengths = tokenizer.byte_lengths()
        assert (lengths.shape, lengths.dtype) == ((tokenizer.vocab_size,), np.int64)
        assert lengths[ids].sum() == len(text.encode())


@given(texts, st.booleans())
def test_ids_of_characters_and_bytes(text, end):
    """A vocabulary in a file need not be sorted: ids are positions."""
    assert BYTES.encode_array(text).tolist() == list(text.encode())
    assert BYTES.encode_array(text.encode()).tolist() == list(text.encode())
    chars = sorted(set(text or "\0"))
    tokenizer = CharTokenizer.from_text(text or "\0", end_of_text=end)
    assert tokenizer.encode_array(text).tolist() == [chars.index(char) for char in text]
    assert tokenizer.vocab_size == len(chars) + end
    assert tokenizer.end_of_text == (len(chars) if end else None)
    tokenizer = CharTokenizer("c😀a\n")
    assert tokenizer.encode_array("a\nc😀ca").tolist() == [2, 3, 0, 1, 0, 2]
    assert tokenizer.decode([2, 3, 0, 1]) == "a\nc😀"


# --- pieces --------------------------------------------------------------------------------


@given(st.lists(texts, max_size=6), st.integers(1, 40))
def test_ids_do_not_depend_on_how_a_text_is_split_into_pieces(pieces, block):
    """Wherever a text is split, within words or between them; small blocks give many boundaries."""
    whole = "".join(pieces)
    for tokenizer in all_for(whole):
        expected = tokenizer.encode_array(whole).tolist()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(words, "_BLOCK", block)
            assert ids_of(tokenizer, pieces) == expected
            assert ids_of(tokenizer, list(whole)) == expected
        assert all(row.dtype == np.int64 for row in tokenizer.encode_pieces(pieces))


@given(st.lists(texts), st.integers(0, 5), st.sampled_from("\ud800\udfff"))
def test_errors_do_not_depend_on_how_a_text_is_split_into_pieces(pieces, number, surrogate):
    """Positions count from the text's beginning; unknown characters of all pieces are listed."""
    known = CharTokenizer("ab01é")
    pieces = [*pieces, "é\u2603b"]
    wrong = [*pieces[:number], f"b{surrogate}", *pieces[number:]]
    for tokenizer, parts in ((known, pieces), (known, wrong), (BYTES, wrong), (BPE, wrong)):
        with pytest.raises(InputError) as whole:
            tokenizer.encode_array("".join(parts))
        with pytest.raises(InputError) as cut:
            list(tokenizer.encode_pieces(iter(parts)))
        if "surrogate" in str(whole.value) and "surrogate" not in str(cut.value):
            continue  # an unknown character of an earlier piece comes first
        assert str(cut.value) == str(whole.value)


@pytest.mark.parametrize("tokenizer", [BYTES, CharTokenizer("ab🙂")], ids="bc")
def test_encoding_a_long_text_takes_little_memory(tokenizer):
    """The ids, 8 bytes each, and a few copies of one piece, not of the whole text."""
    length = 2**23
    text = "ab" * (length // 2)
    tokenizer.encode_array("a")
    tracemalloc.start()
    try:
        ids = tokenizer.encode_array(text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(ids) == length
    assert ids[-4:].tolist() == tokenizer.encode_array("abab").tolist()
    assert peak < 8 * length + 32 * 2**20


# --- end of text ---------------------------------------------------------------------------


def test_end_of_text_has_a_separate_id():
    """It decodes to <|endoftext|>; text that contains that is encoded as text.

    However often a BPE's training text contains it, and with any vocabulary.
    """
    spelled = f"a {END_OF_TEXT}{END_OF_TEXT} b"
    chars = CharTokenizer.from_text(spelled, end_of_text=True)
    for tokenizer in (BYTES, chars, BPE, BPETokenizer.train([END_OF_TEXT * 1000], 400)):
        end = tokenizer.end_of_text
        ids = tokenizer.encode(spelled).tolist()
        assert end not in ids
        assert tokenizer.decode(ids) == spelled
        assert tokenizer.decode([*ids, end]) == spelled + END_OF_TEXT
        assert tokenizer.token_text(end) == END_OF_TEXT
        assert tokenizer.byte_lengths()[end] == 0


def test_tokens_as_text_for_display():
    """A BPE's first ids are the bytes, as in the byte tokenizer."""
    for tokenizer in (BYTES, BPE):
        shown = [tokenizer.token_text(i) for i in (65, 10, 127, 128, 255)]
        assert shown == ["A", "\n", "\x7f", r"\x80", r"\xff"]
    assert CharTokenizer("aé").token_text(1) == "é"
    assert " quick" in [BPE.token_text(i) for i in range(257, 400)]


# --- refusals ------------------------------------------------------------------------------

KINDS = [BYTES, CharTokenizer("abc"), BPE]
each = pytest.mark.parametrize("tokenizer", KINDS, ids=lambda tokenizer: tokenizer.kind)


@each
@pytest.mark.parametrize("surrogate", [0xD800, 0xDCFF, 0xDFFF])
def test_lone_surrogates_are_refused_with_their_position(tokenizer, surrogate):
    with pytest.raises(InputError, match=f"U\\+{surrogate:04X} at position 2"):
        tokenizer.encode(f"ab{chr(surrogate)}c")
    for use in (
        CharTokenizer.from_text,
        lambda text: BPETokenizer.train(list(text), 300),
    ):
        with pytest.raises(InputError, match=f"U\\+{surrogate:04X} at position 5"):
            use(f"aaaaa{chr(surrogate)}")


@each
def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    """With id, position and range, for any sequence; a negative id does not count from the end."""
    most = tokenizer.vocab_size - 1
    for wrong in (-1, most + 1, 2**40):
        for ids in ([0, 0, wrong], np.array([0, 0, wrong]), torch.tensor([0, 0, wrong])):
            message = f"id {wrong} at position 2 .* from 0 to {most}"
            with pytest.raises(InputError, match=message):
                tokenizer.decode(ids)
        with pytest.raises(InputError, match=f"id {wrong} "):
            tokenizer.token_text(wrong)


@each
@pytest.mark.parametrize("ids", [[0.0], [True], ["a"], [[0, 1]], torch.tensor(1), [2**70], None, 1])
def test_ids_that_are_not_a_sequence_of_integers_are_refused(tokenizer, ids):
    with pytest.raises(InputError, match="sequence of integers"):
        tokenizer.decode(ids)


@each
@pytest.mark.parametrize("text", [None, 3, ["a"], b"abc"])
def test_encoding_a_value_that_is_not_text_is_refused(tokenizer, text):
    """Except bytes by the byte tokenizer."""
    if tokenizer is not BYTES or not isinstance(text, bytes):
        with pytest.raises(InputError, match="needs text, a string, not"):
            tokenizer.encode(text)


@each
def test_empty_texts_and_any_sequences_of_ids(tokenizer):
    for ids in ([], (), iter([]), torch.tensor([], dtype=torch.int64)):
        assert tokenizer.decode(ids) == ""
    assert tokenizer.encode("").dtype == torch.int64
    assert tokenizer.encode("").tolist() == []
    assert tokenizer.decode(i for i in (2, 0)) == tokenizer.decode([2, 0])


@pytest.mark.parametrize("chars", ["", "aba", ["ab"], ["a", ""], ["a", 1], ["a", None], "a\ud800"])
def test_invalid_vocabularies_are_refused(chars):
    with pytest.raises(InputError, match=r"at least one character|single characters|surrogate"):
        CharTokenizer(chars)


# --- files and states ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "is not a tokenizer's JSON"),
        (b"{chars", "is not a tokenizer's JSON"),
        (b"\xff\xfe{}", "is not a tokenizer's JSON"),
        (b"[" * 100_000, "is not a tokenizer's JSON"),
        (b"[1, 2]", "it is not a JSON object"),
        (b"{}", '"chars"'),
        (b'{"model": 3}', '"chars"|incomplete'),
        (b'{"chars": "abc"}', 'needs "chars"'),
        (b'{"chars": ["a", "a"]}', "distinct single characters"),
        (b'{"chars": ["ab"]}', "distinct single characters"),
        (b'{"chars": []}', "at least one character"),
    ],
)
def test_files_that_are_not_a_tokenizers_are_refused(tmp_path, content, message):
    """Whatever they contain, with an `InputError` of one line that names the file."""
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    for load in (CharTokenizer.load, load_tokenizer):
        with pytest.raises(InputError, match=message) as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tokenizer",
    [
        BYTES, BPE, CharTokenizer("ba\n"), CharTokenizer('"\\\n\x00é😀', end_of_text=True),
    ],
    ids=["byte", "bpe", "char", "char with an end"],
)  # fmt: skip
def test_a_tokenizer_survives_its_state_and_its_file(tmp_path, tokenizer):
    """The file is recognised by its content, not by its name; bytes have none."""
    again = [from_state(json.loads(json.dumps(tokenizer.to_state())))]
    if tokenizer is not BYTES:
        tokenizer.save(tmp_path / "any name")
        again += [
            load(str(tmp_path / "any name")) for load in (type(tokenizer).load, load_tokenizer)
        ]
        with pytest.raises(StorageError, match="cannot write"):
            tokenizer.save(tmp_path / "no" / "folder")
    for found in again:
        assert type(found) is type(tokenizer)
        assert found.to_state() == tokenizer.to_state()
        assert (found.vocab_size, found.end_of_text) == (
            tokenizer.vocab_size,
            tokenizer.end_of_text,
        )
        assert found.encode_array("\n").tolist() == tokenizer.encode_array("\n").tolist()


@pytest.mark.parametrize("kind", ["morse", None, 3, ["char"], {}])
def test_states_of_unknown_kind_are_refused(kind):
    with pytest.raises(InputError, match=r"is not known .known: char, byte.*upgrade mygpt"):
        from_state({"kind": kind})
    with pytest.raises(InputError, match="chars"):
        from_state({"kind": "char"})
