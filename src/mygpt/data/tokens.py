"""Documents to one row of token ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mygpt.text import Document
from mygpt.tokenization import Tokenizer


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


def dtype_of(tokenizer: Tokenizer) -> type[np.uint16 | np.int32]:
    """The numbers that tokens are kept in."""
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
