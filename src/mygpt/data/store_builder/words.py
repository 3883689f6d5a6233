"""Encode BPE word by word in Python, merging each distinct word only once.

It knows the rules for words of mygpt, GPT-2, Llama 3 and Qwen2 (`tokenization/words.py`). The cache
has the bytes of a word's ids, since concatenating bytes is fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mygpt.data.store_builder.chunking import library_json
from mygpt.tokenization import Tokenizer
from mygpt.tokenization.tokenizer_json import build, check, to_symbols, word_rules
from mygpt.tokenization.words import WordSplitter

_MOST_WORDS = 2**17  # whose ids are cached


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
        ids = [token.id for token in self._model.tokenize(to_symbols(word))]
        self[word] = data = np.array(ids, self._dtype).tobytes()
        return data


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
    (rule,) = word_rules(description["pre_tokenizer"])
    return Words(WordSplitter(str(rule)).split, model, dtype)
