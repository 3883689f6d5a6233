"""Words as tokens: one id per word, as in the tutorial before its chapter on tokenizers.

Letters: T tokens of a text, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError, UnknownTokenError
from mygpt.tokenization.base import (
    IncrementalDecoder,
    Tokenizer,
    check_ids,
    checked,
    encode_strictly,
)
from mygpt.tokenization.tokenizer_json import describe

# White space separates words. For Python it includes U+001C to U+001F, but not for Unicode and the
# tokenizers library, whose WhitespaceSplit the export uses.
_WORD = re.compile(r"[\S\x1c-\x1f]+")
_SHOWN = 20  # words listed in an error
# WordLevel requires a name for the unknown token. A word has no space, so an unknown word is an
# error in the library too.
_NO_SUCH_WORD = "<unknown word>"


class WordTokenizer(Tokenizer):
    """Words as tokens; white space separates them, and decoding joins them by single spaces.

    No token ends a text.

    Args:
        words: distinct words without white space; a word's id is its position.

    Attributes:
        words: the words, a list.

    Raises:
        InputError: for words that are not of this kind.
    """

    kind = "word"

    def __init__(self, words: Iterable[str]) -> None:
        self.words = list(words)
        wrong = [w for w in self.words if not isinstance(w, str) or not _WORD.fullmatch(w)]
        if not self.words or wrong or len(set(self.words)) != len(self.words):
            problem = f"wrong: {wrong[:5]}" if wrong else "there is none, or one is there twice"
            raise InputError(
                f"words must be distinct texts without white space, at least one ({problem:.200})"
            )
        self.tokens = [encode_strictly(word, "utf-8", 0) for word in self.words]
        self._ids = {word: number for number, word in enumerate(self.words)}

    def encode_pieces(self, pieces: Iterable[str | bytes]) -> Iterator[NDArray[np.int64]]:
        """Ids of a text given in pieces, one row per piece and one for a last word.

        Raises:
            UnknownTokenError: naming the unknown words of the piece, and the vocabulary.
        """
        start, waiting = 0, ""
        for piece in checked(pieces):
            text = waiting + piece
            # The next piece may continue the last word.
            end = next((n for n in range(len(text), 0, -1) if not _WORD.match(text[n - 1])), 0)
            yield self._ids_of(text[:end], start)
            start, waiting = start + end, text[end:]
        yield self._ids_of(waiting, start)

    def _ids_of(self, text: str, start: int) -> NDArray[np.int64]:
        """Ids of complete words; `start` is the position of the text, for the message."""
        words: list[str] = _WORD.findall(text)
        unknown = list(dict.fromkeys(word for word in words if word not in self._ids))
        if unknown:
            first = self.unknown_spans(text)[0][0] + start
            raise UnknownTokenError(
                f"words that are not in the vocabulary of {len(self.words):,} "
                f"({_listed(self.words)}): {_listed(list(map(_quoted, unknown)))} (first at "
                f"position {first}); use words of the vocabulary"
            )
        return np.array([self._ids[word] for word in words], np.int64)

    def unknown_spans(self, text: str) -> list[tuple[int, int]]:
        """The ranges (start, end) of words outside the vocabulary."""
        return [found.span() for found in _WORD.finditer(text) if found[0] not in self._ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The words of `ids`, (T,), joined by spaces."""
        return " ".join(self.words[i] for i in check_ids(ids, self.vocab_size))

    def decoder(self, *, continued: bool = False, after: Sequence[int] = ()) -> IncrementalDecoder:
        """A new decoder; after other text, a word includes the space before it."""
        return _Words(self.words, spaced=continued or len(after) > 0)

    def byte_lengths(self) -> NDArray[np.int64]:
        """The number of UTF-8 bytes of each word with one space, (V,) int64."""
        return np.array([len(token) + 1 for token in self.tokens], np.int64)

    def to_json(self) -> dict[str, Any]:
        """The content of a `tokenizer.json`: WordLevel, split at white space."""
        vocab = {word: number for number, word in enumerate(self.words)}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": _NO_SUCH_WORD}
        # Without a decoder the library joins tokens by spaces.
        return describe(model, {"type": "WhitespaceSplit"}, None, None)

    def to_state(self) -> dict[str, Any]:
        """The tokenizer's complete state as JSON values."""
        return {"kind": self.kind, "words": self.words}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> WordTokenizer:
        """Rebuild from `to_state()`, or from JSON that has only "words"."""
        words = state.get("words")
        if not isinstance(words, list):
            raise InputError('a word tokenizer\'s JSON needs "words", a list of words')
        return cls(words)


class _Words:
    """Emits each word when its id arrives."""

    def __init__(self, words: list[str], *, spaced: bool) -> None:
        self._words, self._spaced = words, spaced

    def push(self, token_id: int) -> str:
        """The word, after a space unless it is the text's first."""
        space, self._spaced = " " * self._spaced, True
        return space + self._words[token_id]

    def finish(self) -> str:
        """The empty string."""
        return ""


def _listed(words: list[str]) -> str:
    return f"{' '.join(words[:_SHOWN]):.400}" + " ..." * (len(words) > _SHOWN)


def _quoted(word: str) -> str:
    return f"{word!r:.40}"
