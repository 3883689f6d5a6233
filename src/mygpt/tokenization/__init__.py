"""Text to token ids and back: characters, bytes, BPE or another's, behind one `Tokenizer`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mygpt.errors import InputError
from mygpt.tokenization.base import END_OF_TEXT, IncrementalDecoder, Tokenizer, ends_of
from mygpt.tokenization.bounds import check_bounds
from mygpt.tokenization.bpe import BPETokenizer, read_json
from mygpt.tokenization.byte import ByteTokenizer
from mygpt.tokenization.char import CharTokenizer
from mygpt.tokenization.ends import end_notes, find_ends
from mygpt.tokenization.foreign import ForeignTokenizer
from mygpt.tokenization.foreign_json import parts_of

__all__ = [
    "END_OF_TEXT",
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "ForeignTokenizer",
    "IncrementalDecoder",
    "Tokenizer",
    "end_notes",
    "ends_of",
    "from_state",
    "is_lossless",
    "load_tokenizer",
]


def is_lossless(tokenizer: Tokenizer) -> bool:
    """Whether the ids of any text decode to that text: nothing is unknown, changed or dropped."""
    return not isinstance(tokenizer, ForeignTokenizer) or tokenizer.is_lossless


def from_state(state: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from its `to_state()`, told apart by its "kind".

    Raises:
        InputError: for a kind this version does not know, or a state that is not whole.
    """
    kinds: dict[str, Any] = {
        known.kind: known
        for known in (CharTokenizer, ByteTokenizer, BPETokenizer, ForeignTokenizer)
    }
    kind = state.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(
            f"tokenizer kind {kind!r} is not known (known: {', '.join(kinds)}): upgrade mygpt"
        )
    tokenizer: Tokenizer = kinds[kind].from_state(state)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer's file: a character tokenizer's JSON, or a `tokenizer.json` of any kind.

    Raises:
        InputError: where it is neither, naming the file.
    """
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder: name a tokenizer's JSON file")
    content = read_json(path)
    if not {"chars", "model"} & set(content):
        raise InputError(
            f'{path} is no tokenizer: it has neither "chars" (characters) nor "model" (others)'
        )
    try:
        if "chars" in content:
            return CharTokenizer.from_state(content)
        return from_tokenizer_json(content, Path(path).parent)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def from_tokenizer_json(content: dict[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer that a `tokenizer.json` is: byte-level BPE where that holds it, else foreign.

    `BPETokenizer` has no place for what stands before every text, nor for another end of text
    than `<|endoftext|>`.

    Args:
        content: the JSON object.
        folder: where files may be that say what ends a text.

    Raises:
        InputError: where it is neither.
    """
    check_bounds(content)
    try:
        bpe = BPETokenizer(content)
    except InputError as as_bpe:
        try:
            return _foreign(content, folder)
        except InputError:
            raise as_bpe from None
    if bpe.uses_own_rule:
        return bpe
    foreign = _foreign(content, folder)
    return bpe if ends_of(foreign) == ends_of(bpe) and not foreign.beginning else foreign


def _foreign(content: dict[str, Any], folder: Path) -> ForeignTokenizer:
    end, others, _ = find_ends(content, parts_of(content), folder)
    return ForeignTokenizer(content, end_of_text=end, other_ends=others)
