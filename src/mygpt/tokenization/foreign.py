"""Any tokenizer that the `tokenizers` library reads, with the `Tokenizer` protocol.

It is used for an imported model whose tokenizer `BPETokenizer` cannot represent: character merges
with byte fallback (Llama 2), Unigram, WordPiece, normalisers, another end-of-text token, or more
rows in the model than there are tokens. The library encodes and decodes; this class ensures that
text never becomes a control token.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError, require_int
from mygpt.tokenization.base import (
    IncrementalDecoder,
    check_ids,
    encode_strictly,
    ends_of,
)
from mygpt.tokenization.bpe import BPETokenizer
from mygpt.tokenization.foreign_decoding import TokenDecoding
from mygpt.tokenization.foreign_json import parts_of, prefix_ids, special_ids
from mygpt.tokenization.tokenizer_json import BRIEF, CANNOT_ENCODE, library_ids, refusals

if TYPE_CHECKING:
    import torch


class ForeignTokenizer:
    """An imported tokenizer.

    Text that spells a control token is encoded as ordinary text, and encoding adds no tokens; the
    tokens that the file puts before every text (Llama's `<s>`) are in `beginning`. For a character
    outside its vocabulary the tokenizer gives its unknown token, nothing, or an `InputError`.

    Args:
        description: the JSON object in a `tokenizer.json`.
        end_of_text: the id between documents, treated as a control token; None if there is none.
        other_ends: further ids that end a text when they are sampled, also control tokens.
        vocab_size: V of the model, if that has more rows than there are tokens; ids without a
            token decode to the empty string.

    Raises:
        InputError: if the library does not read the file, encoding would be random, or there are
            more ids than `vocab_size`.
    """

    kind = "foreign"

    def __init__(
        self,
        description: dict[str, Any],
        *,
        end_of_text: int | None = None,
        other_ends: Iterable[int] = (),
        vocab_size: int | None = None,
    ) -> None:
        self.end_of_text, self.other_ends = end_of_text, tuple(other_ends)
        self._parts = parts_of(description, end_of_text, self.other_ends)
        self._description = description
        self.beginning = prefix_ids(description, self._parts)
        least = max(self._parts.names) + 1
        self.vocab_size = _checked_size(least if vocab_size is None else vocab_size, least)
        for number in self.other_ends:
            if type(number) is not int or not 0 <= number < self.vocab_size:
                raise InputError(
                    f"other_ends contains {number!r:.40}: ids run from 0 to {self.vocab_size - 1:,}"
                )
        self._is_control = np.zeros(self.vocab_size, bool)
        self._is_control[list(self._parts.control)] = True
        ends = {number for number in ends_of(self) if number in self._parts.names}
        self._bpe = _as_bpe(description, ends)
        self._decoding = TokenDecoding(self._parts)

    def encode(self, text: str) -> torch.Tensor:
        """Ids of `text`, a 1-D int64 tensor; a lone surrogate is an `InputError`."""
        import torch

        return torch.from_numpy(self.encode_array(text))

    def encode_array(self, text: str | bytes) -> NDArray[np.int64]:
        """Ids of `text`, a 1-D int64 array; a lone surrogate is an `InputError`."""
        return np.concatenate([np.empty(0, np.int64), *self.encode_pieces([text])])

    def encode_pieces(self, pieces: Iterable[str | bytes]) -> Iterator[NDArray[np.int64]]:
        """Encode a text given in pieces.

        Yields one row, since the library needs the whole text; but several rows if a
        `BPETokenizer` encodes in the same way.
        """
        if self._bpe is not None:
            yield from self._bpe.encode_pieces(pieces)
            return
        text = "".join(_checked(pieces))
        with refusals(CANNOT_ENCODE, quiet=len(text) < BRIEF):
            found = library_ids(self._parts.library, text)
        ids = np.array(found, np.int64)
        wrong = ids[self._is_control[ids]]
        if len(wrong):
            raise InputError(
                "this tokenizer encodes part of the text as the control token "
                f"{self._parts.names[int(wrong[0])]!r:.40}: remove characters that are not in its "
                "vocabulary"
            )
        yield ids

    @property
    def is_lossless(self) -> bool:
        """Whether decoding the ids of any text gives that text."""
        return self._bpe is not None

    def chars_of_first(self, text: str, count: int) -> tuple[int, int]:
        """The number of characters that a text's first `count` ids cover, and its number of ids.

        Characters that the tokenizer drops count as part of the next token.
        """
        encoding = self._encoded(text)
        if count >= len(encoding):
            return len(text), len(encoding)
        place = encoding.token_to_chars(count - 1) if count > 0 else None
        return 0 if place is None else place[1], len(encoding)

    @cached_property
    def unknown_id(self) -> int | None:
        """The id of the unknown token; None if there is none."""
        names = self._parts.names
        return next((n for n, name in names.items() if name == self._parts.unknown), None)

    @cached_property
    def falls_back_to_characters(self) -> bool:
        """Whether words outside the vocabulary are encoded as characters: BPE and Unigram."""
        model = self._description["model"]
        in_place = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        kind = model.get("type") or ("Unigram" if isinstance(model["vocab"], list) else "BPE")
        return kind == "Unigram" or (kind == "BPE" and not in_place)

    def cannot_encode(self, char: str) -> bool:
        """Whether a single character is encoded as nothing or as the unknown token.

        False for white space, control and format characters, which many tokenizers drop, and for
        tokenizers without character fallback, which encode whole words only.
        """
        if char.isspace() or unicodedata.category(char) in ("Cc", "Cf"):
            return False
        try:
            ids = self._encoded(char).ids
        except InputError:  # it raises for unknown characters
            return False
        if self.unknown_id in ids:
            return self.falls_back_to_characters
        known = b"".join(self._decoding.bytes_of(self._parts.names[i]) for i in ids).strip()
        if not self._decoding.in_bytes:
            return not known
        changed = self._parts.library.normalizer
        whole = char if changed is None else changed.normalize_str(char)
        return len(known) < len(whole.strip().encode())

    def unknown_spans(self, text: str) -> list[tuple[int, int]]:
        """The ranges (start, end) of characters that are encoded as the unknown token."""
        encoding, unknown = self._encoded(text), self.unknown_id
        places = [n for n, number in enumerate(encoding.ids) if number == unknown]
        spans = map(encoding.token_to_chars, places)
        return [span for span in spans if span is not None and span[0] < span[1]]

    def _encoded(self, text: str) -> Any:
        """The library's `Encoding` of a text, with each token's position in it."""
        with refusals(CANNOT_ENCODE, quiet=len(text) < BRIEF):
            return self._parts.library.encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, decoded by the library; control tokens appear by their names."""
        names = self._parts.names
        return self._decoding.text(
            [names[i] for i in check_ids(ids, self.vocab_size) if i in names]
        )

    def decoder(self, *, continued: bool = False, after: Sequence[int] = ()) -> IncrementalDecoder:
        """A decoder for ids that arrive one at a time; see `Tokenizer.decoder`.

        The preceding ids matter: some tokenizers drop the space before a text's first word, some
        add a space after each word but the last.
        """
        return self._decoding.decoder(continued=continued, after=after)

    def token_text(self, token_id: int) -> str:
        """One token as text, as within a text; bytes that are not a character as \\xNN."""
        check_ids([token_id], self.vocab_size)
        name = self._parts.names.get(token_id, "")
        if token_id in self._parts.control or not name:
            return name
        return self._decoding.bytes_of(name).decode("utf-8", "backslashreplace")

    def byte_lengths(self) -> NDArray[np.int64]:
        """The number of UTF-8 bytes that each id decodes to within a text, (V,) int64.

        0 for control tokens, the unknown token and ids without a token. If the tokenizer changes
        text (normalises, drops or adds characters), the decoded text counts.
        """
        lengths = np.zeros(self.vocab_size, np.int64)
        for number, name in self._parts.names.items():
            if number not in self._parts.control and name != self._parts.unknown:
                lengths[number] = len(self._decoding.bytes_of(name))
        return lengths

    def to_state(self) -> dict[str, Any]:
        """The tokenizer's complete state as JSON values."""
        return {
            "kind": self.kind,
            "tokenizer": self._description,
            "end_of_text": self.end_of_text,
            **({"other_ends": list(self.other_ends)} if self.other_ends else {}),
            "vocab_size": self.vocab_size,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ForeignTokenizer:
        """Rebuild from `to_state()`; `InputError` if it is damaged."""
        if not isinstance(state.get("tokenizer"), dict):
            raise InputError('a foreign tokenizer\'s state needs "tokenizer", a tokenizer.json')
        end, size = state.get("end_of_text"), state.get("vocab_size")
        others = state.get("other_ends", [])
        if not isinstance(others, list):
            raise InputError(
                f"a foreign tokenizer's other_ends={others!r:.40} must be a list of ids"
            )
        return cls(state["tokenizer"], end_of_text=end, other_ends=others, vocab_size=size)

    @property
    def is_bpe(self) -> bool:
        """Whether a `BPETokenizer` encodes text in the same way."""
        return self._bpe is not None


def _checked_size(vocab_size: int, least: int) -> int:
    require_int("vocab_size", vocab_size, least=1)
    if vocab_size < least:
        raise InputError(
            f"the tokenizer has ids up to {least - 1:,}, but the model only {vocab_size:,} rows: "
            "use the tokenizer that belongs to the model"
        )
    return int(vocab_size)


def _checked(pieces: Iterable[str | bytes]) -> Iterator[str]:
    """Yield the pieces; raise `InputError` for bytes or a lone surrogate."""
    start = 0
    for piece in pieces:
        if isinstance(piece, bytes):
            raise InputError("this tokenizer needs text, not bytes: use --tokenizer byte")
        encode_strictly(piece, "utf-8", start)
        yield piece
        start += len(piece)


def _as_bpe(description: dict[str, Any], ends: set[int]) -> BPETokenizer | None:
    """A `BPETokenizer` that encodes in the same way, but piece by piece; None if impossible."""
    if not ends <= special_ids(description):
        return None
    try:
        return BPETokenizer(description)
    except InputError:
        return None
