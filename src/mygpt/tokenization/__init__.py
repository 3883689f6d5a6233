"""Text to token ids and back: characters or bytes, behind one `Tokenizer` protocol."""

from __future__ import annotations

from typing import Any

from mygpt.errors import InputError
from mygpt.tokenization.base import END_OF_TEXT, IncrementalDecoder, Tokenizer
from mygpt.tokenization.byte import ByteTokenizer
from mygpt.tokenization.char import CharTokenizer

__all__ = [
    "END_OF_TEXT",
    "ByteTokenizer",
    "CharTokenizer",
    "IncrementalDecoder",
    "Tokenizer",
    "from_state",
]


def from_state(state: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from its `to_state()`, told apart by its "kind".

    Raises:
        InputError: for a kind this version does not know, or a state that is not whole.
    """
    kinds: dict[str, Any] = {"char": CharTokenizer, "byte": ByteTokenizer}
    kind = state.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(
            f"tokenizer kind {kind!r} is not known (known: {', '.join(kinds)}): upgrade mygpt"
        )
    tokenizer: Tokenizer = kinds[kind].from_state(state)
    return tokenizer
