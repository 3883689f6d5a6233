"""Documents, a corpus of them, and its split in two.

A long text is dealt with in pieces: a second copy of it may be more than memory holds.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

_PIECE = 2**20  # characters or bytes

# What separates the documents of one file: TinyStories has it in lines of its own, GPT-2's
# exports between the texts. It goes together with the line ends behind it.
SEPARATOR = "<|endoftext|>"
LINE_ENDS = "\r\n"
_SEPARATORS = re.compile(rf"{re.escape(SEPARATOR)}[{LINE_ENDS}]*")
_SEPARATORS_IN_BYTES = re.compile(_SEPARATORS.pattern.encode())


@dataclass(frozen=True)
class Document:
    """One text with its name; bytes where it could not be decoded and bytes were asked for.

    A part of a text shares the whole with the other parts: cutting copies nothing.

    Attributes:
        name: the file it is, or the topic.
        whole: the text that it is, or is a part of.
        start: where it begins in the whole, in characters (of bytes: in bytes).
        end: where it ends there; None is the whole's end.
    """

    name: str
    whole: str | bytes
    start: int = 0
    end: int | None = None

    @property
    def text(self) -> str | bytes:
        """The text; of a part a copy, so long texts are better taken in `pieces()`."""
        return self.whole[self.start : self.end]

    def __len__(self) -> int:
        """Its characters; of bytes, bytes."""
        return (len(self.whole) if self.end is None else self.end) - self.start

    def pieces(self) -> Iterator[str | bytes]:
        """The text in pieces of about a million characters, in order."""
        end = self.start + len(self)
        for start in range(self.start, end, _PIECE):
            yield self.whole[start : min(start + _PIECE, end)]


@dataclass(frozen=True)
class Corpus:
    """Documents in order, and what was passed over while reading them.

    Attributes:
        name: what a run on it is called.
        documents: at least one, none of them empty.
        notes: one line each about what was left out.
    """

    name: str
    documents: list[Document]
    notes: list[str] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """One file's SHA-256; of several, that of their digests in a row."""
        digests = [_digest(document) for document in _files(self.documents)]
        if len(digests) == 1:
            return digests[0].hex()
        return hashlib.sha256(b"".join(digests)).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Length of all documents in UTF-8 bytes."""
        return sum(len(as_bytes(piece)) for doc in self.documents for piece in doc.pieces())


def as_bytes(text: str | bytes) -> bytes:
    """Text as UTF-8; bytes as they are."""
    return text if isinstance(text, bytes) else text.encode("utf-8")


def _files(documents: Sequence[Document]) -> Iterator[Document]:
    """The files that documents are, or are parts of."""
    last: Document | None = None
    for document in documents:
        same = last is not None and (document.whole is last.whole and document.start > last.start)
        last = document
        if not same:
            yield Document(document.name, document.whole)


def _digest(document: Document) -> bytes:
    sha256 = hashlib.sha256()
    for piece in document.pieces():
        sha256.update(as_bytes(piece))
    return sha256.digest()


def parts_between_separators(document: Document) -> list[Document]:
    """The documents that `SEPARATOR` separates in a file; none of them is empty."""
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
    """A text whose documents stand in lines of their own instead."""
    return _SEPARATORS.sub("\n", text)


def split_note(texts: int, documents: int) -> str:
    """What people should know of texts that were split."""
    return (
        f"{SEPARATOR} separates the documents of {texts:,} text{'s' * (texts != 1)}: "
        f"{documents:,} documents (--no-split-documents leaves it in the text)"
    )


def split_documents(
    documents: Sequence[Document], fraction: float
) -> tuple[list[Document], list[Document]]:
    """Cut off the last `fraction` of the text, counted in characters, inside a document if need be.

    Returns the documents before the cut and those after it; either may be empty.
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
