"""Tokenizers: the tutorial's figures, round trips, incremental decoding, and refusals."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mygpt import ByteTokenizer, CharTokenizer
from mygpt.errors import InputError, UnknownTokenError
from mygpt.tokenization import END_OF_TEXT, from_state

BYTES = ByteTokenizer()
TUTORIAL_TEXT = "I love AI ! I love AI !"
texts = st.text(max_size=30)  # any characters but surrogates


def decoded_one_by_one(tokenizer, ids) -> str:
    decoder = tokenizer.decoder()
    return "".join([decoder.push(i) for i in ids]) + decoder.finish()


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
    with pytest.raises(
        UnknownTokenError,
        match=r" 'é' '\u0301' '\\u202e' \(U\+00E9 U\+0301 U\+202E; first at position 0\)",
    ):
        tokenizer.encode("\u202eaé\u0301")
    with pytest.raises(UnknownTokenError, match="and 80 more"):
        tokenizer.encode("".join(map(chr, range(200, 300))))


# --- round trips ---------------------------------------------------------------------------


@given(texts, st.booleans())
@example("\x00\r\n\r", True)
@example("é\u0301 e\u0301 \U0001f600\u200d", False)
@example(END_OF_TEXT, True)
def test_char_round_trip(text, end):
    """Any characters, without normalisation, by `decode` and by the incremental decoder."""
    if not text:
        text = "\0"
    tokenizer = CharTokenizer.from_text(text, end_of_text=end)
    ids = tokenizer.encode_array(text)
    assert ids.dtype == np.int64
    assert ids.tolist() == [sorted(set(text)).index(char) for char in text]
    assert tokenizer.encode(text).tolist() == ids.tolist()
    assert tokenizer.decode(ids) == text
    assert decoded_one_by_one(tokenizer, ids.tolist()) == text
    assert tokenizer.vocab_size == len(set(text)) + end
    assert tokenizer.end_of_text == (len(set(text)) if end else None)


def test_ids_are_positions_in_any_order_of_characters():
    """A vocabulary in a file need not be sorted."""
    tokenizer = CharTokenizer("c😀a\n")
    assert tokenizer.encode_array("a\nc😀ca").tolist() == [2, 3, 0, 1, 0, 2]
    assert tokenizer.decode([2, 3, 0, 1]) == "a\nc😀"


@given(texts)
@example(END_OF_TEXT)
@example("\ufeff\ufffd\x00")
def test_byte_round_trip(text):
    ids = BYTES.encode_array(text)
    assert ids.dtype == np.int64
    assert ids.tolist() == list(text.encode())
    assert BYTES.encode(text).tolist() == ids.tolist()
    assert BYTES.encode_array(text.encode()).tolist() == ids.tolist()
    assert BYTES.decode(ids) == text
    assert decoded_one_by_one(BYTES, ids.tolist()) == text


@given(st.lists(st.integers(0, 256), max_size=20))
@example([0xE2, 0x82, 256, 0xAC])
@example([0xF0, 0x9F, 65, 0x80])
def test_decoding_one_id_at_a_time_equals_decoding_at_once_for_any_bytes(ids):
    """Invalid UTF-8 becomes U+FFFD as in Python; end-of-text ends an incomplete character."""
    parts = [[]]
    for i in ids:
        parts.append([]) if i == 256 else parts[-1].append(i)
    expected = END_OF_TEXT.join(bytes(part).decode("utf-8", "replace") for part in parts)
    assert BYTES.decode(ids) == expected
    assert decoded_one_by_one(BYTES, ids) == expected


@given(st.text(min_size=1, max_size=8))
def test_a_byte_decoder_emits_complete_characters(text):
    """Nothing before a character's last byte, and then the character."""
    decoder = BYTES.decoder()
    for char in text:
        *first, last = char.encode()
        assert [decoder.push(byte) for byte in first] == [""] * len(first)
        assert decoder.push(last) == char
    assert decoder.finish() == ""


# --- pieces --------------------------------------------------------------------------------


@given(st.lists(texts, min_size=1))
def test_ids_do_not_depend_on_how_a_text_is_split_into_pieces(pieces):
    """Wherever the text is split."""
    whole = "".join(pieces)
    for tokenizer in (BYTES, CharTokenizer.from_text(whole + "a")):
        rows = list(tokenizer.encode_pieces(pieces))
        assert all(row.dtype == np.int64 for row in rows)
        assert np.concatenate(rows).tolist() == tokenizer.encode_array(whole).tolist()


@given(st.lists(texts), st.integers(0, 5), st.sampled_from("\ud800\udfff"))
def test_errors_do_not_depend_on_how_a_text_is_split_into_pieces(pieces, number, surrogate):
    """Positions count from the text's beginning; unknown characters of all pieces are listed."""
    known = CharTokenizer("ab01é")
    pieces = [*pieces, "é\u2603b"]
    wrong = [*pieces[:number], f"b{surrogate}", *pieces[number:]]
    for tokenizer, parts in ((known, pieces), (known, wrong), (BYTES, wrong)):
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
    """It decodes to <|endoftext|>; text that contains that is encoded as text."""
    chars = CharTokenizer.from_text(END_OF_TEXT, end_of_text=True)
    for tokenizer, end in ((BYTES, 256), (chars, len(set(END_OF_TEXT)))):
        assert tokenizer.end_of_text == end
        assert tokenizer.vocab_size == end + 1
        spelled = tokenizer.encode(END_OF_TEXT).tolist()
        assert end not in spelled
        assert len(spelled) == len(END_OF_TEXT)
        assert tokenizer.decode([*spelled, end]) == END_OF_TEXT * 2
        assert tokenizer.token_text(end) == END_OF_TEXT


def test_tokens_as_text_for_display():
    assert [BYTES.token_text(i) for i in (65, 10, 127, 128, 255)] == [
        "A",
        "\n",
        "\x7f",
        r"\x80",
        r"\xff",
    ]
    assert CharTokenizer("aé").token_text(1) == "é"


@pytest.mark.parametrize("tokenizer", [BYTES, CharTokenizer("aé€😀", end_of_text=True)], ids="bc")
def test_byte_lengths_add_up_to_the_texts_length(tokenizer):
    """Bits per byte are computed with them; end-of-text has no bytes."""
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths.dtype == np.int64
    assert lengths[tokenizer.end_of_text] == 0
    text = "a😀é€a"
    assert lengths[tokenizer.encode_array(text)].sum() == len(text.encode())
    assert CharTokenizer("aé").byte_lengths().tolist() == [1, 2]


# --- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [BYTES, CharTokenizer("abc")], ids="bc")
@pytest.mark.parametrize("surrogate", [0xD800, 0xDCFF, 0xDFFF])
def test_lone_surrogates_are_refused_with_their_position(tokenizer, surrogate):
    with pytest.raises(InputError, match=f"U\\+{surrogate:04X} at position 2"):
        tokenizer.encode(f"ab{chr(surrogate)}c")


def test_a_vocabulary_of_a_text_with_a_lone_surrogate_is_refused():
    """The error names the position in the text."""
    with pytest.raises(InputError, match=r"U\+DC80 at position 5"):
        CharTokenizer.from_text("aaaaa\udc80")


@pytest.mark.parametrize("tokenizer", [BYTES, CharTokenizer("abc")], ids="bc")
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


@pytest.mark.parametrize("ids", [[0.0], [True], ["a"], [[0, 1]], torch.tensor(1), [2**70], None, 1])
def test_ids_that_are_not_a_sequence_of_integers_are_refused(ids):
    for tokenizer in (BYTES, CharTokenizer("abc")):
        with pytest.raises(InputError, match="sequence of integers"):
            tokenizer.decode(ids)


@pytest.mark.parametrize("text", [None, 3, ["a"]])
def test_encoding_a_value_that_is_not_text_is_refused(text):
    for tokenizer in (BYTES, CharTokenizer("abc")):
        with pytest.raises(InputError, match="needs text, a string, not"):
            tokenizer.encode(text)


@pytest.mark.parametrize("ids", [[], (), iter([]), torch.tensor([], dtype=torch.int64)])
def test_an_empty_sequence_of_ids_decodes_to_the_empty_text(ids):
    assert BYTES.decode(ids) == ""
    assert BYTES.encode("").tolist() == []
    assert CharTokenizer("a").encode("").dtype == torch.int64


def test_ids_may_come_from_a_generator():
    assert CharTokenizer("abc").decode(i for i in (2, 0, 1)) == "cab"


@pytest.mark.parametrize("chars", ["", "aba", ["ab"], ["a", ""], ["a", 1], ["a", None], "a\ud800"])
def test_invalid_vocabularies_are_refused(chars):
    with pytest.raises(InputError, match=r"at least one character|single characters|surrogate"):
        CharTokenizer(chars)


def test_a_character_tokenizer_refuses_bytes():
    with pytest.raises(InputError, match="needs text"):
        CharTokenizer("abc").encode_array(b"abc")


# --- files and states ----------------------------------------------------------------------


@pytest.mark.parametrize("end", [False, True])
def test_a_saved_tokenizer_is_loaded_unchanged(tmp_path, end):
    """With non-ASCII characters, quotes and control characters."""
    path = tmp_path / "t.json"
    tokenizer = CharTokenizer.from_text('ab"\\\n\x00é😀', end_of_text=end)
    tokenizer.save(path)
    loaded = CharTokenizer.load(str(path))
    assert (loaded.chars, loaded.end_of_text) == (tokenizer.chars, tokenizer.end_of_text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "is not a tokenizer's JSON"),
        (b"{chars", "is not a tokenizer's JSON"),
        (b"\xff\xfe{}", "is not a tokenizer's JSON"),
        (b"[1, 2]", "it is not a JSON object"),
        (b"{}", 'needs "chars"'),
        (b'{"chars": "abc"}', 'needs "chars"'),
        (b'{"chars": ["a", "a"]}', "distinct single characters"),
        (b'{"chars": ["ab"]}', "distinct single characters"),
        (b'{"chars": []}', "at least one character"),
    ],
)
def test_files_that_are_not_a_tokenizers_are_refused(tmp_path, content, message):
    """Whatever they contain, with an `InputError` that names the file."""
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        CharTokenizer.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "tokenizer", [BYTES, CharTokenizer("ba\n"), CharTokenizer("é", end_of_text=True)], ids="bce"
)
def test_a_state_survives_json(tokenizer):
    again = from_state(json.loads(json.dumps(tokenizer.to_state())))
    assert type(again) is type(tokenizer)
    assert again.to_state() == tokenizer.to_state()
    assert again.vocab_size == tokenizer.vocab_size
    assert again.end_of_text == tokenizer.end_of_text


@pytest.mark.parametrize("kind", ["morse", None, 3, ["char"], {}])
def test_states_of_unknown_kind_are_refused(kind):
    with pytest.raises(InputError, match=r"is not known .known: char, byte.*upgrade mygpt"):
        from_state({"kind": kind})


def test_incomplete_states_are_refused():
    with pytest.raises(InputError, match="chars"):
        from_state({"kind": "char"})
