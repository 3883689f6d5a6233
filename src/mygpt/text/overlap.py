"""Whether a text to validate on is among the text that is learned from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from mygpt.text.documents import Document, as_bytes

_SHORTEST = 20  # characters: shorter documents are the same by chance
_MOST_SEARCHED = 2**26  # characters of either text, in which the other is searched for
_MOST_PAIRS = 64  # of documents that are searched for in each other


def overlap_note(learned: Sequence[Document], held: Sequence[Document], name: str) -> list[str]:
    """A note where documents to validate on are learned from too, or are parts of those.

    Args:
        learned: documents to learn from.
        held: documents to validate on.
        name: of the file that the latter are in.
    """
    known = {_digest(document) for document in learned}
    same = [document for document in held if _digest(document) in known]
    others = [document for document in held if _digest(document) not in known]
    if others and _searchable(learned, held):
        texts = [as_bytes(document.text) for document in learned]
        inside = [_is_in(as_bytes(document.text), texts) for document in others]
        same += [document for document, found in zip(others, inside, strict=True) if found]
    if not others or len(same) == len(held):
        return [validation_seen_note(name)]
    long = sum(len(document) >= _SHORTEST for document in same)
    if not long:
        return []
    return [
        f"{long:,} of the {len(held):,} documents of {name} are in the text that is learned from: "
        "the validation loss is too low for what is new"
    ]


def validation_seen_note(name: str) -> str:
    """What to say of a text to validate on that is learned from."""
    return (
        f"{name} is in the text that is learned from: the validation loss says how well that is "
        "known by heart, and nothing about other text"
    )


def _digest(document: Document) -> bytes:
    sha256 = hashlib.sha256()
    for piece in document.pieces():
        sha256.update(as_bytes(piece).replace(b"\r\n", b"\n"))
    return sha256.digest()


def _searchable(learned: Sequence[Document], held: Sequence[Document]) -> bool:
    longest = max(sum(map(len, learned)), sum(map(len, held)))
    return len(learned) * len(held) <= _MOST_PAIRS and longest <= _MOST_SEARCHED


def _is_in(text: bytes, others: Sequence[bytes]) -> bool:
    """Whether a text is a part of another, or another one of it; ends of lines apart."""
    text = text.strip()
    return len(text) >= _SHORTEST and any(
        text in other or (len(other.strip()) >= _SHORTEST and other.strip() in text)
        for other in others
    )
