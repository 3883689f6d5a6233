"""What every tokenizer has: the bytes of each id, from which all decoding follows, and encoding.

Letters: V vocabulary, T tokens of a text.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError, StorageError
from mygpt.json_objects import TOKENIZER, read_object

if TYPE_CHECKING:
    import torch

    from mygpt.tokenization.bpe import WordEncoder

# The token between documents. It has its own id: encoding text that spells it does not give it.
END_OF_TEXT = "<|endoftext|>"
_PIECE = 2**20  # characters
_LONGEST_CHARACTER = 8  # tokens: UTF-8 has at most 4 bytes, and some tokens have no bytes

_Made = TypeVar("_Made")


class IncrementalDecoder(Protocol):
    """Decodes ids one at a time, without emitting incomplete characters."""

    def push(self, token_id: int) -> str:
        """The text that is complete after `token_id`; may be empty."""
        ...

    def finish(self) -> str:
        """The rest at the end: U+FFFD for an incomplete character, or the empty string."""
        ...


class Tokenizer:
    """Encodes text to token ids and decodes them.

    A subclass sets `kind` and `tokens`, sets `encoder` or implements `encode_pieces`, and
    implements `to_state`, `from_state` and `to_json`.

    Attributes:
        kind: the name of the class in checkpoints.
        tokens: the bytes of each id, of a control token the UTF-8 of its name; not set for an
            imported tokenizer that decodes by other rules than concatenation.
        control: ids that no text is encoded as.
        end_of_text: the id between documents, or None.
        other_ends: further ids that end a text when they are sampled; only imported tokenizers
            have any.
        beginning: ids that precede every text; only imported tokenizers have any.
        is_lossless: whether decoding the ids of any text gives that text.
        encoder: encodes word by word; None if that is not byte-level BPE.
    """

    kind: str
    tokens: Sequence[bytes]
    control: frozenset[int] = frozenset()
    end_of_text: int | None = None
    other_ends: tuple[int, ...] = ()
    beginning: tuple[int, ...] = ()
    is_lossless: bool = True
    encoder: WordEncoder | None = None

    @property
    def vocab_size(self) -> int:
        """V, the number of ids, end-of-text included where there is one."""
        return len(self.tokens)

    def encode(self, text: str) -> torch.Tensor:
        """Ids of `text`, (T,) int64, without `beginning`; a lone surrogate is an `InputError`."""
        import torch

        return torch.from_numpy(self.encode_array(text))

    def encode_array(self, text: str | bytes) -> NDArray[np.int64]:
        """Ids of `text`, (T,) int64, without importing torch."""
        return np.concatenate([np.empty(0, np.int64), *self.encode_pieces(pieces_of(text))])

    def encode_pieces(self, pieces: Iterable[str | bytes]) -> Iterator[NDArray[np.int64]]:
        """Encode a text given in pieces: the concatenated rows are `encode_array`'s ids."""
        if self.encoder is None:
            raise NotImplementedError
        return self.encoder.encode_pieces(pieces)

    def encode_part(self, text: str) -> bytes:
        """The ids, int32, of a text that begins and ends where words do, as bytes: the fastest."""
        if self.encoder is not None:
            return self.encoder.encode_part(text)
        return b"".join(row.astype(np.int32).tobytes() for row in self.encode_pieces([text]))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, (T,); bytes that are not UTF-8 become U+FFFD.

        End-of-text shows as `<|endoftext|>`, other control tokens by their names.
        """
        data = map(self.tokens.__getitem__, check_ids(ids, self.vocab_size))
        return b"".join(data).decode("utf-8", "replace")

    def decoder(self, *, continued: bool = False, after: Sequence[int] = ()) -> IncrementalDecoder:
        """A new decoder for ids that arrive one at a time.

        Args:
            continued: whether the ids continue a text whose earlier ids are unknown.
            after: the earlier ids, if they are known. The decoder then returns what `decode`
                of all ids returns after `decode(after)`; a character that `after` leaves
                incomplete is returned complete.
        """
        decoder = _Utf8Decoder(self.tokens)
        for token_id in after[-_LONGEST_CHARACTER:]:
            decoder.push(token_id)
        return decoder

    def token_text(self, token_id: int) -> str:
        """One token as text, for display; bytes that are not a complete character as \\xNN."""
        check_ids([token_id], self.vocab_size)
        return self.tokens[token_id].decode("utf-8", "backslashreplace")

    def byte_lengths(self) -> NDArray[np.int64]:
        """The number of UTF-8 bytes of each id, (V,) int64; 0 for control tokens."""
        lengths = [0 if i in self.control else len(token) for i, token in enumerate(self.tokens)]
        return np.array(lengths, np.int64)

    def unknown_spans(self, text: str) -> list[tuple[int, int]]:
        """The ranges (start, end) of characters that the tokenizer does not know, in order."""
        return []

    def to_json(self) -> dict[str, Any]:
        """The content of a `tokenizer.json` for the `tokenizers` library and transformers."""
        raise NotImplementedError

    def to_state(self) -> dict[str, Any]:
        """The tokenizer's complete state as JSON values."""
        raise NotImplementedError


class _Utf8Decoder:
    """Emits each character once all of its bytes have arrived."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._tokens = tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that are complete so far."""
        return self._utf8.decode(self._tokens[token_id])

    def finish(self) -> str:
        """U+FFFD for an incomplete character, else the empty string."""
        return self._utf8.decode(b"", final=True)


def ends_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """All ids that end a text when they are sampled, `end_of_text` first."""
    end = tokenizer.end_of_text
    return (*(() if end is None else (end,)), *tokenizer.other_ends)


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


def pieces_of(text: str | bytes) -> Iterable[str | bytes]:
    """A text in pieces of about a million characters; bytes in one piece."""
    if not isinstance(text, str):
        return [text]
    return (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))


def checked(pieces: Iterable[str | bytes]) -> Iterator[str]:
    """The pieces of a text; `InputError` for bytes or a lone surrogate."""
    start = 0
    for piece in pieces:
        encode_strictly(piece, "utf-8", start)
        yield str(piece)
        start += len(piece)


def encode_strictly(piece: str | bytes, codec: str, start: int) -> bytes:
    """Encode a piece of text.

    Args:
        piece: characters.
        codec: a Unicode encoding.
        start: the position of the piece in the text, for the error message.

    Raises:
        InputError: for bytes, or a lone surrogate, which has no encoding.
    """
    if not isinstance(piece, str):
        raise InputError(
            f"this tokenizer needs text, a string, not {type(piece).__name__}: only --tokenizer "
            "byte encodes bytes"
        )
    try:
        return piece.encode(codec)
    except UnicodeEncodeError as error:
        raise InputError(
            f"text has a lone surrogate U+{ord(piece[error.start]):04X} at position "
            f"{start + error.start}: it is not a character; remove it"
        ) from None


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a tokenizer's file; `InputError` if there is none."""
    return read_object(path, TOKENIZER, "is not a tokenizer's JSON")


def load(path: str | Path, build: Callable[[dict[str, Any]], _Made]) -> _Made:
    """What `build` makes of the JSON object in a file; an `InputError` names the file."""
    content = read_json(path)
    try:
        return build(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def save(path: str | Path, text: str) -> None:
    """Write a tokenizer's file; `StorageError` if that is not possible."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
