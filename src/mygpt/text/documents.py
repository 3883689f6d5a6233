"""Documents, the corpus they form, its train/validation split, and the size of a text.

Long texts are processed in pieces, since a second copy may not fit into memory.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

_PIECE = 2**20  # characters or bytes
_SHORTEST = 20  # characters: shorter documents can be equal by coincidence
_MOST_SEARCHED = 2**26  # characters: longer texts are compared by digest only
_MOST_PAIRS = 64  # of documents: with more pairs they are compared by digest only

# Separates the documents of one file: TinyStories has it on lines of its own, GPT-2's exports
# between the texts. It is removed together with the line ends after it.
SEPARATOR = "<|endoftext|>"
LINE_ENDS = "\r\n"
_SEPARATORS = re.compile(rf"{re.escape(SEPARATOR)}[{LINE_ENDS}]*")
_SEPARATORS_IN_BYTES = re.compile(_SEPARATORS.pattern.encode())


@dataclass(frozen=True)
class Document:
    """One text and its name, as a range of a string (or of bytes, if it could not be decoded).

    Documents of the same file share its string, so that splitting copies nothing.

    Attributes:
        name: of the file or topic.
        whole: the string that contains the document.
        start: index of its first character (of bytes: byte) in `whole`.
        end: index after its last one; None is the end of `whole`.
    """

    name: str
    whole: str | bytes
    start: int = 0
    end: int | None = None

    @property
    def text(self) -> str | bytes:
        """The text. This copies a part of `whole`; use `pieces()` for long texts."""
        return self.whole[self.start : self.end]

    def __len__(self) -> int:
        """Its length in characters (of bytes: in bytes)."""
        return (len(self.whole) if self.end is None else self.end) - self.start

    def pieces(self) -> Iterator[str | bytes]:
        """The text in pieces of about a million characters, in order."""
        end = self.start + len(self)
        for start in range(self.start, end, _PIECE):
            yield self.whole[start : min(start + _PIECE, end)]


@dataclass(frozen=True)
class Corpus:
    """Documents in order, and notes on how they were read.

    Attributes:
        name: of a run on this corpus.
        documents: at least one, none of them empty.
        notes: one line each, for instance about skipped files.
    """

    name: str
    documents: list[Document]
    notes: list[str] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """SHA-256 of the file; of several files, that of their concatenated digests."""
        digests = [_digest(document) for document in _files(self.documents)]
        if len(digests) == 1:
            return digests[0].hex()
        return hashlib.sha256(b"".join(digests)).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Total length of the documents in UTF-8 bytes."""
        return bytes_of(self.documents)


def as_bytes(text: str | bytes) -> bytes:
    """Text encoded as UTF-8; bytes are returned unchanged."""
    return text if isinstance(text, bytes) else text.encode("utf-8")


def _files(documents: Sequence[Document]) -> Iterator[Document]:
    """One document per file that the documents come from."""
    last: Document | None = None
    for document in documents:
        same = last is not None and (document.whole is last.whole and document.start > last.start)
        last = document
        if not same:
            yield Document(document.name, document.whole)


def _digest(document: Document, *, unix_lines: bool = False) -> bytes:
    sha256 = hashlib.sha256()
    for piece in document.pieces():
        data = as_bytes(piece)
        sha256.update(data.replace(b"\r\n", b"\n") if unix_lines else data)
    return sha256.digest()


def parts_between_separators(document: Document) -> list[Document]:
    """The non-empty documents that `SEPARATOR` separates in a file."""
    whole = document.whole
    parts: list[Document] = []
    start = 0
    pattern: re.Pattern[Any] = _SEPARATORS if isinstance(whole, str) else _SEPARATORS_IN_BYTES
    for match in pattern.finditer(whole):
        if match.start() > start:
            parts.append(replace(document, start=start, end=match.start()))
        start = match.end()
    if not start:
        return [document]
    return parts + [replace(document, start=start)] * (start < len(whole))


def without_separators(text: str) -> str:
    """The text with each `SEPARATOR`, and the line ends after it, replaced by a newline."""
    return _SEPARATORS.sub("\n", text)


def split_note(texts: int, documents: int) -> str:
    """The note for the user that texts were split into documents."""
    return (
        f"{SEPARATOR} separates the documents of {texts:,} text{'s' * (texts != 1)}: "
        f"{documents:,} documents (--no-split-documents leaves it in the text)"
    )


def split_documents(
    documents: Sequence[Document], fraction: float
) -> tuple[list[Document], list[Document]]:
    """Split off the last `fraction` of the text, measured in characters.

    The split may fall inside a document, which then becomes two. Returns the documents before
    and after it; either list may be empty.
    """
    left = int(sum(map(len, documents)) * (1.0 - fraction))
    before: list[Document] = []
    after: list[Document] = []
    for document in documents:
        here = min(left, len(document))
        left -= here
        if here == len(document):
            before.append(document)
        elif here == 0:
            after.append(document)
        else:
            cut = document.start + here
            before.append(replace(document, end=cut))
            after.append(replace(document, start=cut))
    return before, after


# --- validation text in the training text ---------------------------------------------------


def overlap_note(train: Sequence[Document], validation: Sequence[Document], name: str) -> list[str]:
    """A note if validation documents equal, contain or are contained in training documents.

    Args:
        train: the training documents.
        validation: the validation documents.
        name: of the validation file.
    """
    known = {_digest(document, unix_lines=True) for document in train}
    texts = [as_bytes(each.text) for each in train] if _searchable(train, validation) else []
    same = [
        document
        for document in validation
        if _digest(document, unix_lines=True) in known
        or (texts and _is_in(as_bytes(document.text), texts))
    ]
    if len(same) == len(validation):
        return [validation_seen_note(name)]
    long = sum(len(document) >= _SHORTEST for document in same)
    if not long:
        return []
    return [
        f"{long:,} of the {len(validation):,} documents of {name} are also in the training text: "
        "the validation loss is lower than it would be on new text"
    ]


def validation_seen_note(name: str) -> str:
    """The note for a validation text that is wholly in the training text."""
    return (
        f"{name} is in the training text: the validation loss measures how well the model has "
        "memorised it, not how it does on other text"
    )


def _searchable(train: Sequence[Document], validation: Sequence[Document]) -> bool:
    longest = max(sum(map(len, train)), sum(map(len, validation)))
    return len(train) * len(validation) <= _MOST_PAIRS and longest <= _MOST_SEARCHED


def _is_in(text: bytes, others: Sequence[bytes]) -> bool:
    """Whether a text contains, or is contained in, one of the others, up to outer white space."""
    text = text.strip()
    return len(text) >= _SHORTEST and any(
        text in other or (len(other.strip()) >= _SHORTEST and other.strip() in text)
        for other in others
    )


# --- sizes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextSize:
    """The number of predicted tokens, and the size of the text that was encoded to them.

    The text is the original one, which the tokens need not decode to: a tokenizer may normalise
    text or have an unknown token.

    Attributes:
        tokens: number of predicted tokens.
        num_bytes: of their text in UTF-8.
        num_chars: of their text; None if it is bytes or was not counted.
    """

    tokens: int
    num_bytes: int
    num_chars: int | None = None

    def bits_per_byte(self, loss: float) -> float:
        """Convert a loss in nats per token to bits per byte of the text."""
        return loss / math.log(2) * self.tokens / max(1, self.num_bytes)

    def bits_per_char(self, loss: float) -> float | None:
        """Convert a loss in nats per token to bits per character; None if `num_chars` is None."""
        if self.num_chars is None:
            return None
        return loss / math.log(2) * self.tokens / max(1, self.num_chars)


def bytes_of(documents: Iterable[Document]) -> int:
    """Total length of the documents in UTF-8 bytes."""
    return sum(len(as_bytes(piece)) for document in documents for piece in document.pieces())


def chars_of(documents: Iterable[Document]) -> int | None:
    """Total number of characters in the documents; None if one of them is bytes."""
    found = list(documents)
    return None if any(isinstance(each.whole, bytes) for each in found) else sum(map(len, found))
