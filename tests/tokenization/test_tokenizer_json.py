"""The `tokenizer.json` of byte-level BPE: hostile files, and other programs' tokenizers."""

from __future__ import annotations

import copy
import json
from contextlib import suppress

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bpe_samples import BPE, QWEN_2, ids_of, texts
from mygpt.errors import InputError
from mygpt.tokenization import (
    BPETokenizer,
    bpe,
    from_state,
    load_tokenizer,
    words,
)
from mygpt.tokenization.base import read_json


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "WordLevel"])
def test_tokenizers_of_another_kind_are_read_as_foreign(tmp_path, kind):
    """`BPETokenizer` refuses them with their kind; `load_tokenizer` reads them."""
    model = getattr(tokenizers.models, kind)
    tokenizers.Tokenizer(model() if kind == "Unigram" else model({"a": 0}, unk_token="a")).save(
        str(tmp_path / "t.json")
    )
    with pytest.raises(InputError, match=rf"a tokenizer of kind '{kind}' is not support"):
        BPETokenizer(read_json(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json").kind == "foreign"


def broken(*path, value):
    """A valid state with `value` at the given path in it."""
    description = copy.deepcopy(BPE.to_state()["tokenizer"])
    here = description
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    return description


VOCAB = BPE.to_state()["tokenizer"]["model"]["vocab"]
MERGES = BPE.to_state()["tokenizer"]["model"]["merges"]
ENDING = BPE.to_state()["tokenizer"]["added_tokens"][0]
REGEX = ("pre_tokenizer", "pretokenizers", 0)
HOSTILE = [
    None, 3, [], "x", {}, {"model": None}, {"model": {"type": "BPE"}},
    broken("model", value={}),
    broken("model", "vocab", value=[]),
    broken("model", "vocab", value={}),
    broken("model", "vocab", value={**VOCAB, "xyz": 2**40}),
    broken("model", "vocab", value={**VOCAB, "xyz": -1}),
    broken("model", "vocab", value={**VOCAB, "xyz": 3}),
    broken("model", "vocab", value={**VOCAB, "xyz": 400.0}),
    broken("model", "vocab", value={**VOCAB, "xyz": "400"}),
    broken("model", "vocab", value={**VOCAB, "a b": 400}),
    broken("model", "vocab", value={**VOCAB, "": 400}),
    broken("model", "vocab", value={k: v for k, v in VOCAB.items() if v != 399}),
    broken("model", "merges", value=None),
    broken("model", "merges", value=[1]),
    broken("model", "merges", value=[["a"]]),
    broken("model", "merges", value=[["quux", "quuux"], *MERGES]),
    broken("model", "merges", value=[["<|endoftext|", ">"]]),
    broken("model", "dropout", value=0.5),
    broken("model", "end_of_word_suffix", value="</w>"),
    broken("model", "ignore_merges", value=True),
    broken("model", "unk_token", value=[[]]),
    broken("normalizer", value={"type": "Lowercase"}),
    broken("pre_tokenizer", value=None),
    broken("pre_tokenizer", value={"type": "Whitespace"}),
    broken("pre_tokenizer", value={"type": "Sequence", "pretokenizers": []}),
    broken("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", value=True),
    broken(*REGEX, "behavior", value="Removed"),
    broken(*REGEX, "invert", value=True),
    broken(*REGEX, "pattern", value={"Regex": "(("}),
    broken(*REGEX, "pattern", value={"Regex": 7}),
    broken("decoder", value=None),
    broken("decoder", value={"type": "WordPiece"}),
    broken("post_processor", value={"type": "none such"}),
    broken("added_tokens", value=3),
    broken("added_tokens", value=[{}]),
    broken("added_tokens", value=[{"id": 256, "content": "<|endoftext|>"}]),
    broken("added_tokens", value=[{**ENDING, "id": 65}]),
    broken("added_tokens", value=[{**ENDING, "id": [1]}]),
    broken("added_tokens", value=[{**ENDING, "content": "a"}]),
    broken("added_tokens", value=[{**ENDING, "content": "\ud800"}]),
    broken("added_tokens", value=[{**ENDING, "single_word": "?"}]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_states_are_refused_in_one_line(number, tmp_path):
    """Never a traceback or panic, or a tokenizer that loses text or forges control tokens."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(HOSTILE[number]))
    with suppress(InputError):  # some are tokenizers of another kind
        assert load_tokenizer(path).kind == "foreign"
    with pytest.raises(InputError) as caught:
        from_state({"kind": "bpe", "tokenizer": HOSTILE[number]})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_hostile_patterns_that_backtrack_for_ever_are_refused_in_one_line():
    """Such a pattern makes the library panic, which is not an `Exception` in Python."""
    endless = BPETokenizer(broken(*REGEX, "pattern", value={"Regex": "(a|a|aa)+$"}))
    with pytest.raises(InputError, match="could not encode"):
        endless.encode_array("a" * 100 + "b")


# --- other programs' tokenizers ------------------------------------------------------------

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@settings(max_examples=50)
@given(st.lists(texts, max_size=6))
def test_other_programs_tokenizers_give_the_librarys_ids_in_any_pieces(pieces):
    """GPT-2's and Qwen2's rules, and an unknown one, whose library gets the whole text."""
    whole = "".join(pieces)
    rules = [
        broken("pre_tokenizer", value=GPT2),
        broken(*REGEX, "pattern", value={"Regex": QWEN_2}),
        broken(*REGEX, "pattern", value={"Regex": r"[a-z ]+"}),
    ]
    for description, known in zip(rules, (True, True, False), strict=True):
        tokenizer = BPETokenizer(description)
        judge = tokenizers.Tokenizer.from_str(json.dumps(description))
        judge.encode_special_tokens = True
        assert tokenizer.encoder.rules.splits_at_spaces is known
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bpe, "_CHUNK", 5)
            assert ids_of(tokenizer, pieces) == judge.encode(whole).ids
        assert tokenizer.decode(judge.encode(whole).ids) == whole


@given(texts)
@example("I'LLx they'Rex 'Sx 'sx 't2 x's'd")
def test_the_rule_for_words_is_qwen2s_for_all_runs_of_real_text(text):
    """Programs that know rules by name (llama.cpp) can use `qwen2`.

    Such a program takes the seven contractions letter by letter; Qwen2's own file, ignoring case,
    takes the old long s for one too.
    """
    text = text.replace("ſ", "s")
    regex = tokenizers.Regex(QWEN_2)
    theirs = tokenizers.pre_tokenizers.Split(regex, "isolated").pre_tokenize_str(text)
    assert words.WordSplitter().split(text) == [word for word, _ in theirs]
