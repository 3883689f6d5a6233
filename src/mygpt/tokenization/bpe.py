"""Byte-level BPE with the `tokenizers` library: frequent words become one token.

Sennrich et al. 2016 (arXiv:1508.07909), on bytes as in GPT-2, so that any text can be encoded. The
library learns the merges and applies them. Text is split into words in Python (`words.py`), which
takes a fifth of the library's time, and each distinct word is merged only once.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError, StorageError
from mygpt.json_objects import TOKENIZER, read_object
from mygpt.tokenization.base import END_OF_TEXT, check_ids, encode_strictly, pieces_of, primed
from mygpt.tokenization.tokenizer_json import (
    BRIEF,
    CANNOT_ENCODE,
    SYMBOLS,
    Contents,
    build,
    check,
    describe,
    library_ids,
    refusals,
)
from mygpt.tokenization.words import WordSplitter, in_blocks

if TYPE_CHECKING:
    import torch

SMALLEST = 257  # all bytes, and end-of-text
LARGEST = 2**20
_MOST_BLOCKS = 128  # of 65,536 characters, used for training: 8 MB
_MOST_WORDS = 2**18  # whose tokens are cached
_LETTER_AND_SPACE = re.compile(r"[^\W\d_] ")
_CHUNK = 2**16  # characters, at least, that the library encodes in one call


class BPETokenizer:
    """Byte-level BPE.

    Args:
        description: the JSON object in a `tokenizer.json`; `train` creates one.

    Raises:
        InputError: if it is not byte-level BPE, or incomplete.
    """

    kind = "bpe"
    beginning: tuple[int, ...] = ()
    other_ends: tuple[int, ...] = ()

    def __init__(self, description: dict[str, Any]) -> None:
        contents = check(description)
        self._description = description
        self._contents: Contents = contents
        self.end_of_text = contents.end_of_text
        self._library = build(description)
        for number, text in contents.added.items():
            if self._library.token_to_id(text) != number:
                raise InputError(f"the tokenizer's added token {text!r:.40} is not id {number}")
        self._splitter = WordSplitter()
        self._words = _Words(self._library.model)

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
        whole = isinstance(vocab_size, int) and not isinstance(vocab_size, bool)
        if not whole or not SMALLEST <= vocab_size <= LARGEST:
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
            library.train_from_iterator(_sample(_checked(pieces)), trainer)
        model = json.loads(library.to_str())["model"]
        ranked = sorted(model["vocab"], key=model["vocab"].__getitem__)
        return cls(describe(ranked[SMALLEST:], model["merges"]))

    @property
    def vocab_size(self) -> int:
        """V, the number of ids, end-of-text included."""
        return len(self._contents.tokens)

    @property
    def uses_own_rule(self) -> bool:
        """Whether text is split into words by the rule in `words.py`."""
        return self._contents.own_rule

    def encode(self, text: str) -> torch.Tensor:
        """Ids of `text`, a 1-D int64 tensor; a lone surrogate is an `InputError`."""
        import torch

        return torch.from_numpy(self.encode_array(text))

    def encode_array(self, text: str | bytes) -> NDArray[np.int64]:
        """Ids of `text`, a 1-D int64 array; a lone surrogate is an `InputError`."""
        rows = list(self.encode_pieces([text] if isinstance(text, bytes) else pieces_of(text)))
        return np.concatenate(rows) if rows else np.empty(0, np.int64)

    def encode_pieces(self, pieces: Iterable[str | bytes]) -> Iterator[NDArray[np.int64]]:
        """Encode a text given in pieces; the ids do not depend on where it is split.

        Yields several rows, or one row if the tokenizer's rule for words is not known here.
        """
        texts = _checked(pieces)
        if self._contents.own_rule:
            for words in self._splitter.split_pieces(texts):
                ids = chain.from_iterable(map(self._words.__getitem__, words))
                yield np.fromiter(ids, np.int64)
            return
        for text in _chunks(texts) if self._contents.splits_at_spaces else ["".join(texts)]:
            with refusals(CANNOT_ENCODE, quiet=len(text) < BRIEF):
                found = library_ids(self._library, text)
            yield np.array(found, np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        decoder = self.decoder()
        text = "".join([decoder.push(i) for i in check_ids(ids, self.vocab_size)])
        return text + decoder.finish()

    def decoder(self, *, continued: bool = False, after: Sequence[int] = ()) -> _BPEDecoder:
        """A decoder for ids that arrive one at a time; see `Tokenizer.decoder`."""
        found: _BPEDecoder = primed(_BPEDecoder(self._contents), after)
        return found

    def token_text(self, token_id: int) -> str:
        """One token as text; bytes that are not a complete character as \\xNN."""
        check_ids([token_id], self.vocab_size)
        return self._contents.tokens[token_id].decode("utf-8", "backslashreplace")

    def byte_lengths(self) -> NDArray[np.int64]:
        """The number of UTF-8 bytes of each id, (V,) int64; 0 for control tokens."""
        control = self._contents.control
        lengths = [0 if i in control else len(t) for i, t in enumerate(self._contents.tokens)]
        return np.array(lengths, dtype=np.int64)

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
        text = json.dumps(self._description, ensure_ascii=False, indent=1)
        try:
            Path(path).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> BPETokenizer:
        """Read a `tokenizer.json`; `InputError` if it is not byte-level BPE."""
        description = read_json(path)
        try:
            return cls(description)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a tokenizer's file; `InputError` if there is none."""
    return read_object(path, TOKENIZER, "is not a tokenizer's JSON")


class _Words(dict[str, list[int]]):
    """A cache from word to token ids; a missing word is merged by the library."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def __missing__(self, word: str) -> list[int]:
        if len(self) >= _MOST_WORDS:
            self.clear()
        self[word] = ids = [token.id for token in self._model.tokenize(_in_symbols(word))]
        return ids


_SYMBOL_OF_BYTE = dict(enumerate(SYMBOLS))


def _in_symbols(word: str) -> str:
    """A word's bytes in GPT-2's alphabet of 256 printable characters."""
    return word.encode("utf-8").decode("latin-1").translate(_SYMBOL_OF_BYTE)


def _checked(pieces: Iterable[str | bytes]) -> Iterator[str]:
    """Yield the pieces; raise `InputError` for bytes or a lone surrogate."""
    start = 0
    for piece in pieces:
        if isinstance(piece, bytes):
            raise InputError("a BPE tokenizer needs text, not bytes: use --tokenizer byte")
        encode_strictly(piece, "utf-8", start)
        yield piece
        start += len(piece)


class _Symbols(dict[str, str]):
    """A cache from word to `_in_symbols(word)`."""

    def __missing__(self, word: str) -> str:
        self[word] = symbols = _in_symbols(word)
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


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """The text in chunks of at least `_CHUNK` characters, split before a space after a letter."""
    waiting = ""
    for text in texts:
        waiting += text
        begin = 0
        while found := _LETTER_AND_SPACE.search(waiting, begin + _CHUNK):
            yield waiting[begin : found.end() - 1]
            begin = found.end() - 1
        waiting = waiting[begin:]
    if waiting:
        yield waiting


class _BPEDecoder:
    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that are complete so far."""
        data = self._contents.tokens[token_id]
        if token_id in self._contents.control:
            rest = self.finish()
            self._utf8.reset()
            return rest + data.decode("utf-8")
        return self._utf8.decode(data)

    def finish(self) -> str:
        """U+FFFD for an incomplete character, else the empty string."""
        return self._utf8.decode(b"", final=True)
