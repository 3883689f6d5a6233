"""Tokenizers in GGUF: llama.cpp's byte-level BPE gives mygpt's ids for each kind of tokenizer."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from bpe_samples import LLAMA_3, QWEN_2
from gguf_reference import BYTE, merged_ids, read_gguf, sentencepiece_ids
from mygpt.errors import InputError
from mygpt.formats.gguf import write_gguf_file
from mygpt.formats.gguf_tokenizer import tokenizer_values
from mygpt.tokenization import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from mygpt.tokenization.foreign import ForeignTokenizer

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
    """Wherever llama.cpp splits words: it splits between characters, never inside one."""
    values = values_of(CHARACTERS)
    places = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    words = [text[i:j] for i, j in pairwise(places)]
    found = [number for word in words for number in merged_ids(values, word)]
    assert found == CHARACTERS.encode_array(text).tolist()


def test_unknown_characters_are_dropped() -> None:
    """No known one is dropped with them: è shares é's first byte, 孔 two of 字's three."""
    values = values_of(CHARACTERS)
    assert merged_ids(values, "aèb孔字x¥") == CHARACTERS.encode_array("ab字x").tolist()


@given(text=st.text())
def test_byte_tokens_are_single_bytes(text: str) -> None:
    assert merged_ids(values_of(ByteTokenizer()), text) == list(text.encode())


@pytest.mark.parametrize("word", ["the", " the", " cat", "漢字", "😀😀", "ïve", "zebra", "\n\n"])
def test_words_are_merged_as_in_mygpt(word: str) -> None:
    assert merged_ids(values_of(BPE), word) == BPE.encode_array(word).tolist()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_id_is_the_same_and_only_the_end_token_ends_a_text(kind: str) -> None:
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
    """A tokenizer with another family's rule for words and its added tokens."""
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
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {**plain, "use_regex": use_regex}


def at_digits(each: bool) -> dict[str, Any]:
    digits = {"type": "Digits", "individual_digits": each}
    return {"type": "Sequence", "pretokenizers": [digits, byte_level(True)]}


def split_at(rule: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level(False)]}


@pytest.mark.parametrize(
    ("pre", "whole", "name"),
    [
        (byte_level(True), False, "gpt-2"),
        (split_at(QWEN_2), False, "qwen2"),
        (split_at(LLAMA_3), False, "smaug-bpe"),
        (split_at(LLAMA_3), True, "llama-bpe"),
        (at_digits(True), False, "smollm"),
    ],
)
def test_rules_of_other_tokenizers_get_llama_cpps_names(pre: Any, whole: bool, name: str) -> None:
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
        (split_at(QWEN_2), True),
        (byte_level(False), False),
        (at_digits(False), False),
    ],
    ids=["unknown", "Qwen2's with whole words", "none", "two"],
)
def test_a_rule_without_a_name_is_refused(pre: Any, whole: bool) -> None:
    """Else llama.cpp would cut words elsewhere, and the model would read other tokens."""
    tokenizer = of_another(pre, whole=whole, end=not whole)
    with pytest.raises(InputError, match=r"rule for splitting text into words .*--to hf"):
        tokenizer_values(tokenizer, tokenizer.vocab_size)


def test_nfc_normalization_gives_a_note() -> None:
    tokenizer = of_another(split_at(QWEN_2), normalizer={"type": "NFC"})
    _, notes = tokenizer_values(tokenizer, tokenizer.vocab_size)
    assert notes == [
        "the tokenizer normalizes text to NFC, and llama.cpp does not: give it text in NFC"
    ]


def test_tokens_that_are_equal_for_llama_cpp_are_refused() -> None:
    """It ends the program over two tokens of one text; a NUL ends a token's."""
    description = copy.deepcopy(BPE.to_state()["tokenizer"])
    added = description["added_tokens"]
    added.append({**added[0], "id": BPE.vocab_size, "content": "a\0", "special": False})
    tokenizer = BPETokenizer(description)
    with pytest.raises(InputError, match="NUL"):
        tokenizer_values(tokenizer, tokenizer.vocab_size)


# --- tokenizers that came with a model ------------------------------------------------------


def begun_by(name: str, number: int) -> dict[str, Any]:
    """A post-processor that adds a token before each text."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": name, "type_id": 0}}, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }


def of_a_model(
    pre: Any, *, whole: bool = False, rows: int = 0, end: str = "<|im_end|>", first: str = ""
) -> ForeignTokenizer:
    """As in Qwen3 and Llama 3: another end of text, a token before texts, padded rows."""
    description = of_another(pre, whole=whole, end=False).to_state()["tokenizer"]
    size = len(description["model"]["vocab"]) + len(description["added_tokens"])
    plain = {**description["added_tokens"][0], "special": True}
    for name in filter(None, (end, first)):
        if name not in [token["content"] for token in description["added_tokens"]]:
            description["added_tokens"].append({**plain, "id": size, "content": name})
            size += 1
    ids = {token["content"]: token["id"] for token in description["added_tokens"]}
    if first:
        description["post_processor"] = begun_by(first, ids[first])
    return ForeignTokenizer(description, end_of_text=ids[end], vocab_size=size + rows)


@pytest.mark.parametrize(
    ("pre", "whole", "first", "name"),
    [
        (split_at(QWEN_2), False, "", "qwen2"),
        (split_at(LLAMA_3), True, "<|begin_of_text|>", "llama-bpe"),
        (byte_level(True), False, "", "gpt-2"),
    ],
    ids=["Qwen3", "Llama 3", "GPT-2"],
)
@pytest.mark.parametrize("rows", [0, 5])
def test_an_imported_models_tokenizer_is_exported(
    pre: Any, whole: bool, first: str, name: str, rows: int
) -> None:
    tokenizer = of_a_model(pre, whole=whole, rows=rows, first=first)
    values, notes = tokenizer_values(tokenizer, tokenizer.vocab_size)
    assert notes == []
    assert values["tokenizer.ggml.pre"] == name
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(set(tokens)) == tokenizer.vocab_size
    end = values["tokenizer.ggml.eos_token_id"]
    assert end == tokenizer.end_of_text
    assert tokens[end] == "<|im_end|>"
    assert types[tokens.index("<tool>")] == USER_DEFINED
    assert values["tokenizer.ggml.add_bos_token"] is bool(first)
    assert tokens[values["tokenizer.ggml.bos_token_id"]] == (first or "<|im_end|>")
    size = tokenizer.vocab_size - rows
    assert tokens[size:] == [f"[PAD{n}]" for n in range(size, size + rows)]
    assert types[size:] == [UNUSED] * rows
    assert all(types[n] == CONTROL for n in (end, values["tokenizer.ggml.bos_token_id"]))
    for word in ["the", " the", " cat", "漢字", "😀😀", "ïve", "zebra", "\n\n", " 1"]:
        assert merged_ids(values, word) == tokenizer.encode_array(word).tolist()


def test_a_padding_token_is_named() -> None:
    tokenizer = of_a_model(split_at(QWEN_2), first="<pad>")
    values, _ = tokenizer_values(tokenizer, tokenizer.vocab_size)
    number = values["tokenizer.ggml.padding_token_id"]
    assert values["tokenizer.ggml.tokens"][number] == "<pad>"


def test_an_added_token_that_takes_spaces_is_refused() -> None:
    tokenizer = of_a_model(split_at(QWEN_2))
    description = tokenizer.to_state()["tokenizer"]
    description["added_tokens"][-2] |= {"special": False, "lstrip": True}
    odd = ForeignTokenizer(description, end_of_text=tokenizer.end_of_text)
    with pytest.raises(
        InputError, match=r"with lstrip, which llama.cpp does not support.* --to hf"
    ):
        tokenizer_values(odd, odd.vocab_size)


@pytest.mark.parametrize("model", [models.Unigram([("a", -1.0)], 0), models.WordPiece({"a": 0})])
def test_a_tokenizer_of_a_kind_without_a_name_is_refused_by_it(model: Any) -> None:
    library = tokenizers.Tokenizer(model)
    library.add_special_tokens(["</s>"])
    tokenizer = ForeignTokenizer(json.loads(library.to_str()), end_of_text=1)
    kind = type(model).__name__
    with pytest.raises(InputError, match=rf"does not support this tokenizer .*{kind}.*--to hf"):
        tokenizer_values(tokenizer, tokenizer.vocab_size)


SPACE = "\u2581"


def llama_2(**changes: Any) -> dict[str, Any]:
    """Llama 2's kind of tokenizer.json: every way to split every token, best token first."""
    control = ["<unk>", "<s>", "</s>"]
    made = ["th", "he", "the", "_t", "_the", "_th", "at", "cat", "_cat", "aa", "aaa", "__", "___"]
    made = [name.replace("_", SPACE) for name in [*made, "ïve", "ve", "漢字"]]
    characters = sorted({*"".join(made), *"xyz,.<>/s\n"})
    names = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *made, *characters]
    vocab = {name: number for number, name in enumerate(names)}
    merges = [
        [token[:n], token[n:]]
        for token in made
        for n in range(1, len(token))
        if token[:n] in vocab and token[n:] in vocab
    ]
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": n, "content": name, "special": True, **plain} for n, name in enumerate(control)]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]},
        "pre_tokenizer": None,
        "post_processor": begun_by("<s>", 1),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
    } | changes


METASPACE = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
_words = st.sampled_from(
    ["the", " the", "  the", "cat", " ", "   ", "a", "aa", "aaa", "ïve", "漢字", "🙂", "\n", "x.",
     "th"]
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("meta", [False, True])
@given(words=st.lists(st.one_of(_words, st.text(max_size=3)), max_size=8))
def test_merges_over_characters_are_scores(meta: bool, words: list[str]) -> None:
    """Llama 2's: llama.cpp has no merges there, and joins by the scores of tokens."""
    text = "".join(words).lstrip(f" {SPACE}") if meta else "".join(words)
    changes = {"normalizer": None, "pre_tokenizer": METASPACE} if meta else {}
    tokenizer = ForeignTokenizer(llama_2(**changes), end_of_text=2)
    values, _ = tokenizer_values(tokenizer, tokenizer.vocab_size)
    assert sentencepiece_ids(values, text) == tokenizer.encode_array(text).tolist()


def test_the_metadata_of_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    tokenizer = ForeignTokenizer(llama_2(), end_of_text=2, vocab_size=320)
    values, notes = tokenizer_values(tokenizer, 320)
    assert notes == []
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.pre"] == "default"
    assert values["tokenizer.ggml.add_space_prefix"] is True
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert values["tokenizer.ggml.unknown_token_id"] == 0
    assert (values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.eos_token_id"]) == (1, 2)
    types = values["tokenizer.ggml.token_type"]
    assert types[:3] == [2, CONTROL, CONTROL]
    assert types[3:259] == [6] * 256
    size = len(llama_2()["model"]["vocab"])
    assert values["tokenizer.ggml.tokens"][size:] == [f"[PAD{n}]" for n in range(size, 320)]
    assert len(values["tokenizer.ggml.scores"]) == 320
    path = tmp_path / "a.gguf"
    write_gguf_file(path, values, [])
    read, _ = read_gguf(path)
    assert read == values
    package = pytest.importorskip("gguf")
    field = package.GGUFReader(path).fields["tokenizer.ggml.scores"]
    assert field.contents() == values["tokenizer.ggml.scores"]


def test_text_equal_to_a_control_tokens_name_gives_a_note() -> None:
    """llama.cpp encodes text equal to a token's name as that token; in mygpt it stays text."""
    description = llama_2()
    vocab = description["model"]["vocab"]
    vocab |= {"</": len(vocab), "s>": len(vocab) + 1}
    description["model"]["merges"] += [["<", "/"], ["s", ">"]]
    tokenizer = ForeignTokenizer(description, end_of_text=2)
    _, notes = tokenizer_values(tokenizer, tokenizer.vocab_size)
    assert any("'</s>'" in note for note in notes)


def _without_merge(description: dict[str, Any]) -> None:
    description["model"]["merges"].remove(["t", "he"])


def _apart(description: dict[str, Any]) -> None:
    merges = description["model"]["merges"]
    merges.append(merges.pop(merges.index(["t", "he"])))


def _without_byte(description: dict[str, Any]) -> None:
    vocab = description["model"]["vocab"]
    vocab["odd"] = vocab.pop("<0x0A>")


WITHOUT_SCORES = {
    "no merge of 't' and 'he'": _without_merge,
    "merges to 'the' that do not follow each other": _apart,
    "no token for byte 10": _without_byte,
    "another rule for spaces": lambda d: d.update(normalizer={"type": "NFC"}),
    "end at spaces, and tokens with a space inside": lambda d: d.update(
        normalizer=None, pre_tokenizer={**METASPACE, "split": True}
    ),
}


@pytest.mark.parametrize("feature", WITHOUT_SCORES)
def test_merges_without_equivalent_scores_are_refused(feature: str) -> None:
    description = llama_2()
    WITHOUT_SCORES[feature](description)
    tokenizer = ForeignTokenizer(description, end_of_text=2)
    with pytest.raises(InputError, match=rf"this tokenizer has .*{feature}.* --to hf"):
        tokenizer_values(tokenizer, tokenizer.vocab_size)
