"""Text to token ids and back: characters, bytes or BPE, behind one `Tokenizer` protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mygpt.errors import InputError
from mygpt.tokenization.base import END_OF_TEXT, IncrementalDecoder, Tokenizer
from mygpt.tokenization.bpe import BPETokenizer, read_json
from mygpt.tokenization.byte import ByteTokenizer
from mygpt.tokenization.char import CharTokenizer

__all__ = [
    "END_OF_TEXT",
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "IncrementalDecoder",
    "Tokenizer",
    "from_state",
    "load_tokenizer",
]


def from_state(state: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from its `to_state()`, told apart by its "kind".

    Raises:
        InputError: for a kind this version does not know, or a state that is not whole.
    """
    kinds: dict[str, Any] = {"char": CharTokenizer, "byte": ByteTokenizer, "bpe": BPETokenizer}
    kind = state.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(
            f"tokenizer kind {kind!r} is not known (known: {', '.join(kinds)}): upgrade mygpt"
        )
    tokenizer: Tokenizer = kinds[kind].from_state(state)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer's file: a character tokenizer's JSON, or a `tokenizer.json` of BPE.

    Raises:
        InputError: where it is neither, naming the file.
    """
    content = read_json(path)
    kinds = {"chars": CharTokenizer, "model": BPETokenizer}
    kind = next((kind for key, kind in kinds.items() if key in content), None)
    if kind is None:
        raise InputError(
            f'{path} is no tokenizer: it has neither "chars" (characters) nor "model" (BPE)'
        )
    try:
        return kind.from_state(content) if kind is CharTokenizer else kind(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
