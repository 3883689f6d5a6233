"""What every tokenizer can do, and what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import torch

# The token between documents. It is an id of its own: text that spells it stays text.
END_OF_TEXT = "<|endoftext|>"
_PIECE = 2**20  # characters
LONGEST_CHARACTER = 8  # tokens: a character has four bytes, and some tokens may have none


class IncrementalDecoder(Protocol):
    """Turns ids into text as they come, never showing half a character."""

    def push(self, token_id: int) -> str:
        """The text that is certain once `token_id` has come; may be empty."""
        ...

    def finish(self) -> str:
        """What is left at the end: a replacement character for an unfinished one, or nothing."""
        ...


class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def kind(self) -> str:
        """The name under which checkpoints keep it."""
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
        """Ids that end a text too once they are drawn; none in tokenizers of our own."""
        ...

    @property
    def beginning(self) -> tuple[int, ...]:
        """Ids that stand before every text; none in tokenizers of our own."""
        ...

    def encode(self, text: str) -> torch.Tensor:
        """Ids of `text`, 1-D int64, without `beginning`."""
        ...

    def encode_array(self, text: str | bytes) -> NDArray[np.int64]:
        """Ids of `text`, 1-D int64, without torch."""
        ...

    def encode_pieces(self, pieces: Iterable[str | bytes]) -> Iterator[NDArray[np.int64]]:
        """Ids of a text that comes in pieces, in rows: `encode_array`'s, with little memory."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; end-of-text shows as `<|endoftext|>`."""
        ...

    def decoder(self, *, continued: bool = False, after: Sequence[int] = ()) -> IncrementalDecoder:
        """A fresh decoder for ids that come one by one.

        Args:
            continued: whether others come before, of which nothing is known.
            after: those that come before, where they are known. What the decoder gives is what
                `decode` makes of all ids, behind what it makes of these; of an unfinished
                character at their end all of it.
        """
        ...

    def token_text(self, token_id: int) -> str:
        """One token as text, for people to look at."""
        ...

    def byte_lengths(self) -> NDArray[np.int64]:
        """UTF-8 bytes each id stands for, (V,) int64; end-of-text stands for none."""
        ...

    def to_state(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        ...


def ends_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """All ids that end a text once they are drawn, `end_of_text` first."""
    end = tokenizer.end_of_text
    return (*(() if end is None else (end,)), *tokenizer.other_ends)


def primed(decoder: IncrementalDecoder, after: Sequence[int]) -> Any:
    """A decoder of bytes that has taken in the end of what comes before."""
    for token_id in after[-LONGEST_CHARACTER:]:
        decoder.push(token_id)
    return decoder


def shared_start(one: str, other: str) -> int:
    """How many characters two texts share at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def check_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """`ids` (a tensor, array or list) as a list; `InputError` for one outside the vocabulary."""
    if not hasattr(ids, "__iter__"):
        raise InputError(f"ids must be whole numbers in one row, not {type(ids).__name__}")
    array = np.asarray(ids if hasattr(ids, "__len__") else list(ids))
    if array.size == 0:
        return []
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise InputError(f"ids must be whole numbers in one row, not {array.dtype} {array.shape}")
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
    """A text in pieces of about a million characters; none of no text."""
    require_text(text)
    return (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))


def check_surrogates(text: str) -> None:
    """Raise `InputError` at a lone surrogate, which no file can hold and no byte spells."""
    start = 0
    for piece in pieces_of(text):
        encode_strictly(piece, "utf-8", start)
        start += len(piece)


def encode_strictly(piece: str, codec: str, start: int) -> bytes:
    """A piece of text in `codec`; `InputError` at a lone surrogate, as `check_surrogates`.

    Args:
        piece: characters.
        codec: a Unicode encoding.
        start: where in the text the piece begins.
    """
    require_text(piece)
    try:
        return piece.encode(codec)
    except UnicodeEncodeError as error:
        raise InputError(
            f"text has a lone surrogate U+{ord(piece[error.start]):04X} at position "
            f"{start + error.start}: it is not a character; remove it"
        ) from None
