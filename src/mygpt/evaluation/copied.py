"""Passages of a text that are copied from a corpus: the longest ones, and the fraction of the text.

All long common substrings are found in one pass over the corpus.

Any common substring of 15 bytes contains 8 bytes that begin at a multiple of 8 in the corpus. So
all 8-byte substrings of the text are put into a hash table, every eighth position of the corpus is
looked up in it, and each match (an anchor) is extended to both sides as far as the bytes agree.
Only where no 15 bytes are common is the corpus searched for shorter anchors, at every position.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mygpt.text import Document

# Of Tiny Shakespeare's validation text, 0.03% is in passages of this length that occur in its
# training text too (one in 200 samples of 500 characters contains one); at 20 characters, 4% is.
COPIED_CHARS = 30
_SHOWN = 60  # most characters of a passage that a line shows


@dataclass(frozen=True)
class Passage:
    """A maximal part of a text that occurs verbatim in the corpus."""

    start: int  # its first character in the text
    end: int  # the character after its last
    document: str  # the name of the first document that contains it
    offset: int  # its position in that document: in characters, or in bytes where it is bytes

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Novelty:
    """How much of a text is copied."""

    text: str
    longest: Passage | None  # None where no character of the text occurs in the corpus
    passages: list[Passage]  # those of at least `copied_chars`, in order; they may overlap
    copied_chars: int  # the least length of a passage that counts as copied
    share: float  # the fraction of the text's characters that are in these passages, 0 to 1

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


Span = tuple[int, int]  # of a text: the first character, and the one after the last
Place = tuple[int, int]  # the index of a document, and the offset in it

_WORD = 8  # bytes
_PIECE = 2**20  # characters or bytes of the corpus that are searched at once
_PAIRS = 2**20  # anchors that are extended at once
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio (Knuth, multiplicative hashing)
_EDGE = b"\xff" * _WORD  # does not occur in UTF-8: no match extends across it

Ints = NDArray[np.int64]


def shared_spans(text: str, corpus: Sequence[Document], least_chars: int) -> dict[Span, Place]:
    """The common passages of text and corpus: the longest, and all of at least `least_chars`.

    Returns:
        passages that are not part of another one, in order, each with its first place in the
        corpus; some shorter ones may be included.
    """
    sample = _Sample(text)
    spans: dict[Span, Place] = {}
    for width, stride in _passes(least_chars):
        spans = _search(sample, corpus, width, stride, least_chars)
        longest = max((end - start for start, end in spans), default=0)
        if longest >= width + stride - 1:  # every passage as long contains an anchor
            break
    maximal: dict[Span, Place] = {}
    last_end = 0
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        if end > last_end:
            maximal[start, end] = spans[start, end]
            last_end = end
    return maximal


def _passes(least_chars: int) -> list[tuple[int, int]]:
    """(bytes of an anchor, bytes from one anchor to the next) of each pass, from coarse to fine."""
    passes = [(_WORD, _WORD), *((width, 1) for width in range(_WORD, 0, -1))]
    return [one for one in passes if sum(one) - 1 <= max(1, least_chars)]


class _Sample:
    """The text as bytes, and the positions of its characters in them."""

    def __init__(self, text: str) -> None:
        self.data = text.encode("utf-8", "surrogatepass")
        values = np.frombuffer(self.data, np.uint8)
        begins = np.append((values & 0xC0) != 0x80, True)  # whether a byte begins a character
        self.starts = np.flatnonzero(begins)  # byte offset of each character, and of the end
        self._begun = np.cumsum(begins) - begins  # characters that begin before each byte
        self._cut = ~begins  # whether a cut before this byte splits a character
        self.edged = np.concatenate([[-1], values, [-1]]).astype(np.int16)

    def characters(self, first: Ints, last: Ints) -> tuple[Ints, Ints]:
        """The complete characters within spans of bytes: (first, after the last)."""
        return self._begun[first], self._begun[last] - self._cut[last]


class _Anchors:
    """A hash table and a sorted index of all substrings of `width` bytes of the sample.

    Args:
        data: the sample.
        width: at most eight.
    """

    def __init__(self, data: bytes, width: int) -> None:
        self._mask = np.uint64(2 ** (8 * width) - 1)
        padded = np.frombuffer(data + bytes(_WORD), np.uint8)
        words = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(padded, _WORD))
        keys = words.view("<u8")[: max(0, len(data) - width + 1), 0] & self._mask
        repeated = np.zeros(len(keys), bool)  # whether the 8 bytes before are the same
        repeated[_WORD:] = (keys[_WORD:] == keys[:-_WORD]) & (width == _WORD)
        self._order = np.lexsort((repeated, keys))
        self._keys = keys[self._order]
        self._fresh = np.append(0, np.cumsum(~repeated[self._order]))
        self._reach = len(data) // _WORD + 3  # words that a passage can extend to each side
        bits = max(16, len(keys).bit_length() + 5)  # a sparse table: at most 1 of 32 slots is taken
        self._shift = np.uint64(64 - bits)
        self._taken = np.zeros(2**bits, bool)
        self._taken[self._slots(keys)] = True

    def _slots(self, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return (keys * _MULTIPLIER) >> self._shift

    def pairs(self, data: bytes, first: int) -> Iterator[tuple[Ints, Ints]]:
        """Anchors: positions in data and sample with the same bytes, in batches.

        In a run of one repeated word (blanks, zeros) redundant positions are skipped: those from
        which the run extends to both sides by more than a passage can, and pairs that are
        preceded by the same word in both, since that pair is an anchor too.

        Args:
            data: looked up at every eighth byte.
            first: the first byte that is looked up.
        """
        words = np.frombuffer(data, "<u8", (len(data) - first) // _WORD, first)
        hits = np.flatnonzero(self._taken[self._slots(words & self._mask)])
        before, after = _places_in_runs(hits, words[hits])
        outer = (before <= self._reach) | (after <= self._reach)
        hits, before = hits[outer], before[outer]
        low = np.searchsorted(self._keys, words[hits] & self._mask, side="left")
        high = np.searchsorted(self._keys, words[hits] & self._mask, side="right")
        counts = np.where(before > 0, self._fresh[high] - self._fresh[low], high - low)
        ends = counts.cumsum()
        cuts = np.searchsorted(ends, np.arange(0, counts.sum() + _PAIRS, _PAIRS), side="right")
        for begin, end in pairwise(cuts):
            here = counts[begin:end]
            runs = np.arange(here.sum()) - np.repeat(here.cumsum() - here, here)
            places = np.repeat(hits[begin:end] * _WORD + first, here)
            yield places, self._order[np.repeat(low[begin:end], here) + runs]


def _places_in_runs(hits: Ints, words: NDArray[np.uint64]) -> tuple[Ints, Ints]:
    """For each word, how many words of its run are before it, and how many from it on.

    Args:
        hits: indices of words in a piece, rising.
        words: the words; a run consists of equal adjacent words.
    """
    breaks = np.flatnonzero((np.diff(hits) != 1) | (words[1:] != words[:-1])) + 1
    bounds = np.concatenate([[0], breaks, [len(hits)]])
    sizes = np.diff(bounds)
    number = np.arange(len(hits))
    return number - np.repeat(bounds[:-1], sizes), np.repeat(bounds[1:], sizes) - number


@dataclass(frozen=True)
class _Piece:
    """Concatenated parts of documents, with `_EDGE` around each."""

    data: bytes
    starts: list[int]  # the offset of each part in `data`
    places: list[Place]  # the place of each part in the corpus
    is_text: list[bool]  # whether each part is characters (else bytes)

    def place(self, at: int) -> Place:
        """The place in the corpus of a byte of `data`."""
        part = bisect_right(self.starts, at) - 1
        number, offset = self.places[part]
        before = self.data[self.starts[part] : at]
        text = before.decode("utf-8", "surrogatepass") if self.is_text[part] else before
        return number, offset + len(text)


def _pieces(corpus: Sequence[Document], overlap: int) -> Iterator[_Piece]:
    """The corpus in pieces; those of one long document overlap."""
    data, starts, places, is_text = bytearray(_EDGE), [], [], []
    for number, document in enumerate(corpus):
        end = document.start + len(document)
        for start in range(document.start, end, _PIECE):
            part = document.whole[start : min(start + _PIECE + overlap, end)]
            starts.append(len(data))
            places.append((number, start - document.start))
            is_text.append(isinstance(part, str))
            data += part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
            data += _EDGE
            if len(data) >= _PIECE:
                yield _Piece(bytes(data), starts, places, is_text)
                data, starts, places, is_text = bytearray(_EDGE), [], [], []
    yield _Piece(bytes(data), starts, places, is_text)


def _search(
    sample: _Sample, corpus: Sequence[Document], width: int, stride: int, least_chars: int
) -> dict[Span, Place]:
    """Common passages with an anchor: those of `least_chars`, and the longest found so far."""
    anchors = _Anchors(sample.data, width)
    found: dict[Span, Place] = {}
    longest = 1
    for piece in _pieces(corpus, len(sample.data)):
        values = np.frombuffer(piece.data, np.uint8)
        here: dict[Span, int] = {}
        for first in range(0, _WORD, stride):
            for places, own in anchors.pairs(piece.data, first):
                starts, ends, begins = _extend(sample, values, places, own, stride)
                longest = max(longest, int((ends - starts).max(initial=0)))
                kept = np.flatnonzero(ends - starts >= min(longest, least_chars))
                for i in kept[np.lexsort((begins[kept], ends[kept], starts[kept]))]:
                    span = int(starts[i]), int(ends[i])
                    here[span] = min(here.get(span, len(values)), int(begins[i]))
        for span, at in here.items():
            if span not in found:
                found[span] = piece.place(at)
    return found


def _extend(
    sample: _Sample, values: NDArray[np.uint8], places: Ints, own: Ints, stride: int
) -> tuple[Ints, Ints, Ints]:
    """Extend the first anchor of each passage to both sides, to complete characters.

    Args:
        sample: the text.
        values: a piece of the corpus.
        places: positions of the anchors in the piece.
        own: positions of the anchors in the sample, in bytes.
        stride: bytes from one anchor of a passage to the next.

    Returns:
        first characters, characters after the last, and positions in the piece.
    """
    left = _common(values, sample.edged, places - 1, own, step=-1, most=stride)
    first = left < stride  # else there is an anchor `stride` bytes before
    left, places, own = left[first], places[first], own[first]
    right = _common(values, sample.edged, places, own + 1, step=1, most=len(sample.data))
    starts, ends = sample.characters(own - left, own + right)
    return starts, ends, places + sample.starts[starts] - own


def _common(
    one: NDArray[np.uint8], other: NDArray[np.int16], at: Ints, place: Ints, *, step: int, most: int
) -> Ints:
    """How many values from `at` and `place` on are equal in both arrays, at most `most`.

    A `step` of -1 compares backwards.
    """
    lengths = np.zeros(len(at), np.int64)
    alive = np.arange(len(at))
    for length in range(most):
        offset = step * length
        alive = alive[one[at[alive] + offset] == other[place[alive] + offset]]
        if not len(alive):
            break
        lengths[alive] += 1
    return lengths
