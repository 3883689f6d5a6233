"""Documents to one row of token ids."""

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
    """Ids of all documents in one row, end-of-text before each where the tokenizer has it.

    After it comes what the tokenizer puts before every text.

    Args:
        documents: in order.
        tokenizer: what encodes them.
        continued: the first document goes on from text that came before: nothing before it.

    Returns:
        1-D, uint16 where the vocabulary fits, else int32.
    """
    dtype = dtype_of(tokenizer)
    row = bytearray()  # it grows in place: parts put together at the end would be there twice
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
    """What the tokenizer does not know of documents, which became these tokens.

    With `before` they are counted with the texts that it has counted.
    """
    found = before or UnknownText(tokenizer)
    if found.counts:
        found.add((piece for document in documents for piece in document.pieces()), tokens)
    return found


def drop_unknown(
    documents: Sequence[Document], tokenizer: Tokenizer
) -> tuple[list[Document], list[str]]:
    """Documents without what the tokenizer does not know, and what that is, each once.

    Those of which nothing is left go; the others are parts no longer.
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
    """The numbers that tokens are kept in."""
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
