"""Bytes as tokens: any input can be encoded, and there is no vocabulary to learn."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mygpt.tokenization.base import END_OF_TEXT, check_ids, encode_strictly, primed

if TYPE_CHECKING:
    import torch


class ByteTokenizer:
    """Bytes as tokens; id 256 is end-of-text."""

    kind = "byte"
    beginning: tuple[int, ...] = ()
    other_ends: tuple[int, ...] = ()
    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> torch.Tensor:
        """Ids of `text`'s UTF-8 bytes, a 1-D int64 tensor; a lone surrogate is an `InputError`."""
        import torch

        return torch.from_numpy(self.encode_array(text))

    def encode_array(self, text: str | bytes) -> NDArray[np.int64]:
        """Ids of `text`'s UTF-8 bytes, or of any bytes, a 1-D int64 array."""
        data = text if isinstance(text, bytes) else encode_strictly(text, "utf-8", 0)
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64)

    def encode_pieces(self, pieces: Iterable[str | bytes]) -> Iterator[NDArray[np.int64]]:
        """Ids of a text, or of bytes, given in pieces; one row per piece."""
        start = 0
        for piece in pieces:
            data = encode_strictly(piece, "utf-8", start) if isinstance(piece, str) else piece
            yield np.frombuffer(data, dtype=np.uint8).astype(np.int64)
            start += len(piece)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        decoder = self.decoder()
        text = "".join([decoder.push(i) for i in check_ids(ids, self.vocab_size)])
        return text + decoder.finish()

    def token_text(self, token_id: int) -> str:
        """One byte as text where it is ASCII, else as \\xNN."""
        check_ids([token_id], self.vocab_size)
        if token_id == self.end_of_text:
            return END_OF_TEXT
        return chr(token_id) if token_id < 128 else f"\\x{token_id:02x}"

    def decoder(self, *, continued: bool = False, after: Sequence[int] = ()) -> _ByteDecoder:
        """A decoder for ids that arrive one at a time; see `Tokenizer.decoder`."""
        found: _ByteDecoder = primed(_ByteDecoder(), after)
        return found

    def byte_lengths(self) -> NDArray[np.int64]:
        """The number of bytes of each id, (V,) int64: 1, but 0 for end-of-text."""
        return np.array([1] * 256 + [0], dtype=np.int64)

    def to_state(self) -> dict[str, Any]:
        """The tokenizer's complete state as JSON values."""
        return {"kind": self.kind}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ByteTokenizer:
        """Rebuild from `to_state()`."""
        return cls()


class _ByteDecoder:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that are complete so far."""
        if token_id == ByteTokenizer.end_of_text:
            rest = self._utf8.decode(b"", final=True)
            self._utf8.reset()
            return rest + END_OF_TEXT
        return self._utf8.decode(bytes((token_id,)))

    def finish(self) -> str:
        """U+FFFD for an incomplete character, else the empty string."""
        return self._utf8.decode(b"", final=True)
