"""Characters as tokens: one id per distinct character (the tutorial's chapter 16)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError, UnknownTokenError

if TYPE_CHECKING:
    import torch

_SHOWN = 20  # unknown characters listed in an error


class CharTokenizer:
    """A character's id is its position in `chars`; `from_text` sorts by code point.

    Attributes:
        chars: the distinct characters, a list.
        stoi: character to id.
        itos: id to character.
    """

    def __init__(self, chars: Iterable[str]) -> None:
        self.chars = list(chars)
        if not self.chars:
            raise InputError(
                "a character tokenizer needs at least one character: the text is empty"
            )
        wrong = [c for c in self.chars if not isinstance(c, str) or len(c) != 1]
        if wrong or len(set(self.chars)) != len(self.chars):
            raise InputError(f"chars must be distinct single characters (wrong: {wrong[:5]})")
        self.stoi = {char: i for i, char in enumerate(self.chars)}
        self.itos = dict(enumerate(self.chars))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """The tokenizer of a text's sorted distinct characters."""
        return cls(sorted(set(text)))

    @property
    def vocab_size(self) -> int:
        """V, the number of ids."""
        return len(self.chars)

    def encode(self, text: str) -> torch.Tensor:
        """Ids of `text`, a 1-D int64 tensor; `UnknownTokenError` lists unknown characters."""
        import torch

        ids = self.ids_of(text.encode("utf-32-le", "surrogatepass"))
        if len(ids) and ids.min() < 0:
            raise self.unknown(set(text), int(ids.argmin()))
        return torch.from_numpy(ids)

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
        # Outside ASCII, different characters can look the same: the code points tell them apart.
        points = " ".join(f"U+{ord(char):04X}" for char in shown if not char.isascii())
        return UnknownTokenError(
            f"characters that are not in the vocabulary of {len(self.chars)}: "
            f"{' '.join(map(repr, shown))}{more} "
            f"({points}{points and '; '}first at position {position}); leave them out, or train "
            "on a text that has them"
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, a 1-D tensor, array or list."""
        return "".join(self.itos[int(i)] for i in ids)
