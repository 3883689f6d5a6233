"""Where a copied passage is in the training text: file, line, and the text around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mygpt.text import Document
from mygpt.views.page import shown_path

LONGEST_PASSAGE = 400  # characters
_AROUND = 200  # characters before and after it (of bytes: bytes)


def training_place(passage: str, documents: Sequence[Document]) -> dict[str, Any] | None:
    """The first place of a passage in documents, as plain JSON values; None if it is in none.

    Positions count from 1: "line", and "position" in characters, of a text that is bytes in bytes
    ("unit"). "name" is empty if all documents are one file's.
    """
    encoded = passage.encode("utf-8", "surrogatepass")
    for document in documents:
        whole, end = document.whole, document.start + len(document)
        if isinstance(whole, str):
            at = whole.find(passage, document.start, end)
            line, length, unit = whole.count("\n", 0, max(0, at)), len(passage), "character"
        else:
            at = whole.find(encoded, document.start, end)
            line, length, unit = whole.count(b"\n", 0, max(0, at)), len(encoded), "byte"
        if at < 0:
            continue
        after = at + length
        several = any(each.whole is not whole for each in documents)
        return {
            "name": shown_path(document.name) if several else "",
            "line": line + 1,
            "position": at + 1,
            "unit": unit,
            "before": _text(whole[max(document.start, at - _AROUND) : at]),
            "text": passage[:LONGEST_PASSAGE],
            "after": _text(whole[after : min(end, after + _AROUND)]),
        }
    return None


def _text(part: str | bytes) -> str:
    return part if isinstance(part, str) else part.decode("utf-8", "replace")
