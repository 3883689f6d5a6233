"""The text that tokens stand for, also where they do not decode to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mygpt.data.token_store import StoredTokens
from mygpt.text import Document
from mygpt.text.sizes import TextSize, bytes_of, chars_of
from mygpt.tokenization import Tokenizer, is_lossless
from mygpt.tokenization.foreign import ForeignTokenizer

_PIECE = 2**20  # tokens whose lengths are looked up at once
_SPARE = 1024  # characters that are encoded beyond those that are expected to do


def predicted_size(
    documents: Sequence[Document] | None,
    tokens: NDArray[np.integer] | StoredTokens,
    tokenizer: Tokenizer,
    *,
    continued: bool = False,
) -> TextSize:
    """The text that all tokens but the first stand for: the first one is read, not predicted.

    Args:
        documents: the text of all the tokens; None where it is not in memory (then a tokenizer
            that decodes to another text gives an estimate, and characters are not counted).
        tokens: its ids, 1-D, at least one.
        tokenizer: that made them.
        continued: as `encode_documents` took it.
    """
    predicted = len(tokens) - 1
    chars = None if documents is None else chars_of(documents)
    if documents is None or is_lossless(tokenizer):
        lengths = tokenizer.byte_lengths()
        starts = range(1, len(tokens), _PIECE)
        num_bytes = sum(int(lengths[tokens[start : start + _PIECE]].sum()) for start in starts)
        first = int(tokens[:1][0])
        known = len(tokenizer.decode([first])) if lengths[first] else 0
        return TextSize(predicted, num_bytes, None if chars is None else chars - known)
    first_text = first_part(documents, tokenizer, 1, len(tokens), continued=continued)
    return TextSize(
        predicted,
        bytes_of(documents) - bytes_of(first_text),
        None if chars is None else chars - sum(map(len, first_text)),
    )


def first_part(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    count: int,
    total: int,
    *,
    continued: bool = False,
) -> list[Document]:
    """The documents that the first `count` of their ids stand for, the last of them cut.

    Args:
        documents: text.
        tokenizer: one whose tokens do not decode to the text.
        count: how many ids.
        total: ids of all documents, by which the length of the text is guessed.
        continued: as `encode_documents` takes it.
    """
    assert isinstance(tokenizer, ForeignTokenizer)
    chars_per_token = sum(map(len, documents)) / max(1, total)
    before = (tokenizer.end_of_text is not None) + len(tokenizer.beginning)
    found: list[Document] = []
    left = count
    for number, document in enumerate(documents):
        left -= 0 if continued and number == 0 else before
        if left <= 0:
            break
        guess = int(2 * left * chars_per_token) + _SPARE
        while True:
            text = str(replace(document, end=document.start + min(guess, len(document))).text)
            chars, ids = tokenizer.chars_of_first(text, left)
            if len(text) == len(document) or ids > left:
                break
            guess *= 2
        found.append(replace(document, end=document.start + chars))
        if ids >= left:
            break
        left -= ids
    return found
