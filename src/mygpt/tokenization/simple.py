"""Tokenizers without a learned vocabulary: characters, and bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.core import tokenizer as core
from mygpt.errors import InputError, UnknownTokenError
from mygpt.tokenization import base
from mygpt.tokenization.base import END_OF_TEXT, Tokenizer, checked, encode_strictly, pieces_of
from mygpt.tokenization.tokenizer_json import BYTE_LEVEL, SYMBOLS, bpe_model, describe

_SHOWN = 20  # unknown characters listed in an error
# WordLevel requires a name for the unknown token. No vocabulary has this one, so an unknown
# character is an error in the library too (BPE without an unknown token would drop it).
_NO_SUCH_TOKEN = "<unknown>"


class CharTokenizer(Tokenizer, core.CharTokenizer):
    """Characters as tokens: `core`'s tokenizer, for text in pieces, documents and checkpoints.

    Args:
        chars: distinct characters; a character's id is its position.
        end_of_text: whether one more id, after the characters, separates documents. The
            tutorial's tokenizer has none.

    Attributes:
        chars: the characters, a list.
        stoi: character to id.
        itos: id to character.
    """

    kind = "char"

    def __init__(self, chars: Iterable[str], *, end_of_text: bool = False) -> None:
        core.CharTokenizer.__init__(self, chars)
        encode_strictly("".join(self.chars), "utf-8", 0)
        self.tokens = [char.encode() for char in self.chars]
        if end_of_text:
            self.end_of_text = len(self.chars)
            self.control = frozenset([self.end_of_text])
            self.tokens.append(END_OF_TEXT.encode())

    @classmethod
    def from_text(cls, text: str, *, end_of_text: bool = False) -> CharTokenizer:
        """The tokenizer of a text's sorted distinct characters."""
        found: set[str] = set()
        for piece in checked(pieces_of(text)):
            found.update(piece)
        return cls(sorted(found), end_of_text=end_of_text)

    def encode_array(self, text: str | bytes) -> NDArray[np.int64]:
        """Ids of `text`, (T,) int64; `UnknownTokenError` lists unknown characters."""
        ids = np.empty(len(text) if isinstance(text, str) else 0, np.int64)
        filled = 0
        for row in self.encode_pieces(pieces_of(text)):  # which refuses any other type
            ids[filled : filled + len(row)] = row
            filled += len(row)
        return ids

    def encode_pieces(self, pieces: Iterable[str | bytes]) -> Iterator[NDArray[np.int64]]:
        """Ids of a text given in pieces, one row per piece.

        Raises:
            UnknownTokenError: listing all unknown characters of the text.
        """
        start = 0
        rest = iter(pieces)
        for piece in rest:
            points = np.frombuffer(encode_strictly(piece, "utf-32-le", start), np.uint32)
            ids = self._ids_of_points[np.minimum(points, len(self._ids_of_points) - 1)]
            if len(ids) and ids.min() < 0:
                characters = set(str(piece))
                for unread in rest:
                    characters.update(str(unread))
                raise self._unknown(characters, start + int(ids.argmin()))
            yield ids.astype(np.int64)
            start += len(piece)

    @cached_property
    def _ids_of_points(self) -> NDArray[np.int32]:
        """The id of each code point up to one past the highest known; -1 for unknown ones."""
        known = np.array([ord(char) for char in self.chars])
        ids = np.full(known.max() + 2, -1, np.int32)
        ids[known] = np.arange(len(known))
        return ids

    def _unknown(self, characters: set[str], position: int) -> UnknownTokenError:
        """The error for a text of these characters, whose first unknown one is at `position`."""
        unknown = sorted(characters - self.stoi.keys())
        shown = unknown[:_SHOWN]
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        # Outside ASCII, different characters can look the same: the code points distinguish them.
        points = " ".join(f"U+{ord(char):04X}" for char in shown if not char.isascii())
        return UnknownTokenError(
            f"characters that are not in the vocabulary of {self.vocab_size}: "
            f"{' '.join(map(repr, shown))}{more} "
            f"({points}{points and '; '}first at position {position}); remove them, or train "
            "a model of bytes (--tokenizer byte)"
        )

    def unknown_spans(self, text: str) -> list[tuple[int, int]]:
        """The ranges (start, end) of characters outside the vocabulary."""
        return [(n, n + 1) for n, char in enumerate(text) if char not in self.stoi]

    def to_json(self) -> dict[str, Any]:
        """The content of a `tokenizer.json`, with each character as a word."""
        vocab = {token.decode(): number for number, token in enumerate(self.tokens)}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": _NO_SUCH_TOKEN}
        # Every single character, including newlines, which a dot does not match.
        cut = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated"}
        return describe(model, {**cut, "invert": False}, {"type": "Fuse"}, self.end_of_text)

    def to_state(self) -> dict[str, Any]:
        """The tokenizer's complete state as JSON values."""
        end = self.end_of_text is not None
        return {"kind": self.kind, "chars": self.chars, "end_of_text": end}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> CharTokenizer:
        """Rebuild from `to_state()`, or from the tutorial's JSON, which has only "chars"."""
        chars = state.get("chars")
        if not isinstance(chars, list):
            raise InputError('a character tokenizer\'s JSON needs "chars", a list of characters')
        return cls(chars, end_of_text=bool(state.get("end_of_text", False)))

    def save(self, path: str | Path) -> None:
        """Write the tutorial's JSON, `{"chars": [...]}`, and end-of-text if there is one."""
        end = {} if self.end_of_text is None else {"end_of_text": True}
        base.save(path, json.dumps({"chars": self.chars, **end}))

    @classmethod
    def load(cls, path: str | Path) -> CharTokenizer:
        """Read what `save` or the tutorial wrote; `InputError` if the file is another one."""
        return base.load(path, cls.from_state)


class ByteTokenizer(Tokenizer):
    """Bytes as tokens; id 256 is end-of-text. Any bytes can be encoded, not only UTF-8."""

    kind = "byte"
    tokens = (*(bytes([byte]) for byte in range(256)), END_OF_TEXT.encode())
    control = frozenset([256])
    end_of_text = 256

    def encode_array(self, text: str | bytes) -> NDArray[np.int64]:
        """Ids of a text's UTF-8, or of any bytes, (T,) int64."""
        return next(self.encode_pieces([text]))

    def encode_pieces(self, pieces: Iterable[str | bytes]) -> Iterator[NDArray[np.int64]]:
        """Ids of a text, or of bytes, given in pieces; one row per piece."""
        start = 0
        for piece in pieces:
            data = piece if isinstance(piece, bytes) else encode_strictly(piece, "utf-8", start)
            yield np.frombuffer(data, np.uint8).astype(np.int64)
            start += len(piece)

    def to_json(self) -> dict[str, Any]:
        """The content of a `tokenizer.json`: BPE without merges."""
        model = bpe_model([*SYMBOLS, END_OF_TEXT], [])
        return describe(model, BYTE_LEVEL, BYTE_LEVEL, self.end_of_text)

    def to_state(self) -> dict[str, Any]:
        """The tokenizer's complete state as JSON values."""
        return {"kind": self.kind}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ByteTokenizer:
        """Rebuild from `to_state()`."""
        return cls()
