"""Tokenizers from untrusted files: their cost is bounded, and the library's panics are errors."""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mygpt.errors import InputError
from mygpt.tokenization import from_state, load_tokenizer
from mygpt.tokenization.bounds import check_bounds
from mygpt.tokenization.library import refusals
from mygpt.tokenization.tokenizer_json import TokenizerFile

LETTERS = "abcdefghij x\u2581<>0123456789ABCDEF"
TEMPLATE = {"Sequence": {"id": "A", "type_id": 0}}


def description(**parts) -> dict:
    vocab = {letter: n for n, letter in enumerate(LETTERS)}
    return {"model": {"type": "BPE", "vocab": vocab, "merges": []}} | parts


def replace(pattern: str, content: str, kind: str = "String") -> dict:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def chain(*steps: dict, part: str = "normalizers") -> dict:
    return {"type": "Sequence", part: list(steps)}


def template(single: list, special: dict | None = None) -> dict:
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [],
        "special_tokens": special or {},
    }


def special(name: str, count: int) -> dict:
    return {name: {"id": name, "ids": [0] * count, "tokens": [name] * count}}


def added(content: str, number: int) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True, **flags}


def word_piece(longest: int) -> dict:
    return {
        "type": "WordPiece",
        "vocab": {"a": 0, "[UNK]": 1},
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": longest,
    }


CHARSMAP = base64.b64encode((4).to_bytes(4, "little") + b"\0" * 4 + b"x" * 9000).decode()
CLS = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}
HOSTILE = {
    "nine replacements": {"normalizer": chain(*[replace("a", "a" * 10)] * 9)},
    "in a decoder": {"decoder": chain(*[replace("a", "a" * 10)] * 9, part="decoders")},
    "by way of others": {"normalizer": chain(replace("a", "b" * 10), replace("b", "a" * 10))},
    "by patterns": {"normalizer": chain(*[replace("[a-z]", "aaa", "Regex")] * 4)},
    "of nothing": {"normalizer": chain(*[replace("", "a", "Regex")] * 7)},
    "of bytes": {"normalizer": chain(*[{"type": "ByteLevel"}] * 12)},
    "one long one": {"normalizer": replace("a", "b" * 2000)},
    "nested sequences": {"normalizer": chain(*[chain(*[{"type": "NFC"}] * 60)] * 60)},
    "a long beginning": {"normalizer": {"type": "Prepend", "prepend": "a" * 2000}},
    "a table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}},
    "long words": {"model": word_piece(10**9)},
    "many ids": {"post_processor": template([CLS] * 999, special("[CLS]", 999))},
    "many pieces": {"post_processor": template([CLS] * 9999, special("[CLS]", 1))},
    "words of nothing": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a large id": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 5 * 10**7}, "merges": []}},
    "a large id of an added token": {"added_tokens": [added("zz", 5 * 10**7)]},
    "a long token": {"model": {"type": "BPE", "vocab": {"a" * 5000: 0}, "merges": []}},
}


def saved(path: Path, **parts) -> Path:
    path.write_text(json.dumps(description(**parts)))
    return path


@pytest.mark.parametrize("parts", HOSTILE.values(), ids=HOSTILE)
def test_tokenizers_beyond_a_limit_are_refused(tmp_path: Path, parts: dict):
    """Nine chained replacements of one character by ten once took 6 GB for a prompt."""
    path = saved(tmp_path / "tokenizer.json", **parts)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"the file is damaged or malicious") as refused:
        load_tokenizer(path)
    assert str(path) in str(refused.value)
    assert len(str(refused.value)) < 300
    assert time.monotonic() - began < 5


def test_a_model_with_too_many_rows_is_refused() -> None:
    """A small checkpoint made a table of them before its weights were compared."""
    state = {"kind": "foreign", "tokenizer": description(), "vocab_size": 5 * 10**7}
    with pytest.raises(InputError, match="50000000 ids, more than the limit of 4,194,304"):
        from_state(state)


def test_a_template_that_inserts_a_text_twice_is_not_applied(tmp_path: Path):
    tokenizer = load_tokenizer(saved(tmp_path / "t.json", post_processor=template([TEMPLATE] * 2)))
    assert tokenizer.decode(tokenizer.encode("abc")) == "a b c"


HONEST = {
    "Llama 2": {
        "normalizer": chain({"type": "Prepend", "prepend": "\u2581"}, replace(" ", "\u2581")),
        "decoder": chain(
            replace("\u2581", " "),
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            part="decoders",
        ),
        "post_processor": template([CLS, TEMPLATE], special("[CLS]", 1)),
    },
    "CLIP": {"normalizer": chain({"type": "NFC"}, replace(r"\s+", " ", "Regex"))},
    "ALBERT": {"normalizer": chain(replace("``", '"'), replace("''", '"'), {"type": "NFKD"})},
    "T5": {"normalizer": chain(replace(" {2,}", "\u2581", "Regex"))},
    "emoticons": {"normalizer": chain(*(replace(c, ":smiling_face:") for c in "☺☹😀😁😂"))},
    "many spaces": {"normalizer": chain(replace("\t", "    "), replace(" ", "\u2581"))},
    "BERT": {"model": word_piece(100)},
}


@pytest.mark.parametrize("parts", HONEST.values(), ids=HONEST)
def test_published_tokenizers_are_within_the_limits(parts: dict):
    check_bounds(TokenizerFile(description(**parts)))


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.text("abc", max_size=6), st.sampled_from(["String"])),
        max_size=6,
    ),
    st.text("abc", min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_no_accepted_normaliser_lengthens_a_text_beyond_the_limit(steps, text):
    from tokenizers import Tokenizer

    made = description(normalizer=chain(*(replace(*step) for step in steps)))
    try:
        check_bounds(TokenizerFile(made))
    except InputError:
        return
    normalizer = Tokenizer.from_str(json.dumps(made)).normalizer
    grown = normalizer.normalize_str(text) if steps else text
    assert len(grown) <= 64 * len(text)


PANICS = {
    "decoder": {"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 2}},
    "pattern": {"normalizer": replace("(a+)+$", "x", "Regex")},
    "table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
}


def use(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    tokenizer.encode_array("a" * 3000 + "b ")
    tokenizer.decode([LETTERS.index("a")])


@pytest.mark.parametrize("parts", PANICS.values(), ids=PANICS)
def test_a_panic_of_the_library_is_a_one_line_error(tmp_path: Path, capfd, parts: dict):
    """The library writes "thread '<unnamed>' panicked at" and more to file descriptor 2."""
    path = saved(tmp_path / "tokenizer.json", **parts)
    with pytest.raises(InputError, match=r"the tokenizers library|is not supported") as refused:
        use(path)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


def test_what_others_write_to_standard_error_meanwhile_is_not_lost(capfd):
    with refusals("nothing"):
        os.write(2, b"meanwhile\n")
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "meanwhile\nlater\n"
