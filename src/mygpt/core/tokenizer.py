"""Characters as tokens: one id per distinct character (the tutorial's chapter 16)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

from mygpt.errors import InputError, UnknownTokenError

if TYPE_CHECKING:
    import torch


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

        if unknown := sorted(set(text) - self.stoi.keys()):
            raise UnknownTokenError(f"characters that are not in the vocabulary: {unknown}")
        return torch.tensor([self.stoi[char] for char in text], dtype=torch.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, a 1-D tensor, array or list."""
        return "".join(self.itos[int(i)] for i in ids)
