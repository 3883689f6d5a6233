"""The size of the text that tokens were encoded from, even if they do not decode to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mygpt.data.token_store import StoredTokens
from mygpt.text import Document
from mygpt.text.documents import TextSize, bytes_of, chars_of
from mygpt.tokenization import Tokenizer
from mygpt.tokenization.foreign import ForeignTokenizer

_PIECE = 2**20  # tokens whose lengths are looked up at once
_SPARE = 1024  # characters encoded in addition to the estimated number


def predicted_size(
    documents: Sequence[Document] | None,
    tokens: NDArray[np.integer] | StoredTokens,
    tokenizer: Tokenizer,
    *,
    continued: bool = False,
) -> TextSize:
    """The size of the text of all tokens but the first, which is an input and not predicted.

    Args:
        documents: the text of the tokens; None if it is not in memory. The size is then an
            estimate for a tokenizer that is not lossless, and characters are not counted.
        tokens: its ids, 1-D, at least one.
        tokenizer: encoded the text.
        continued: as passed to `encode_documents`.
    """
    predicted = len(tokens) - 1
    chars = None if documents is None else chars_of(documents)
    if documents is None or tokenizer.is_lossless:
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
    """The text that the first `count` ids of documents cover; the last document may be cut.

    Args:
        documents: the text.
        tokenizer: an imported one, which need not be lossless.
        count: number of ids.
        total: number of ids of all documents, from which the length of the text is estimated.
        continued: as passed to `encode_documents`.
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
