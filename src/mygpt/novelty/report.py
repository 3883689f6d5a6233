"""How much of a text is copied from a corpus: the longest passage, and the total fraction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mygpt.novelty.search import shared_spans
from mygpt.text import Document

# Of Tiny Shakespeare's validation text, 0.03% is in passages of this length that occur in its
# training text too (one in 200 samples of 500 characters contains one); at 20 characters, 4% is.
COPIED_CHARS = 30
_SHOWN = 60  # most characters of a passage that a line shows


@dataclass(frozen=True)
class Passage:
    """A maximal part of a text that occurs verbatim in the corpus.

    Attributes:
        start: its first character in the text.
        end: the character after its last.
        document: the name of the first document that contains it.
        offset: its position in that document: in characters, or in bytes where it is bytes.
    """

    start: int
    end: int
    document: str
    offset: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Novelty:
    """How much of a text is copied.

    Attributes:
        text: the text.
        longest: its longest copied passage; None where no character of it occurs in the corpus.
        passages: the copied passages of at least `copied_chars`, in order; they may overlap.
        copied_chars: the least length of a passage that counts as copied.
        share: the fraction of the text's characters that are in these passages, 0 to 1.
    """

    text: str
    longest: Passage | None
    passages: list[Passage]
    copied_chars: int
    share: float

    def __str__(self) -> str:
        if self.longest is None:
            return "no copied passage"
        length = len(self.longest)
        shown = self.text[self.longest.start : self.longest.end]
        if length > _SHOWN:
            shown = f"{shown[: _SHOWN - 3]}..."
        return (
            f"longest copied passage {length} character{'s' * (length > 1)} ({shown!r}), "
            f"{self.share:.0%} of the sample is in copied passages of {self.copied_chars} or more"
        )


def measure_novelty(
    text: str, corpus: Sequence[Document], *, copied_chars: int = COPIED_CHARS
) -> Novelty:
    """Find the passages of `text` that occur in the documents: exact, about 10 ms per megabyte.

    Args:
        text: the sample; of equally long passages the first one is `longest`.
        corpus: documents; a passage is within one of them.
        copied_chars: the least length of a passage that counts as copied, at least 1.
    """
    passages = [
        Passage(start, end, corpus[number].name, offset)
        for (start, end), (number, offset) in shared_spans(text, corpus, copied_chars).items()
    ]
    longest = max(passages, key=lambda passage: (len(passage), -passage.start), default=None)
    copied = [passage for passage in passages if len(passage) >= copied_chars]
    inside = np.zeros(max(1, len(text)), bool)
    for passage in copied:
        inside[passage.start : passage.end] = True
    return Novelty(text, longest, copied, copied_chars, float(inside.mean()))
