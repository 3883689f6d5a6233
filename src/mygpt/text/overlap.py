"""Detect validation text that is also in the training text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from mygpt.text.documents import Document, as_bytes

_SHORTEST = 20  # characters: shorter documents can be equal by coincidence
_MOST_SEARCHED = 2**26  # characters: longer texts are compared by digest only
_MOST_PAIRS = 64  # of documents: with more pairs they are compared by digest only


def overlap_note(train: Sequence[Document], validation: Sequence[Document], name: str) -> list[str]:
    """A note if validation documents equal, contain or are contained in training documents.

    Args:
        train: the training documents.
        validation: the validation documents.
        name: of the validation file.
    """
    known = {_digest(document) for document in train}
    same = [document for document in validation if _digest(document) in known]
    others = [document for document in validation if _digest(document) not in known]
    if others and _searchable(train, validation):
        texts = [as_bytes(document.text) for document in train]
        inside = [_is_in(as_bytes(document.text), texts) for document in others]
        same += [document for document, found in zip(others, inside, strict=True) if found]
    if not others or len(same) == len(validation):
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


def _digest(document: Document) -> bytes:
    sha256 = hashlib.sha256()
    for piece in document.pieces():
        sha256.update(as_bytes(piece).replace(b"\r\n", b"\n"))
    return sha256.digest()


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
