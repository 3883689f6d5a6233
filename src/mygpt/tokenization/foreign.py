"""Any tokenizer that the `tokenizers` library reads.

It is used for an imported model whose tokenizer `BPETokenizer` cannot represent: character merges
with byte fallback (Llama 2), Unigram, WordPiece, normalisers, another end-of-text token, or more
rows in the model than there are tokens. The library encodes and decodes; this class ensures that
text never becomes a control token.

The library decodes a list of tokens at once. For incremental decoding there are three cases: tokens
are bytes; tokens are text that does not depend on later tokens; or it may depend on them, and then
nothing is emitted before the end.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError, require_int
from mygpt.tokenization.base import IncrementalDecoder, Tokenizer, check_ids, checked, shared_start
from mygpt.tokenization.bounds import MOST_IDS, limit
from mygpt.tokenization.bpe import WordEncoder
from mygpt.tokenization.library import encode, encoding, refusals
from mygpt.tokenization.tokenizer_json import TokenizerFile

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f+][0-9A-Fa-f]>")  # the library's parser accepts a sign
# A token decoded together with others, so that these are not at the beginning or end of the text.
_ANCHOR = "x"
_CONTEXT = 64  # preceding tokens that are decoded again
# Decoder steps that decode each token independently of its neighbours, apart from byte tokens.
_LOCAL = {"Replace", "Metaspace", "ByteFallback", "WordPiece", "Strip"}


class ForeignTokenizer(Tokenizer):
    """An imported tokenizer.

    Text that spells a control token is encoded as ordinary text, and encoding adds no tokens; the
    tokens that the file puts before every text (Llama's `<s>`) are in `beginning`. For a character
    outside its vocabulary the tokenizer gives its unknown token, nothing, or an `InputError`.

    Args:
        content: a `tokenizer.json`, or the JSON object in it.
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
        content: dict[str, Any] | TokenizerFile,
        *,
        end_of_text: int | None = None,
        other_ends: Iterable[int] = (),
        vocab_size: int | None = None,
    ) -> None:
        file = TokenizerFile.of(content)
        self._description, self._names, self._unknown = file.description, file.names, file.unknown
        if end_of_text is not None and (
            type(end_of_text) is not int or end_of_text not in file.names
        ):
            raise InputError(f"end_of_text={end_of_text!r} is not an id of this tokenizer")
        self.end_of_text, self.other_ends = end_of_text, tuple(other_ends)
        self._size = file.size if vocab_size is None else vocab_size
        require_int("vocab_size", self._size, least=1)
        limit("ids", self._size, MOST_IDS)
        if self._size < file.size:
            raise InputError(
                f"the tokenizer has ids up to {file.size - 1:,}, but the model only "
                f"{self._size:,} rows: use the tokenizer that belongs to the model"
            )
        self.beginning = tuple(file.ids_around("cls"))
        wrong = [number for number in self.beginning if number not in file.names]
        wrong += [n for n in self.other_ends if type(n) is not int or not 0 <= n < self._size]
        if wrong:
            raise InputError(
                f"the id {wrong[0]!r:.40} in its post_processor or other_ends has no token: ids "
                f"run from 0 to {self._size - 1:,}"
            )
        self.control, self._library = file.protected((end_of_text, *self.other_ends))
        self._decoding = TokenDecoding(file.names, self._library.decoder)
        if self._decoding.in_bytes:
            self.tokens = file.byte_tokens(self._size)
        # That of a `BPETokenizer` if it gives the same ids: it encodes piece by piece.
        if self.control <= file.special:
            with suppress(InputError):
                self.encoder = WordEncoder(file.byte_level, self._library)
        self.is_lossless = self.encoder is not None

    @property
    def vocab_size(self) -> int:
        """V, the number of ids."""
        return self._size

    def _bytes_of(self, token_id: int) -> bytes:
        """The bytes of an id within a text; empty for an id without a token."""
        if self._decoding.in_bytes:
            return self.tokens[token_id]
        name = self._names.get(token_id, "")
        if not name or token_id in self.control:
            return name.encode()
        return self._decoding.bytes_of(name)

    # --- encoding --------------------------------------------------------------------------

    def encode_pieces(self, pieces: Iterable[str | bytes]) -> Iterator[NDArray[np.int64]]:
        """Encode a text given in pieces.

        Yields one row, since the library needs the complete text; but several rows if a
        `BPETokenizer` encodes in the same way.
        """
        if self.encoder is not None:
            yield from self.encoder.encode_pieces(pieces)
            return
        (ids,) = encode(self._library, ["".join(checked(pieces))])
        wrong = self.control.intersection(ids)
        if wrong:
            raise InputError(
                "this tokenizer encodes part of the text as the control token "
                f"{self._names[min(wrong)]!r:.40}: remove characters that are not in its "
                "vocabulary"
            )
        yield np.array(ids, np.int64)

    def chars_of_first(self, text: str, count: int) -> tuple[int, int]:
        """The number of characters that a text's first `count` ids cover, and its number of ids.

        Characters that the tokenizer drops count as part of the next token.
        """
        found = encoding(self._library, text)
        if count >= len(found):
            return len(text), len(found)
        place = found.token_to_chars(count - 1) if count > 0 else None
        return 0 if place is None else place[1], len(found)

    # --- unknown text ----------------------------------------------------------------------

    @cached_property
    def unknown_id(self) -> int | None:
        """The id of the unknown token; None if there is none."""
        return next((n for n, name in self._names.items() if name == self._unknown), None)

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
        tokenizers without character fallback, which encode complete words only.
        """
        if char.isspace() or unicodedata.category(char) in ("Cc", "Cf"):
            return False
        try:
            (ids,) = encode(self._library, [char])
        except InputError:  # it raises for unknown characters
            return False
        if self.unknown_id in ids:
            return self.falls_back_to_characters
        known = b"".join(map(self._bytes_of, ids)).strip()
        if not self._decoding.in_bytes:
            return not known
        changed = self._library.normalizer
        written = char if changed is None else changed.normalize_str(char)
        return len(known) < len(written.strip().encode())

    def unknown_spans(self, text: str) -> list[tuple[int, int]]:
        """The ranges (start, end) of unknown characters and words, in order; none overlap."""
        if self.is_lossless:
            return []
        lost = set(filter(self.cannot_encode, set(text)))
        dropped = {(n, n + 1) for n, char in enumerate(text) if char in lost}
        spans: list[tuple[int, int]] = []
        for start, end in sorted(dropped.union(self.unknown_token_spans(text))):
            reached = spans[-1][1] if spans else 0
            if end > reached:
                spans.append((max(start, reached), end))
        return spans

    def unknown_token_spans(self, text: str) -> list[tuple[int, int]]:
        """The ranges (start, end) of characters that are encoded as the unknown token."""
        found, unknown = encoding(self._library, text), self.unknown_id
        places = [n for n, number in enumerate(found.ids) if number == unknown]
        spans = map(found.token_to_chars, places)
        return [span for span in spans if span is not None and span[0] < span[1]]

    # --- decoding --------------------------------------------------------------------------

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, as the library decodes it; control tokens appear by their names."""
        if self._decoding.in_bytes:
            return super().decode(ids)
        names = self._names
        return self._decoding.text(
            [names[i] for i in check_ids(ids, self.vocab_size) if i in names]
        )

    def decoder(self, *, continued: bool = False, after: Sequence[int] = ()) -> IncrementalDecoder:
        """A decoder for ids that arrive one at a time; see `Tokenizer.decoder`.

        The preceding ids matter: some tokenizers drop the space before a text's first word, some
        add a space after each word but the last.
        """
        if self._decoding.in_bytes:
            return super().decoder(continued=continued, after=after)
        return self._decoding.decoder(continued=continued, after=after)

    def token_text(self, token_id: int) -> str:
        """One token as text, as within a text; bytes that are not a character as \\xNN."""
        check_ids([token_id], self.vocab_size)
        return self._bytes_of(token_id).decode("utf-8", "backslashreplace")

    def byte_lengths(self) -> NDArray[np.int64]:
        """The number of UTF-8 bytes that each id decodes to within a text, (V,) int64.

        0 for control tokens, the unknown token and ids without a token. If the tokenizer changes
        text (normalises, drops or adds characters), the decoded text counts.
        """
        lengths = np.zeros(self.vocab_size, np.int64)
        for number in self._names.keys() - self.control - {self.unknown_id}:
            lengths[number] = len(self._bytes_of(number))
        return lengths

    # --- state -----------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The content of the `tokenizer.json`."""
        return self._description

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
        others = state.get("other_ends", [])
        if not isinstance(state.get("tokenizer"), dict) or not isinstance(others, list):
            raise InputError(
                'a foreign tokenizer\'s state needs "tokenizer", a tokenizer.json, and '
                '"other_ends", if it is there, must be a list of ids'
            )
        end, size = state.get("end_of_text"), state.get("vocab_size")
        return cls(state["tokenizer"], end_of_text=end, other_ends=others, vocab_size=size)


class TokenDecoding:
    """Decodes tokens as a tokenizer's decoder does.

    Args:
        names: the token of each id.
        library: the library's decoder; None joins tokens by spaces.

    Attributes:
        names: the token of each id.
        in_bytes: whether tokens are bytes in GPT-2's alphabet, concatenated and then decoded.
    """

    def __init__(self, names: dict[int, str], library: Any) -> None:
        self.names, self._library = names, library
        # As the library parsed it, since it also accepts older forms of a decoder.
        state = None if library is None else json.loads(library.__getstate__())
        self._steps = [] if state is None else _steps(state)
        self._kinds = [step["type"] for step in self._steps]
        self.in_bytes = self._kinds[:1] == ["ByteLevel"] and set(self._kinds[1:]) <= {"Fuse"}
        # The library panics if a token is shorter than what is stripped at its end.
        self._may_panic = any(s["type"] == "Strip" and s["stop"] for s in self._steps)

    def decoder(self, *, continued: bool, after: Sequence[int]) -> IncrementalDecoder:
        """A decoder for ids that arrive one at a time; see `Tokenizer.decoder`."""
        found = map(self.names.get, after[-_CONTEXT:])
        names = [name for name in found if name is not None]
        if not self.is_local:
            return _LibraryDecoder(self, names, [])
        try:
            begun = bool(self.text(names)) if names else continued
        except InputError:  # decoding the next ids raises it again
            begun = True
        return _LibraryDecoder(self, [_ANCHOR] * begun, self._unfinished(names))

    def text(self, tokens: list[str]) -> str:
        """The text of consecutive tokens."""
        if self._library is None:
            return " ".join(tokens)
        with refusals("the tokenizers library could not decode these ids", quiet=self._may_panic):
            return str(self._library.decode(tokens))

    def is_byte(self, name: str) -> bool:
        """Whether a token is a single byte (<0xNN>) that the decoder joins with its neighbours."""
        return "ByteFallback" in self._kinds and _BYTE_TOKEN.fullmatch(name) is not None

    def bytes_of(self, name: str) -> bytes:
        """The UTF-8 bytes of a token within a text."""
        if self.is_byte(name):
            return bytes([int(name[3:5], 16)])
        if self._kinds == ["BPEDecoder"]:  # it inserts a space after tokens that end a word
            return self.text([name, _ANCHOR])[: -len(_ANCHOR)].encode()
        if not self.is_local:
            return self.text([name]).encode()
        return self.text([_ANCHOR, name])[len(_ANCHOR) :].encode()

    @cached_property
    def is_local(self) -> bool:
        """Whether tokens after the first decode to the same text whatever their neighbours are."""
        steps, kinds = self._steps, self._kinds
        fused = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
        # Steps after "Fuse" see the joined text: they may change its beginning only.
        harmless = [
            step["type"] == "Fuse" or (step["type"] == "Strip" and step["stop"] == 0)
            for step in steps[fused:]
        ]
        alone = set(kinds[:fused]) <= _LOCAL and all(harmless)
        return alone and self.text([_ANCHOR]) == _ANCHOR

    def _unfinished(self, names: list[str]) -> list[str]:
        """The trailing byte tokens that are not valid UTF-8 yet."""
        start = len(names)
        while start and self.is_byte(names[start - 1]):
            start -= 1
        try:
            bytes(int(name[3:5], 16) for name in names[start:]).decode("utf-8")
        except UnicodeDecodeError:
            return names[start:]
        return []


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """A decoder's steps, with nested sequences flattened."""
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _steps(part)]


class _LibraryDecoder:
    """For tokens that are not bytes: emits the text that later tokens cannot change.

    Byte tokens wait until another token follows: if a run of bytes is not valid UTF-8, the library
    decodes each byte of it to U+FFFD, complete characters included.

    Args:
        decoding: of the tokenizer.
        before: tokens before the text; none at the beginning of a text.
        waiting: tokens of the text whose own text was not emitted.
    """

    def __init__(self, decoding: TokenDecoding, before: list[str], waiting: list[str]) -> None:
        self._decoding = decoding
        self._before, self._waiting = before, waiting

    def push(self, token_id: int) -> str:
        """The text of the tokens so far that later tokens cannot change."""
        name = self._decoding.names.get(token_id)
        if name is None:
            return ""
        self._waiting.append(name)
        final = self._decoding.is_local and not self._decoding.is_byte(name)
        return self._spelled() if final else ""

    def finish(self) -> str:
        """The text that was held back."""
        return self._spelled() if self._waiting else ""

    def _spelled(self) -> str:
        text = self._decoding.text(self._before + self._waiting)
        if self._before:
            text = text[shared_start(self._decoding.text(self._before), text) :]
        # Until there is text, the next token is still at its beginning.
        if text or self._before:
            self._before = self._before or [_ANCHOR]
            self._waiting.clear()
        return text
