"""Encode BPE word by word in Python, merging each distinct word only once.

It knows the rules for words of mygpt (`tokenization/words.py`), GPT-2, Llama 3 and Qwen2, and uses
the library's classes of characters. The cache has the bytes of a word's ids, since concatenating
bytes is fastest.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from mygpt.data.store_builder.chunking import library_json
from mygpt.tokenization import Tokenizer
from mygpt.tokenization.tokenizer_json import SYMBOLS, build, check
from mygpt.tokenization.words import CLASSES, WordSplitter, classified, ranges

_MOST_WORDS = 2**17  # whose ids are cached
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BYTES = dict(enumerate(SYMBOLS))


class Words(dict[str, bytes]):
    """A cache from word to the bytes of its ids; a missing word is merged by the library.

    Args:
        split: splits a text into words.
        model: the library's BPE model, which merges.
        dtype: the integer type of the ids.
    """

    def __init__(self, split: Callable[[str], list[str]], model: Any, dtype: np.dtype[Any]) -> None:
        super().__init__()
        self.split = split
        self._model = model
        self._dtype = dtype

    def __missing__(self, word: str) -> bytes:
        if len(self) >= _MOST_WORDS:
            self.clear()
        symbols = word.encode("utf-8").decode("latin-1").translate(_BYTES)
        ids = [token.id for token in self._model.tokenize(symbols)]
        self[word] = data = np.array(ids, self._dtype).tobytes()
        return data


class _Rule:
    """The rule of GPT-2, Llama 3 or Qwen2, compiled for the blocks of code points seen so far."""

    def __init__(self, rule: str) -> None:
        self._rule = rule
        self._blocks = {0}
        self._pattern = _compiled(rule, self._blocks)

    def split(self, text: str) -> list[str]:
        """The words of a text that begins and ends at word boundaries."""
        if not text.isascii():
            touched = {ord(char) >> 8 for char in set(text)}
            if not touched <= self._blocks:
                self._blocks |= touched
                self._pattern = _compiled(self._rule, self._blocks)
        found: list[str] = self._pattern.findall(text)
        return found


def words_of(tokenizer: Tokenizer, dtype: np.dtype[Any]) -> Words | None:
    """The word cache for a tokenizer with a known rule for words; None for any other."""
    description: Any = library_json(tokenizer)
    if description is None or description.get("normalizer") is not None:
        return None
    contents = check(description)
    model = build(description).model
    if contents.own_rule:
        return Words(WordSplitter().split, model, dtype)
    if not contents.splits_at_spaces or set(contents.added) - contents.control:
        return None
    *cuts, _ = description["pre_tokenizer"].get("pretokenizers", [description["pre_tokenizer"]])
    rule = cuts[0]["pattern"]["Regex"] if cuts else _GPT2
    return Words(_Rule(rule).split, model, dtype)


def _compiled(rule: str, blocks: set[int]) -> re.Pattern[str]:
    """The rule as a Python pattern, for text within these blocks of 256 code points."""
    members: dict[str, list[int]] = {written: [] for written in CLASSES.values()}
    for block in sorted(blocks):
        for name, points in classified(block).items():
            members[CLASSES[name]] += points
    ranges_of = {written: ranges(points) for written, points in members.items()}
    rule = rule.replace(r"\S", f"[^{ranges_of[chr(92) + 's']}]")
    rule = re.sub(r"\(\?i:([^)]*)\)", _any_case, rule)
    inside = False
    done = []
    for part in re.split(r"(\\p\{L\}|\\p\{N\}|\\s|\[|\])", rule):
        inside = part == "[" or (inside and part != "]")
        written = ranges_of.get(part)
        done.append(part if written is None else written if inside else f"[{written}]")
    return re.compile("".join(done))


def _any_case(found: re.Match[str]) -> str:
    """ASCII letters in both cases, spelled out: case folding in Python and the library differs."""
    both = re.sub("[a-z]", lambda letter: f"[{letter[0]}{letter[0].upper()}]", found[1])
    return f"(?:{both})"
