"""Documents, the corpus they form, and its train/validation split.

Long texts are processed in pieces, since a second copy may not fit into memory.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

_PIECE = 2**20  # characters or bytes

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
        return sum(len(as_bytes(piece)) for doc in self.documents for piece in doc.pieces())


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


def _digest(document: Document) -> bytes:
    sha256 = hashlib.sha256()
    for piece in document.pieces():
        sha256.update(as_bytes(piece))
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
