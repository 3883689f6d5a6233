"""Text that looks like text: words of syllables in Zipf's proportions, sentences, paragraphs.

The same seed gives the same bytes, however many of them are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

_ONSETS = ["", "b", "br", "c", "ch", "d", "f", "g", "gr", "h", "l", "m", "n", "p", "pl", "r"]
_ONSETS += ["s", "st", "str", "t", "th", "v", "w", "é", "ñ"]
_NUCLEI = ["a", "e", "i", "o", "u", "ai", "ea", "ou", "io", "er"]
_CODAS = ["", "", "n", "r", "s", "t", "l", "nd", "ng", "rt", "ck", "st"]
_PARTS = (_ONSETS, _NUCLEI, _CODAS)
_WORDS = 200_000
_EXPONENT = 1.05
_BATCH = 100_000  # words drawn at once


def _vocabulary(chance: np.random.Generator) -> list[str]:
    """Distinct words; the common ones, which stand first, are short."""
    words: dict[str, None] = {}
    while len(words) < _WORDS:
        drawn = [chance.integers(len(part), size=(_BATCH, 4)).tolist() for part in _PARTS]
        more = chance.integers(2, size=_BATCH).tolist()
        for row in range(_BATCH):
            syllables = 1 + (len(words) > 300) + (len(words) > 20_000) * more[row]
            chosen = zip(*(kind[row][:syllables] for kind in drawn), strict=True)
            letters = (_PARTS[n][i] for each in chosen for n, i in enumerate(each))
            words.setdefault("".join(letters))
    return list(words)[:_WORDS]


def paragraphs(seed: int = 0) -> Iterator[str]:
    """Some paragraphs at a time, without end."""
    chance = np.random.default_rng(seed)
    words = np.array(_vocabulary(chance), dtype=object)
    weights = 1.0 / np.arange(1, _WORDS + 1) ** _EXPONENT
    cumulated = np.cumsum(weights / weights.sum())
    while True:
        drawn = words[np.searchsorted(cumulated, chance.random(_BATCH)).clip(max=_WORDS - 1)]
        kinds = chance.integers(0, 300, size=_BATCH)
        drawn[kinds < 20] += ","
        drawn[kinds == 20] = [f"({number})" for number in np.flatnonzero(kinds == 20).tolist()]
        drawn[kinds > 280] += "."
        drawn[kinds == 299] += "\n\n"
        yield " ".join(drawn.tolist()).replace("\n ", "\n")


def write_text(path: Path, num_bytes: int, seed: int = 0) -> None:
    """A file of `num_bytes`, or up to three less: the last character is whole."""
    left = num_bytes
    with open(path, "wb") as file:
        for text in paragraphs(seed):
            data = text.encode()[:left].decode(errors="ignore").encode()
            left -= file.write(data)
            if left < 4:
                return
