"""Encode documents to one array of token ids, and find the size of the text of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mygpt.data.token_store import StoredTokens
from mygpt.text import Document
from mygpt.text.documents import TextSize, bytes_of, chars_of
from mygpt.tokenization import ForeignTokenizer, Tokenizer
from mygpt.tokenization.unknown import UnknownText, without_unknown

_PIECE = 2**20  # tokens whose lengths are looked up at once
_SPARE = 1024  # characters encoded in addition to the estimated number


def encode_documents(
    documents: Sequence[Document], tokenizer: Tokenizer, *, continued: bool = False
) -> NDArray[np.integer]:
    """The concatenated ids of documents.

    Before each document come the end-of-text token, if the tokenizer has one, and the tokens that
    it puts before every text (`Tokenizer.beginning`).

    Args:
        documents: in order.
        tokenizer: encodes them.
        continued: whether the first document continues earlier text; no tokens then precede it.

    Returns:
        1-D, uint16 if the vocabulary has at most 65,536 tokens, else int32.

    Raises:
        InputError: as the tokenizer does.
    """
    dtype = dtype_of(tokenizer)
    row = bytearray()  # grows in place: concatenating arrays at the end would need twice the memory
    for number, document in enumerate(documents):
        if not (continued and number == 0):
            ends = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
            row += np.array([*ends, *tokenizer.beginning], dtype).tobytes()
        for ids in tokenizer.encode_pieces(document.pieces()):
            row += ids.astype(dtype).tobytes()
    return np.frombuffer(row, dtype)


def unknown_in(
    documents: Sequence[Document],
    tokens: NDArray[np.integer],
    tokenizer: Tokenizer,
    before: UnknownText | None = None,
) -> UnknownText:
    """Count the text in documents that is unknown to the tokenizer.

    Args:
        documents: the text; empty if only its ids are available.
        tokens: its ids, 1-D.
        tokenizer: encoded it.
        before: earlier counts to add to; it is changed and returned.
    """
    found = before or UnknownText(tokenizer)
    if found.counts:
        pieces = (piece for document in documents for piece in document.pieces())
        found.add(pieces if documents else None, tokens)
    return found


def drop_unknown(
    documents: Sequence[Document], tokenizer: Tokenizer
) -> tuple[list[Document], list[str]]:
    """Remove unknown characters and words from documents.

    Returns:
        The documents that are not empty afterwards, and the distinct removed strings in order.
    """
    kept: list[Document] = []
    left: dict[str, None] = {}
    for document in documents:
        text = document.text
        if isinstance(text, str):
            text, lost = without_unknown(tokenizer, text)
            left.update(dict.fromkeys(lost))
        if text:
            kept.append(Document(document.name, text))
    return kept, list(left)


def dtype_of(tokenizer: Tokenizer) -> type[np.uint16 | np.int32]:
    """The integer type that a tokenizer's ids are stored in."""
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32


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
