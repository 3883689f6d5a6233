"""The `Tokenizer` protocol, and functions that the tokenizers share.

Letters: V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import torch

# The token between documents. It has its own id: encoding text that spells it does not give it.
END_OF_TEXT = "<|endoftext|>"
_PIECE = 2**20  # characters
LONGEST_CHARACTER = 8  # tokens: UTF-8 has at most 4 bytes, and some tokens have no bytes


class IncrementalDecoder(Protocol):
    """Decodes ids one at a time, without emitting incomplete characters."""

    def push(self, token_id: int) -> str:
        """The text that is complete after `token_id`; may be empty."""
        ...

    def finish(self) -> str:
        """The rest at the end: U+FFFD for an incomplete character, or the empty string."""
        ...


class Tokenizer(Protocol):
    """Encodes text to token ids and decodes them."""

    @property
    def kind(self) -> str:
        """The name of the tokenizer's class in checkpoints."""
        ...

    @property
    def vocab_size(self) -> int:
        """V, the number of ids, end-of-text included where there is one."""
        ...

    @property
    def end_of_text(self) -> int | None:
        """The id between documents, or None."""
        ...

    @property
    def other_ends(self) -> tuple[int, ...]:
        """Further ids that end a text when they are sampled; only imported tokenizers have any."""
        ...

    @property
    def beginning(self) -> tuple[int, ...]:
        """Ids that precede every text; only imported tokenizers have any."""
        ...

    def encode(self, text: str) -> torch.Tensor:
        """Ids of `text`, 1-D int64, without `beginning`."""
        ...

    def encode_array(self, text: str | bytes) -> NDArray[np.int64]:
        """Ids of `text`, a 1-D int64 array, without importing torch."""
        ...

    def encode_pieces(self, pieces: Iterable[str | bytes]) -> Iterator[NDArray[np.int64]]:
        """Encode a text given in pieces: the concatenated rows are `encode_array`'s ids."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; end-of-text shows as `<|endoftext|>`."""
        ...

    def decoder(self, *, continued: bool = False, after: Sequence[int] = ()) -> IncrementalDecoder:
        """A new decoder for ids that arrive one at a time.

        Args:
            continued: whether the ids continue a text whose earlier ids are unknown.
            after: the earlier ids, if they are known. The decoder then returns what `decode`
                of all ids returns after `decode(after)`; a character that `after` leaves
                incomplete is returned whole.
        """
        ...

    def token_text(self, token_id: int) -> str:
        """One token as text, for display."""
        ...

    def byte_lengths(self) -> NDArray[np.int64]:
        """The number of UTF-8 bytes that each id decodes to, (V,) int64; 0 for end-of-text."""
        ...

    def to_state(self) -> dict[str, Any]:
        """The tokenizer's complete state as JSON values."""
        ...


def ends_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """All ids that end a text when they are sampled, `end_of_text` first."""
    end = tokenizer.end_of_text
    return (*(() if end is None else (end,)), *tokenizer.other_ends)


def primed(decoder: IncrementalDecoder, after: Sequence[int]) -> Any:
    """A byte-level decoder that has processed the last ids of the preceding text."""
    for token_id in after[-LONGEST_CHARACTER:]:
        decoder.push(token_id)
    return decoder


def shared_start(one: str, other: str) -> int:
    """The length of the longest common prefix of two texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def check_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """`ids` (a tensor, array or list) as a list.

    Raises:
        InputError: if they are not 1-D integers, or one is outside the vocabulary.
    """
    if not hasattr(ids, "__iter__"):
        raise InputError(f"ids must be a sequence of integers, not {type(ids).__name__}")
    array = np.asarray(ids if hasattr(ids, "__len__") else list(ids))
    if array.size == 0:
        return []
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise InputError(
            f"ids must be a 1-D sequence of integers, not {array.dtype} of shape {array.shape}"
        )
    outside = (array < 0) | (array >= vocab_size)
    if outside.any():
        raise InputError(
            f"id {array[outside][0]} at position {int(outside.argmax())} is outside the "
            f"vocabulary: ids run from 0 to {vocab_size - 1}"
        )
    values: list[int] = array.tolist()
    return values


def require_text(text: object) -> None:
    """Raise `InputError` unless `text` is a string."""
    if not isinstance(text, str):
        raise InputError(f"a text must be a string, not {type(text).__name__}")


def pieces_of(text: str) -> Iterator[str]:
    """A text in pieces of about a million characters; no piece for the empty text."""
    require_text(text)
    return (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))


def check_surrogates(text: str) -> None:
    """Raise `InputError` for a lone surrogate, which has no encoding in UTF-8."""
    start = 0
    for piece in pieces_of(text):
        encode_strictly(piece, "utf-8", start)
        start += len(piece)


def encode_strictly(piece: str, codec: str, start: int) -> bytes:
    """Encode a piece of text.

    Args:
        piece: characters.
        codec: a Unicode encoding.
        start: the position of the piece in the text, for the error message.

    Raises:
        InputError: for a lone surrogate.
    """
    require_text(piece)
    try:
        return piece.encode(codec)
    except UnicodeEncodeError as error:
        raise InputError(
            f"text has a lone surrogate U+{ord(piece[error.start]):04X} at position "
            f"{start + error.start}: it is not a character; remove it"
        ) from None
