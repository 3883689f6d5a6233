"""Byte-level BPE with the `tokenizers` library: frequent words become one token.

Sennrich et al. 2016 (arXiv:1508.07909), on bytes as in GPT-2, so that any text can be encoded. The
library learns the merges and applies them. Text is split into words in Python (`words.py`), which
takes a fifth of the library's time, and each distinct word is merged only once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError
from mygpt.tokenization import base
from mygpt.tokenization.base import END_OF_TEXT, Tokenizer, checked
from mygpt.tokenization.library import encode, refusals
from mygpt.tokenization.tokenizer_json import (
    BYTE_LEVEL,
    OWN_RULE,
    SYMBOLS,
    ByteLevel,
    TokenizerFile,
    bpe_model,
    describe,
    to_symbols,
)
from mygpt.tokenization.words import WordSplitter, in_blocks

if TYPE_CHECKING:
    import tokenizers

SMALLEST = 257  # all bytes, and end-of-text
LARGEST = 2**20
_MOST_BLOCKS = 128  # of 65,536 characters, used for training: 8 MB
_MOST_WORDS = 2**18  # whose tokens are cached
_LETTER_AND_SPACE = re.compile(r"[^\W\d_] ")
_CHUNK = 2**16  # characters, at least, that are encoded at a time
_PART = 2000  # characters, at least, of a text in the library's batch; other lengths are slower


class BPETokenizer(Tokenizer):
    """Byte-level BPE.

    Args:
        content: a `tokenizer.json`, or the JSON object in it; `train` creates one.

    Raises:
        InputError: if it is not byte-level BPE, or incomplete.
    """

    kind = "bpe"

    def __init__(self, content: dict[str, Any] | TokenizerFile) -> None:
        file = TokenizerFile.of(content)
        self._description = file.description
        self.control, self.end_of_text = frozenset(file.special), file.byte_level.end_of_text
        self.encoder = WordEncoder(file.byte_level, file.build())
        self.tokens = file.byte_tokens(file.size)

    @classmethod
    def train(cls, pieces: Iterable[str | bytes], vocab_size: int) -> BPETokenizer:
        """Learn merges from a text given in pieces; the result is deterministic.

        Of a text of more than 8 MB, 4 to 8 MB are used, in evenly spaced blocks. Only pairs that
        occur at least twice are merged, so a short text gives a smaller vocabulary.

        Args:
            pieces: the text, split at any positions.
            vocab_size: V to reach, from 257 (all bytes, and end-of-text) to 1,048,576.

        Raises:
            InputError: if the size is outside that range, a piece is bytes, or the text has a
                lone surrogate.
        """
        if type(vocab_size) is not int or not SMALLEST <= vocab_size <= LARGEST:
            raise InputError(
                f"vocab_size={vocab_size!r} must be an integer from {SMALLEST:,} (all bytes, and "
                f"end-of-text) to {LARGEST:,}: 4096 suits a few megabytes of text"
            )
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=list(SYMBOLS),
        )
        library = Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        with refusals("the tokenizers library could not train on this text", quiet=False):
            library.train_from_iterator(_sample(checked(pieces)), trainer)
        learned = json.loads(library.to_str())["model"]
        ranked = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
        model = bpe_model([*SYMBOLS, END_OF_TEXT, *ranked[SMALLEST:]], learned["merges"])
        return cls(describe(model, OWN_RULE, BYTE_LEVEL, end_of_text=256))

    def to_json(self) -> dict[str, Any]:
        """The content of the `tokenizer.json`."""
        return self._description

    def to_state(self) -> dict[str, Any]:
        """The tokenizer's complete state as JSON values."""
        return {"kind": self.kind, "tokenizer": self._description}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> BPETokenizer:
        """Rebuild from `to_state()`; `InputError` if it is damaged."""
        if not isinstance(state.get("tokenizer"), dict):
            raise InputError('a BPE tokenizer\'s state needs "tokenizer", a tokenizer.json')
        return cls(state["tokenizer"])

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json`, which the `tokenizers` library and transformers load."""
        base.save(path, json.dumps(self._description, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> BPETokenizer:
        """Read a `tokenizer.json`; `InputError` if it is not byte-level BPE."""
        return base.load(path, cls)


class WordEncoder:
    """Encodes text by byte-level BPE, in parts that do not depend on the text around them.

    Args:
        rules: of the `tokenizer.json`.
        library: the library's tokenizer of it.
    """

    def __init__(self, rules: ByteLevel, library: tokenizers.Tokenizer) -> None:
        self.rules, self._library = rules, library
        self._splitter = None if rules.rule is None else WordSplitter(rules.rule)
        self._words = _Words(library.model)

    def encode_pieces(self, pieces: Iterable[str | bytes]) -> Iterator[NDArray[np.int64]]:
        """Rows of ids, (T,) int64, of words; of chunks; or of the complete text."""
        texts = checked(pieces)
        if self._splitter is None:
            yield from self._by_library(texts)
            return
        if self.rules.own_rule:
            some = self._splitter.split_pieces(texts)
        else:
            some = map(self._splitter.split, _chunks(texts, _CHUNK))
        for words in some:
            ids = b"".join(map(self._words.__getitem__, words))
            yield np.frombuffer(ids, np.int32).astype(np.int64)

    def encode_part(self, text: str) -> bytes:
        """The ids, int32, of a text that begins and ends where words do."""
        if self._splitter is None:
            return b"".join(row.astype(np.int32).tobytes() for row in self._by_library([text]))
        return b"".join(map(self._words.__getitem__, self._splitter.split(text)))

    def _by_library(self, texts: Iterable[str]) -> Iterator[NDArray[np.int64]]:
        """For a rule that is not known here, or a tokenizer that changes or adds words."""
        if not self.rules.splits_at_spaces:
            yield np.array(encode(self._library, ["".join(texts)])[0], np.int64)
            return
        for text in _chunks(texts, _CHUNK):
            for ids in encode(self._library, list(_chunks([text], _PART))):
                yield np.array(ids, np.int64)


class _Words(dict[str, bytes]):
    """A cache from word to the bytes of its ids, int32; a missing word is merged by the library.

    Concatenating bytes is faster than concatenating lists.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def __missing__(self, word: str) -> bytes:
        if len(self) >= _MOST_WORDS:
            self.clear()
        ids = [token.id for token in self._model.tokenize(to_symbols(word))]
        self[word] = data = np.array(ids, np.int32).tobytes()
        return data


class _Symbols(dict[str, str]):
    """A cache from word to `to_symbols(word)`."""

    def __missing__(self, word: str) -> str:
        self[word] = symbols = to_symbols(word)
        return symbols


def _sample(texts: Iterable[str]) -> Iterator[str]:
    """The words, in symbols, of at most `_MOST_BLOCKS` evenly spaced blocks of the text."""
    kept: list[str] = []
    stride = 1
    for number, block in enumerate(in_blocks(texts)):
        if number % stride == 0:
            kept.append(block)
        if len(kept) > _MOST_BLOCKS:
            kept = kept[::2]
            stride *= 2
    symbols, splitter = _Symbols(), WordSplitter()
    for block in kept:  # a word across a block's end counts as two
        yield " ".join(map(symbols.__getitem__, splitter.split(block)))


def _chunks(texts: Iterable[str], least: int) -> Iterator[str]:
    """The text in chunks of at least `least` characters, split before a space after a letter."""
    waiting = ""
    for text in texts:
        waiting += text
        begin = 0
        while found := _LETTER_AND_SPACE.search(waiting, begin + least):
            yield waiting[begin : found.end() - 1]
            begin = found.end() - 1
        waiting = waiting[begin:]
    if waiting:
        yield waiting
