"""Tokenizers in GGUF: llama.cpp's byte-level BPE gives our ids, whatever the tokenizer."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_twin import BYTE, merged_ids
from mygpt.errors import InputError
from mygpt.formats.gguf_tokenizer import tokenizer_values
from mygpt.tokenization import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
CHARS = "\0\t\n\r \\<>|abendoftx\x85\xa0é\u0100Ġ漢字€\u2581\ufeff\uffff가😀𝄞\U0010ffff"
CHARACTERS = CharTokenizer(CHARS, end_of_text=True)
TEXT = "the cat sat on the mat, the naïve cat's 12 mats\n\n漢字 漢字 😀😀 " * 5
BPE = BPETokenizer.train([TEXT], 300)
TOKENIZERS: dict[str, Tokenizer] = {"char": CHARACTERS, "byte": ByteTokenizer(), "bpe": BPE}


def values_of(tokenizer: Tokenizer) -> dict[str, Any]:
    values, notes = tokenizer_values(tokenizer, tokenizer.vocab_size)
    assert notes == []
    return values


@given(text=st.text(st.sampled_from(CHARS)), cuts=st.sets(st.integers(0, 20)))
def test_characters_are_built_from_their_bytes(text: str, cuts: set[int]) -> None:
    """Wherever llama.cpp ends a word: it cuts between characters, never in one."""
    values = values_of(CHARACTERS)
    places = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    words = [text[i:j] for i, j in pairwise(places)]
    found = [number for word in words for number in merged_ids(values, word)]
    assert found == CHARACTERS.encode_array(text).tolist()


def test_unknown_characters_are_left_out() -> None:
    """And take no known one with them: è shares é's first byte, 孔 two of 字's three."""
    values = values_of(CHARACTERS)
    assert merged_ids(values, "aèb孔字x¥") == CHARACTERS.encode_array("ab字x").tolist()


@given(text=st.text())
def test_bytes_are_bytes(text: str) -> None:
    assert merged_ids(values_of(ByteTokenizer()), text) == list(text.encode())


@pytest.mark.parametrize("word", ["the", " the", " cat", "漢字", "😀😀", "ïve", "zebra", "\n\n"])
def test_words_are_merged_as_ours(word: str) -> None:
    assert merged_ids(values_of(BPE), word) == BPE.encode_array(word).tolist()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_id_is_ours_and_only_the_end_ends(kind: str) -> None:
    """No real character may be a control token, the beginning or the end."""
    tokenizer = TOKENIZERS[kind]
    values = values_of(tokenizer)
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    end = tokenizer.end_of_text
    assert values["tokenizer.ggml.model"] == "gpt2"
    assert values["tokenizer.ggml.pre"] == "qwen2"
    assert len(tokens) == len(types) == len(set(tokens)) == tokenizer.vocab_size
    assert values["tokenizer.ggml.eos_token_id"] == values["tokenizer.ggml.bos_token_id"] == end
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.ggml.add_eos_token"] is False
    assert [i for i, number in enumerate(types) if number != NORMAL] == [end]
    assert tokens[end] == "<|endoftext|>"
    assert types[end] == CONTROL
    data = [bytes(BYTE[s] for s in t) for i, t in enumerate(tokens) if i != end]
    lengths = tokenizer.byte_lengths().tolist()
    assert [len(piece) for piece in data] == lengths[:end] + lengths[end + 1 :]
    if kind == "char":
        assert [piece.decode() for piece in data] == list(CHARS)


def test_ids_that_only_the_model_has_are_unused() -> None:
    values, _ = tokenizer_values(CHARACTERS, CHARACTERS.vocab_size + 3)
    tokens = values["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == CHARACTERS.vocab_size + 3
    assert values["tokenizer.ggml.token_type"][-3:] == [UNUSED] * 3


def of_another(pre: Any, *, whole: bool = False, end: bool = True, **changes: Any) -> BPETokenizer:
    """Our tokenizer with another's rule for words, and tokens added as others add them."""
    description = copy.deepcopy(BPE.to_state()["tokenizer"])
    description |= {"pre_tokenizer": pre, **changes}
    description["model"]["ignore_merges"] = whole
    added = description["added_tokens"]
    size = len(description["model"]["vocab"])
    if not end:
        vocab = description["model"]["vocab"]
        vocab["ĀĀĀ"] = vocab.pop(added[0]["content"])
        added[0] |= {"id": size, "content": "<|end_of_text|>"}
        size += 1
    added.append({**added[0], "id": size, "content": "<tool>", "special": False})
    return BPETokenizer(description)


def byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def split_at(rule: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level(False)]}


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@pytest.mark.parametrize(
    ("pre", "whole", "name"),
    [
        (byte_level(True), False, "gpt-2"),
        (split_at(QWEN2), False, "qwen2"),
        (split_at(LLAMA_3), False, "smaug-bpe"),
        (split_at(LLAMA_3), True, "llama-bpe"),
    ],
)
def test_rules_of_others_go_by_llama_cpp_s_names(pre: Any, whole: bool, name: str) -> None:
    values = values_of(of_another(pre, whole=whole, end=not whole))
    assert values["tokenizer.ggml.pre"] == name
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert types[tokens.index("<tool>")] == USER_DEFINED
    end = "<|end_of_text|>" if whole else "<|endoftext|>"
    assert values["tokenizer.ggml.eos_token_id"] == tokens.index(end)
    assert types[tokens.index(end)] == CONTROL


@pytest.mark.parametrize(
    ("pre", "whole"),
    [
        (split_at(r"\p{L}+|\P{L}+"), False),
        (split_at(QWEN2), True),
        (byte_level(False), False),
        (
            {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level(True)],
            },
            False,
        ),
    ],
    ids=["unknown", "Qwen2's with whole words", "none", "two"],
)
def test_a_rule_without_a_name_is_refused(pre: Any, whole: bool) -> None:
    """Else llama.cpp would cut words elsewhere, and the model would read other tokens."""
    tokenizer = of_another(pre, whole=whole, end=not whole)
    with pytest.raises(InputError, match=r"rule for words is none of those known .*--to hf"):
        tokenizer_values(tokenizer, tokenizer.vocab_size)


def test_composing_characters_is_told() -> None:
    tokenizer = of_another(split_at(QWEN2), normalizer={"type": "NFC"})
    _, notes = tokenizer_values(tokenizer, tokenizer.vocab_size)
    assert notes == ["llama.cpp does not compose characters (NFC): give it text that is NFC"]


def test_tokens_that_llama_cpp_would_take_for_one_are_refused() -> None:
    """It ends the program over two tokens of one text; a NUL ends a token's."""
    description = copy.deepcopy(BPE.to_state()["tokenizer"])
    added = description["added_tokens"]
    added.append({**added[0], "id": BPE.vocab_size, "content": "a\0", "special": False})
    tokenizer = BPETokenizer(description)
    with pytest.raises(InputError, match="NUL"):
        tokenizer_values(tokenizer, tokenizer.vocab_size)
