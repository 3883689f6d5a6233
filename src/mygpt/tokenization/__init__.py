"""Tokenizers: characters, bytes, BPE and imported ones, all with the `Tokenizer` protocol."""

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
    """Whether decoding the ids of any text gives that text: nothing is unknown or normalised."""
    return not isinstance(tokenizer, ForeignTokenizer) or tokenizer.is_lossless


def from_state(state: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from its `to_state()`, whose "kind" names the class.

    Raises:
        InputError: if this version does not know the kind, or if the state is incomplete.
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
    """Read a tokenizer from a file: a character tokenizer's JSON or any `tokenizer.json`.

    Raises:
        InputError: if the file is neither; the message names it.
    """
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder: name a tokenizer's JSON file")
    content = read_json(path)
    if not {"chars", "model"} & set(content):
        raise InputError(
            f'{path} is not a tokenizer: it has neither "chars" (of a character tokenizer) nor '
            '"model" (of a tokenizer.json)'
        )
    try:
        if "chars" in content:
            return CharTokenizer.from_state(content)
        return from_tokenizer_json(content, Path(path).parent)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def from_tokenizer_json(content: dict[str, Any], folder: Path) -> Tokenizer:
    """Build the tokenizer that a `tokenizer.json` describes.

    It is a `BPETokenizer` if that class can represent it, else a `ForeignTokenizer`. The former
    cannot represent tokens before every text, nor an end-of-text token other than
    `<|endoftext|>`.

    Args:
        content: the JSON object.
        folder: the folder of the file, whose configuration files may name the end-of-text token.

    Raises:
        InputError: if neither class supports it.
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
