"""Decode the tokens of any `tokenizer.json` to text, all at once or one id at a time.

The library decodes a list of tokens at once. For incremental decoding there are three cases: tokens
are bytes; tokens are text that does not depend on later tokens; or it may depend on them, and then
nothing is emitted before the end.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from functools import cached_property

from mygpt.errors import InputError
from mygpt.tokenization.base import IncrementalDecoder, primed, shared_start
from mygpt.tokenization.foreign_json import Parts
from mygpt.tokenization.tokenizer_json import SYMBOLS, refusals

_BYTES = {symbol: byte for byte, symbol in enumerate(SYMBOLS)}
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f+][0-9A-Fa-f]>")  # the library's parser accepts a sign
_CANNOT_DECODE = "the tokenizers library could not decode these ids"
# A token decoded together with others, so that these are not at the beginning or end of the text.
_ANCHOR = "x"
_CONTEXT = 64  # preceding tokens that are decoded again
# Decoder steps that decode each token independently of its neighbours, apart from byte tokens.
_LOCAL = {"Replace", "Metaspace", "ByteFallback", "WordPiece", "Strip"}


class TokenDecoding:
    """Decodes tokens as a tokenizer's decoder does.

    Args:
        parts: of the `tokenizer.json`.

    Attributes:
        names: the token of each id.
    """

    def __init__(self, parts: Parts) -> None:
        self.names = parts.names
        self._steps = parts.steps or []
        self._library = parts.library.decoder

    def decoder(self, *, continued: bool, after: Sequence[int]) -> IncrementalDecoder:
        """A decoder for ids that arrive one at a time; see `Tokenizer.decoder`."""
        if self.in_bytes:
            decoder: IncrementalDecoder = primed(_ByteDecoder(self.names), after)
            return decoder
        found = map(self.names.get, after[-_CONTEXT:])
        names = [name for name in found if name is not None]
        if not self._is_local:
            return _WholeDecoder(self, names)
        try:
            begun = bool(self.text(names)) if names else continued
        except InputError:  # decoding the next ids raises it again
            begun = True
        return _TokenDecoder(self, begun=begun, waiting=self._unfinished(names))

    def text(self, tokens: list[str]) -> str:
        """The text of consecutive tokens."""
        if self._library is None:
            return " ".join(tokens)
        with refusals(_CANNOT_DECODE, quiet=self._may_panic):
            return str(self._library.decode(tokens))

    def is_byte(self, name: str) -> bool:
        """Whether a token is a single byte (<0xNN>) that the decoder joins with its neighbours."""
        return self._falls_back and _BYTE_TOKEN.fullmatch(name) is not None

    def bytes_of(self, name: str) -> bytes:
        """The UTF-8 bytes of a token within a text."""
        if self.in_bytes:
            return _symbols_to_bytes(name)
        if self.is_byte(name):
            return bytes([int(name[3:5], 16)])
        if self._is_suffixed:
            return self._text_before_others(name).encode("utf-8")
        if not self._is_local:
            return self.text([name]).encode("utf-8")
        return self.text([_ANCHOR, name])[len(_ANCHOR) :].encode("utf-8")

    @cached_property
    def in_bytes(self) -> bool:
        """Whether tokens are bytes in GPT-2's alphabet, concatenated and then decoded."""
        kinds = self._kinds
        return kinds[:1] == ["ByteLevel"] and set(kinds[1:]) <= {"Fuse"}

    @cached_property
    def _is_local(self) -> bool:
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

    @property
    def _is_suffixed(self) -> bool:
        """Whether tokens mark the end of words, after which the decoder inserts a space."""
        return self._kinds == ["BPEDecoder"]

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

    def _text_before_others(self, name: str) -> str:
        """A token's text when another token follows."""
        return self.text([name, _ANCHOR])[: -len(_ANCHOR)]

    @cached_property
    def _may_panic(self) -> bool:
        """Whether the decoder strips the end: the library panics if a token is shorter."""
        return any(step["type"] == "Strip" and step["stop"] for step in self._steps)

    @cached_property
    def _falls_back(self) -> bool:
        """Whether tokens named <0xNN> are single bytes."""
        return "ByteFallback" in self._kinds

    @cached_property
    def _kinds(self) -> list[str]:
        return [step["type"] for step in self._steps]


def _symbols_to_bytes(name: str) -> bytes:
    """The bytes of a token in GPT-2's alphabet; of another (an added token) its UTF-8."""
    if all(symbol in _BYTES for symbol in name):
        return bytes([_BYTES[symbol] for symbol in name])
    return name.encode("utf-8")


class _ByteDecoder:
    """For tokens that are bytes: emits each character once all of its bytes have arrived."""

    def __init__(self, names: dict[int, str]) -> None:
        self._names = names
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that are complete so far."""
        return self._utf8.decode(_symbols_to_bytes(self._names.get(token_id, "")))

    def finish(self) -> str:
        """U+FFFD for an incomplete character, else the empty string."""
        return self._utf8.decode(b"", final=True)


class _WholeDecoder:
    """For tokens whose text any later token may change: emits all text at the end."""

    def __init__(self, decoding: TokenDecoding, before: list[str]) -> None:
        self._decoding, self._before = decoding, before
        self._waiting: list[str] = []

    def push(self, token_id: int) -> str:
        """Always the empty string."""
        name = self._decoding.names.get(token_id)
        if name is not None:
            self._waiting.append(name)
        return ""

    def finish(self) -> str:
        """The text of all tokens, without that of the preceding ones."""
        if not self._waiting:
            return ""
        before = self._decoding.text(self._before) if self._before else ""
        whole = self._decoding.text(self._before + self._waiting)
        return whole[shared_start(before, whole) :]


class _TokenDecoder:
    """For tokens that are text or single bytes.

    Byte tokens are held back until another token follows: if a run of bytes is not valid UTF-8,
    the library decodes each byte of it to U+FFFD, complete characters included.
    """

    def __init__(self, decoding: TokenDecoding, *, begun: bool, waiting: list[str]) -> None:
        self._decoding = decoding
        self._begun = begun
        self._waiting = waiting

    def push(self, token_id: int) -> str:
        """The text of the tokens so far that later tokens cannot change."""
        name = self._decoding.names.get(token_id)
        if name is None:
            return ""
        self._waiting.append(name)
        return "" if self._decoding.is_byte(name) else self._spelled()

    def finish(self) -> str:
        """The text that was held back."""
        return self._spelled() if self._waiting else ""

    def _spelled(self) -> str:
        before = [_ANCHOR] if self._begun else []
        text = self._decoding.text(before + self._waiting)[len("".join(before)) :]
        # Until there is text, the next token is still at its beginning.
        if text or self._begun:
            self._begun = True
            self._waiting.clear()
        return text
