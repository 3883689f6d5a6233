"""Words in Python, for BPE whose rule for them is known: each distinct one is merged once.

The rules are ours (`words.py`), and GPT-2's, Llama 3's and Qwen2's, with the library's own classes
of characters. What is kept of a word are its ids' bytes, which are put together fastest.
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

_MOST_WORDS = 2**17  # whose tokens are kept in memory
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BYTES = dict(enumerate(SYMBOLS))


class Words(dict[str, bytes]):
    """The ids' bytes of words met before; others are merged when they are asked for.

    Args:
        split: cuts a text into words.
        model: the library's, which merges.
        dtype: the ids' numbers.
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
    """A rule of others; its pattern knows the blocks of code points that were met."""

    def __init__(self, rule: str) -> None:
        self._rule = rule
        self._blocks = {0}
        self._pattern = _compiled(rule, self._blocks)

    def split(self, text: str) -> list[str]:
        """The words of a text that begins and ends where words do."""
        if not text.isascii():
            touched = {ord(char) >> 8 for char in set(text)}
            if not touched <= self._blocks:
                self._blocks |= touched
                self._pattern = _compiled(self._rule, self._blocks)
        found: list[str] = self._pattern.findall(text)
        return found


def words_of(tokenizer: Tokenizer, dtype: np.dtype[Any]) -> Words | None:
    """The words of a tokenizer whose rule is one of those; None of any other."""
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
    """The rule for text of these blocks of 256 code points."""
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
    """ASCII letters in both cases, spelled out: Python's and the library's folding may differ."""
    both = re.sub("[a-z]", lambda letter: f"[{letter[0]}{letter[0].upper()}]", found[1])
    return f"(?:{both})"
