"""Arbitrary strings through the tokenizers: unchanged, or refused with the characters named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mygpt.errors import InputError, UnknownTokenError
from mygpt.tokenization import END_OF_TEXT, ByteTokenizer, CharTokenizer, Tokenizer
from torture import Tally

BYTES = ByteTokenizer()
# What breaks programs: special tokens, control characters, byte order marks, text direction,
# combining characters, characters that look alike.
TROUBLE = [
    *(END_OF_TEXT, "<|endoftext|", "|>", "<|im_start|>", "<s>", "</s>", "[UNK]", "<pad>", "\u2581"),
    *("\0", "\x1a", "\x1b[2J", "\x7f", "\x85", "\r\n", "\n\r", "\u2028", "\u2029", "\u00ad"),
    *("\ufeff", "\ufffe", "\uffff", "\ufffd", "\U0010ffff", "\u200b", "\u200d", "\u2060"),
    *("\u202e", "\u202d", "\u2066", "\u2069", "\u200f", "\u061c", "\u05d0", "\u0645\u0631"),
    *("e\u0301", "\u00e9", "\u0301", "\ufb01", "\u0130", "\u00df", "\u212b", "\u00c5", "\uac00"),
    *(
        "\U0001f642",
        "\U0001f469\u200d\U0001f4bb",
        "\U0001f1e9\U0001f1ea",
        "\u2764\ufe0f",
        "0\u20e3",
    ),
    *("\\u0041", "%00", "&#0;", "caf\u00c3\u00a9", "\u0430", "a", " ", "\t", "'", '"', "\\"),
]
strings_of_all_kinds = st.lists(
    st.one_of(st.sampled_from(TROUBLE), st.text(max_size=8)), max_size=12
).map("".join)


def strings(count: int, folder: Path) -> Tally:
    """Encode and decode `count` strings: at once, in pieces and id by id; also with a surrogate."""
    tally = Tally("strings that came back unchanged, or were refused with the characters named")

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        text=strings_of_all_kinds,
        place=st.integers(0, 100),
        surrogate=st.sampled_from(["\ud800", "\udbff", "\udc00", "\udfff", "\ud83d\ude42"]),
    )
    def examine(text: str, place: int, surrogate: str) -> None:
        place = min(place, len(text))
        try:
            _check_bytes(text, place)
            _check_characters(text, place)
            _check_unknown_characters(text, place)
            _check_surrogates(text, place, surrogate)
            failure = ""
        except Exception as error:
            failure = f"{text!r}, {place}, {surrogate!r}: {type(error).__name__}: {error}"
        tally.count(not failure, failure)

    examine()
    return tally


def _check_bytes(text: str, place: int) -> None:
    ids = BYTES.encode_array(text)
    assert bytes(ids.tolist()) == text.encode(), "other bytes"
    _check_round_trip(BYTES, text, place)
    data = text.encode("utf-16-le")  # often not UTF-8
    assert bytes(BYTES.encode_array(data).tolist()) == data, "other raw bytes"


def _check_characters(text: str, place: int) -> None:
    for end in (False, True):
        tokenizer = CharTokenizer.from_text(text + "a", end_of_text=end)
        _check_round_trip(tokenizer, text, place)


def _check_round_trip(tokenizer: Tokenizer, text: str, place: int) -> None:
    ids = tokenizer.encode_array(text)
    assert ids.dtype == np.int64, "another type"
    assert tokenizer.decode(ids) == text, "another text"
    assert tokenizer.end_of_text not in ids.tolist(), "text became a special token"
    decoder = tokenizer.decoder()
    decoded = "".join([decoder.push(i) for i in ids.tolist()]) + decoder.finish()
    assert decoded == text, "another text, id by id"
    rows = list(tokenizer.encode_pieces(_cut(text, place)))
    assert np.array_equal(np.concatenate(rows), ids), "other ids in pieces"


def _check_unknown_characters(text: str, place: int) -> None:
    """The vocabulary is of the text before `place`; the text is all of it."""
    known = set(text[:place]) | {"a"}
    tokenizer = CharTokenizer(sorted(known))
    unknown = sorted(set(text) - known)
    if not unknown:
        return _check_round_trip(tokenizer, text, place)
    first = min(map(text.index, unknown))
    named = [repr(char) if char < "\x80" else f"U+{ord(char):04X}" for char in unknown[:20]]
    for message in _refusals(tokenizer, text, place, UnknownTokenError):
        assert f"first at position {first})" in message, message
        assert all(name in message for name in named), message
    return None


def _check_surrogates(text: str, place: int, surrogate: str) -> None:
    wrong = text[:place] + surrogate + text[place:]
    expected = f"U+{ord(surrogate[0]):04X} at position {place}"
    for tokenizer in (BYTES, CharTokenizer.from_text(text + "a")):
        for message in _refusals(tokenizer, wrong, place, InputError):
            assert expected in message, message
    (message,) = _messages([lambda: CharTokenizer.from_text(wrong)], InputError)
    assert expected in message, message


def _refusals(tokenizer: Tokenizer, text: str, place: int, kind: type[InputError]) -> Iterator[str]:
    """Its messages on the text, at once and in pieces."""
    at_once = partial(tokenizer.encode_array, text)
    return _messages([at_once, lambda: list(tokenizer.encode_pieces(_cut(text, place)))], kind)


def _messages(attempts: list[Callable[[], object]], kind: type[InputError]) -> Iterator[str]:
    for attempt in attempts:
        try:
            attempt()
        except kind as error:
            yield str(error)
        else:
            raise AssertionError("not refused")


def _cut(text: str, place: int) -> list[str]:
    return [text[:place], text[place : place + 1], text[place + 1 :]]
