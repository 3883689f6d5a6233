"""Tokenizers: characters, bytes, words, BPE and imported ones, all subclasses of `Tokenizer`."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from mygpt.errors import InputError
from mygpt.tokenization.base import END_OF_TEXT, Tokenizer, ends_of, load
from mygpt.tokenization.bpe import BPETokenizer
from mygpt.tokenization.ends import end_notes, find_ends
from mygpt.tokenization.foreign import ForeignTokenizer
from mygpt.tokenization.simple import ByteTokenizer, CharTokenizer
from mygpt.tokenization.tokenizer_json import TokenizerFile
from mygpt.tokenization.word_level import WordTokenizer

__all__ = [
    "END_OF_TEXT",
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "ForeignTokenizer",
    "Tokenizer",
    "WordTokenizer",
    "end_notes",
    "ends_of",
    "from_state",
    "load_tokenizer",
    "from_tokenizer_json",
]


def from_state(state: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from its `to_state()`, whose "kind" names the class.

    Raises:
        InputError: if this version does not know the kind, or if the state is incomplete.
    """
    kinds: dict[str, Any] = {
        known.kind: known
        for known in (
            CharTokenizer,
            ByteTokenizer,
            WordTokenizer,
            BPETokenizer,
            ForeignTokenizer,
        )
    }
    kind = state.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(
            f"tokenizer kind {kind!r} is not known (known: {', '.join(kinds)}): upgrade mygpt"
        )
    tokenizer: Tokenizer = kinds[kind].from_state(state)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer from a file: JSON of characters or words, or any `tokenizer.json`.

    Raises:
        InputError: if the file is neither; the message names it.
    """
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder: name a tokenizer's JSON file")

    def build(content: dict[str, Any]) -> Tokenizer:
        if "chars" in content:
            return CharTokenizer.from_state(content)
        if "words" in content:
            return WordTokenizer.from_state(content)
        if "model" in content:
            return from_tokenizer_json(TokenizerFile(content), Path(path).parent)[0]
        raise InputError(
            'it is not a tokenizer: it has neither "chars" or "words" (a list of them) nor '
            '"model" (of a tokenizer.json)'
        )

    return load(path, build)


def from_tokenizer_json(
    file: TokenizerFile,
    folder: Path,
    *,
    vocab_size: int | None = None,
    implied_end: str | None = None,
) -> tuple[Tokenizer, list[str]]:
    """Build the tokenizer that a `tokenizer.json` describes.

    It is a `BPETokenizer` if that class gives the same ids for all texts, else a
    `ForeignTokenizer`. The former cannot represent tokens before every text, an end-of-text token
    other than `<|endoftext|>`, or ids without a token.

    Args:
        file: the `tokenizer.json`.
        folder: its folder, whose configuration files may name the end-of-text token.
        vocab_size: V of the model; None is the tokenizer's.
        implied_end: the end-of-text token that the tokenizer's class implies.

    Returns:
        The tokenizer, and notes for the user.

    Raises:
        InputError: if neither class supports it.
    """
    end, others, notes = find_ends(file, folder, vocab_size=vocab_size, implied=implied_end)
    if not others and not file.ids_around("cls") and vocab_size in (None, file.size):
        with suppress(InputError):  # it is not byte-level BPE
            if file.byte_level.end_of_text == end:
                return BPETokenizer(file), notes
    foreign = ForeignTokenizer(file, end_of_text=end, other_ends=others, vocab_size=vocab_size)
    return foreign, notes
