"""Encode documents to one array of token ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mygpt.text import Document
from mygpt.tokenization import Tokenizer
from mygpt.tokenization.unknown import UnknownText, without_unknown


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
        documents: the text.
        tokens: its ids, 1-D.
        tokenizer: encoded it.
        before: earlier counts to add to; it is changed and returned.
    """
    found = before or UnknownText(tokenizer)
    if found.counts:
        found.add((piece for document in documents for piece in document.pieces()), tokens)
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
