"""Synthetic text: words of syllables with Zipf-distributed frequencies, sentences, paragraphs.

The same seed gives the same bytes; a shorter text is the beginning of a longer one.
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
_BATCH = 100_000  # words that are drawn at once


def _vocabulary(generator: np.random.Generator) -> list[str]:
    """Distinct words, the most frequent ones first; these are short."""
    words: dict[str, None] = {}
    while len(words) < _WORDS:
        drawn = [generator.integers(len(part), size=(_BATCH, 4)).tolist() for part in _PARTS]
        more = generator.integers(2, size=_BATCH).tolist()
        for row in range(_BATCH):
            syllables = 1 + (len(words) > 300) + (len(words) > 20_000) * more[row]
            chosen = zip(*(kind[row][:syllables] for kind in drawn), strict=True)
            letters = (_PARTS[n][i] for each in chosen for n, i in enumerate(each))
            words.setdefault("".join(letters))
    return list(words)[:_WORDS]


def paragraphs(seed: int = 0) -> Iterator[str]:
    """An endless sequence of paragraphs, in batches."""
    generator = np.random.default_rng(seed)
    words = np.array(_vocabulary(generator), dtype=object)
    weights = 1.0 / np.arange(1, _WORDS + 1) ** _EXPONENT
    cumulated = np.cumsum(weights / weights.sum())
    while True:
        drawn = words[np.searchsorted(cumulated, generator.random(_BATCH)).clip(max=_WORDS - 1)]
        kinds = generator.integers(0, 300, size=_BATCH)
        drawn[kinds < 20] += ","
        drawn[kinds == 20] = [f"({number})" for number in np.flatnonzero(kinds == 20).tolist()]
        drawn[kinds > 280] += "."
        drawn[kinds == 299] += "\n\n"
        yield " ".join(drawn.tolist()).replace("\n ", "\n")


def write_text(path: Path, num_bytes: int, seed: int = 0) -> None:
    """Write a file of `num_bytes`, or up to three fewer: the last character is complete."""
    left = num_bytes
    with open(path, "wb") as file:
        for text in paragraphs(seed):
            data = text.encode()[:left].decode(errors="ignore").encode()
            left -= file.write(data)
            if left < 4:
                return
