"""The size of a text that a loss was measured on, and the loss in bits per byte and character."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mygpt.text.documents import Document, as_bytes


@dataclass(frozen=True)
class TextSize:
    """The number of predicted tokens, and the size of the text that was encoded to them.

    The text is the original one, which the tokens need not decode to: a tokenizer may normalise
    text or have an unknown token.

    Attributes:
        tokens: number of predicted tokens.
        num_bytes: of their text in UTF-8.
        num_chars: of their text; None if it is bytes or was not counted.
    """

    tokens: int
    num_bytes: int
    num_chars: int | None = None

    def bits_per_byte(self, loss: float) -> float:
        """Convert a loss in nats per token to bits per byte of the text."""
        return loss / math.log(2) * self.tokens / max(1, self.num_bytes)

    def bits_per_char(self, loss: float) -> float | None:
        """Convert a loss in nats per token to bits per character; None if `num_chars` is None."""
        if self.num_chars is None:
            return None
        return loss / math.log(2) * self.tokens / max(1, self.num_chars)


def bytes_of(documents: Iterable[Document]) -> int:
    """Total length of the documents in UTF-8 bytes."""
    return sum(len(as_bytes(piece)) for document in documents for piece in document.pieces())


def chars_of(documents: Iterable[Document]) -> int | None:
    """Total number of characters in the documents; None if one of them is bytes."""
    lengths = [None if isinstance(each.whole, bytes) else len(each) for each in documents]
    known = [length for length in lengths if length is not None]
    return sum(known) if len(known) == len(lengths) else None
