"""What a text copied, as people want to know it: the longest passage, and how much in all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mygpt.novelty.search import shared_spans
from mygpt.text import Document

# Of Tiny Shakespeare's text that the model has not read, 0.03% lies in passages this long that
# the text before it has too: a sample of 500 characters in 200 has one. From 20 on, 4% does.
COPIED_CHARS = 30
_SHOWN = 60  # characters of a passage shown in a line


@dataclass(frozen=True)
class Passage:
    """A part of a text that the corpus has too, word for word, and that cannot be made longer.

    Attributes:
        start: where it begins in the text, in characters.
        end: where it ends there.
        document: the name of the first document that has it.
        offset: where it begins in that document: in characters, or in bytes where it is bytes.
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
        longest: its longest copied passage; None where the corpus has not even a character of it.
        passages: the copied passages of at least `copied_chars`, in order; they may overlap.
        copied_chars: how long a passage has to be to count as copied.
        share: the share of the text's characters that lie in those passages, 0 to 1.
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
            f"{self.share:.0%} of the sample lies in copied passages of {self.copied_chars} or more"
        )


def measure_novelty(
    text: str, corpus: Sequence[Document], *, copied_chars: int = COPIED_CHARS
) -> Novelty:
    """Find what `text` shares with the documents: exact, about 10 ms for each of their megabytes.

    Args:
        text: the sample; of equally long passages its first one is `longest`.
        corpus: documents; a passage lies in one of them.
        copied_chars: how long a passage has to be to count as copied, at least 1.
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
