"""The character tokenizer of `core`, extended for text in pieces, documents and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mygpt.core import tokenizer as core
from mygpt.errors import InputError, StorageError, UnknownTokenError
from mygpt.json_objects import TOKENIZER, read_object
from mygpt.tokenization.base import (
    END_OF_TEXT,
    check_ids,
    check_surrogates,
    encode_strictly,
    pieces_of,
)

if TYPE_CHECKING:
    import torch

_SHOWN = 20  # unknown characters listed in an error


class CharTokenizer(core.CharTokenizer):
    """Characters as tokens.

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
    beginning: tuple[int, ...] = ()
    other_ends: tuple[int, ...] = ()

    def __init__(self, chars: Iterable[str], *, end_of_text: bool = False) -> None:
        super().__init__(chars)
        check_surrogates("".join(self.chars))
        self.end_of_text = len(self.chars) if end_of_text else None

    @classmethod
    def from_text(cls, text: str, *, end_of_text: bool = False) -> CharTokenizer:
        """The tokenizer of a text's sorted distinct characters."""
        check_surrogates(text)
        return cls(sorted(set(text)), end_of_text=end_of_text)

    @property
    def vocab_size(self) -> int:
        """V, the number of ids, including end-of-text if there is one."""
        return len(self.chars) + (self.end_of_text is not None)

    def encode(self, text: str) -> torch.Tensor:
        """Ids of `text`, a 1-D int64 tensor; `UnknownTokenError` lists unknown characters."""
        import torch

        return torch.from_numpy(self.encode_array(text))

    def encode_array(self, text: str | bytes) -> NDArray[np.int64]:
        """Ids of `text`, a 1-D int64 array; `UnknownTokenError` lists unknown characters."""
        rows = self.encode_pieces([text] if isinstance(text, bytes) else pieces_of(text))
        ids = np.empty(len(text), np.int64)
        filled = 0
        for row in rows:
            ids[filled : filled + len(row)] = row
            filled += len(row)
        return ids

    def encode_pieces(self, pieces: Iterable[str | bytes]) -> Iterator[NDArray[np.int64]]:
        """Ids of a text given in pieces, one row per piece; raises as `encode_array` does."""
        start = 0
        rest = iter(pieces)
        for piece in rest:
            if isinstance(piece, bytes):
                raise InputError(
                    "a character tokenizer needs text, not bytes: use --tokenizer byte"
                )
            ids = self.ids_of(encode_strictly(piece, "utf-32-le", start))
            if len(ids) and ids.min() < 0:
                characters: set[str] = set()
                for unread in chain([piece], rest):
                    characters.update(str(unread))
                raise self.unknown(characters, start + int(ids.argmin()))
            yield ids
            start += len(piece)

    def ids_of(self, utf_32: bytes) -> NDArray[np.int64]:
        """Ids of characters encoded as UTF-32-LE, (T,) int64; -1 for those that have none."""
        points = np.frombuffer(utf_32, dtype=np.uint32)
        ids = self._ids_of_points[np.minimum(points, len(self._ids_of_points) - 1)]
        return ids.astype(np.int64)

    @cached_property
    def _ids_of_points(self) -> NDArray[np.int32]:
        """The id of each code point up to one past the highest known; -1 for unknown ones."""
        known = np.array([ord(char) for char in self.chars])
        ids = np.full(known.max() + 2, -1, np.int32)
        ids[known] = np.arange(len(known))
        return ids

    def unknown(self, characters: set[str], position: int) -> UnknownTokenError:
        """The error for a text of these characters, whose first unknown one is at `position`."""
        unknown = sorted(characters - set(self.chars))
        shown = unknown[:_SHOWN]
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        # Outside ASCII, different characters can look the same: the code points distinguish them.
        points = " ".join(f"U+{ord(char):04X}" for char in shown if not char.isascii())
        return UnknownTokenError(
            f"characters that are not in the vocabulary of {len(self.chars)}: "
            f"{' '.join(map(repr, shown))}{more} "
            f"({points}{points and '; '}first at position {position}); leave them out, or train "
            "on a text that has them"
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; `InputError` for an id outside the vocabulary."""
        return "".join(self._text(i) for i in check_ids(ids, self.vocab_size))

    def _text(self, token_id: int) -> str:
        return END_OF_TEXT if token_id == self.end_of_text else self.chars[token_id]

    def token_text(self, token_id: int) -> str:
        """One token as text."""
        return self.decode([token_id])

    def decoder(self, *, continued: bool = False, after: Sequence[int] = ()) -> _CharDecoder:
        """A decoder for ids that arrive one at a time; preceding ids do not matter."""
        return _CharDecoder(self)

    def byte_lengths(self) -> NDArray[np.int64]:
        """The number of UTF-8 bytes of each id, (V,) int64; 0 for end-of-text."""
        lengths = [len(char.encode("utf-8")) for char in self.chars]
        return np.array(lengths + [0] * (self.end_of_text is not None), dtype=np.int64)

    def to_state(self) -> dict[str, Any]:
        """The tokenizer's complete state as JSON values."""
        return {
            "kind": self.kind,
            "chars": self.chars,
            "end_of_text": self.end_of_text is not None,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> CharTokenizer:
        """Rebuild from `to_state()`, or from the tutorial's JSON, which has only "chars"."""
        chars = state.get("chars")
        if not isinstance(chars, list):
            raise InputError('a character tokenizer\'s JSON needs "chars", a list of characters')
        return cls(chars, end_of_text=bool(state.get("end_of_text", False)))

    def save(self, path: str | Path) -> None:
        """Write the tutorial's JSON, `{"chars": [...]}`, and end-of-text if there is one."""
        state: dict[str, Any] = {"chars": self.chars}
        if self.end_of_text is not None:
            state["end_of_text"] = True
        try:
            Path(path).write_text(json.dumps(state), encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> CharTokenizer:
        """Read what `save` or the tutorial wrote; `InputError` if the file is another one."""
        state = read_object(path, TOKENIZER, "is not a tokenizer's JSON")
        try:
            return cls.from_state(state)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


class _CharDecoder:
    def __init__(self, tokenizer: CharTokenizer) -> None:
        self._tokenizer = tokenizer

    def push(self, token_id: int) -> str:
        """The character of `token_id`."""
        return self._tokenizer.token_text(token_id)

    def finish(self) -> str:
        """The empty string: a character is never incomplete."""
        return ""
