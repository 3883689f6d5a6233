"""How much text a loss is about, and that loss in bits of it: the one conversion there is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mygpt.text.documents import Document, as_bytes


@dataclass(frozen=True)
class TextSize:
    """Predicted tokens, and the text that they stand for.

    The bytes and characters are the text's own, not those that the tokens decode to: a tokenizer
    that has an unknown token, or that normalises, decodes to another text.

    Attributes:
        tokens: that are predicted.
        num_bytes: of their text, in UTF-8.
        num_chars: of their text; None where it is bytes, or where it was not counted.
    """

    tokens: int
    num_bytes: int
    num_chars: int | None = None

    def bits_per_byte(self, loss: float) -> float:
        """A loss in nats per token as bits per byte of the text."""
        return loss / math.log(2) * self.tokens / max(1, self.num_bytes)

    def bits_per_char(self, loss: float) -> float | None:
        """A loss in nats per token as bits per character; None where they were not counted."""
        if self.num_chars is None:
            return None
        return loss / math.log(2) * self.tokens / max(1, self.num_chars)


def bytes_of(documents: Iterable[Document]) -> int:
    """Length of all documents in UTF-8 bytes."""
    return sum(len(as_bytes(piece)) for document in documents for piece in document.pieces())


def chars_of(documents: Iterable[Document]) -> int | None:
    """Characters of all documents; None where one is bytes."""
    lengths = [None if isinstance(each.whole, bytes) else len(each) for each in documents]
    known = [length for length in lengths if length is not None]
    return sum(known) if len(known) == len(lengths) else None
