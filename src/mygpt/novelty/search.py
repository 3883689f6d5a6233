"""Every long passage that a text shares with a corpus, in one pass over the corpus.

A shared passage of 15 bytes holds eight that begin at a multiple of eight in the corpus. So the
text's every eight bytes go into a table, every eighth place of the corpus is looked up in it, and
what is found there (the anchor) is made as long as it gets. Only where nothing of 15 bytes is
shared are shorter anchors, at every place, looked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mygpt.text import Document

Span = tuple[int, int]  # of a text: its first character, and the one after its last
Place = tuple[int, int]  # the number of a document, and the offset in it

_WORD = 8  # bytes
_PIECE = 2**20  # characters or bytes of the corpus that are looked at together
_PAIRS = 2**20  # anchors made longer together
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: spreads the keys
_EDGE = b"\xff" * _WORD  # no byte of UTF-8: nothing is shared across it

Ints = NDArray[np.int64]


def shared_spans(text: str, corpus: Sequence[Document], least_chars: int) -> dict[Span, Place]:
    """The passages that text and corpus share: the longest, and all of at least `least_chars`.

    Returns:
        passages that are no part of another, in order, each with the first place that has it;
        some shorter ones may be among them.
    """
    sample = _Sample(text)
    spans: dict[Span, Place] = {}
    for width, stride in _passes(least_chars):
        spans = _search(sample, corpus, width, stride, least_chars)
        longest = max((end - start for start, end in spans), default=0)
        if longest >= width + stride - 1:  # whatever is as long holds an anchor
            break
    outermost: dict[Span, Place] = {}
    reached = 0
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        if end > reached:
            outermost[start, end] = spans[start, end]
            reached = end
    return outermost


def _passes(least_chars: int) -> list[tuple[int, int]]:
    """Ways to look, each finer than the one before: bytes of an anchor, bytes between two."""
    ways = [(_WORD, _WORD), *((width, 1) for width in range(_WORD, 0, -1))]
    return [way for way in ways if sum(way) - 1 <= max(1, least_chars)]


class _Sample:
    """The text as bytes, and where its characters are in them."""

    def __init__(self, text: str) -> None:
        self.data = text.encode("utf-8", "surrogatepass")
        values = np.frombuffer(self.data, np.uint8)
        begins = np.append((values & 0xC0) != 0x80, True)  # a character, at each byte
        self.starts = np.flatnonzero(begins)  # bytes before each character, and before the end
        self._begun = np.cumsum(begins) - begins  # characters begun before each byte
        self._cut = ~begins  # whether a cut before this byte goes through a character
        self.edged = np.concatenate([[-1], values, [-1]]).astype(np.int16)

    def characters(self, first: Ints, last: Ints) -> tuple[Ints, Ints]:
        """The whole characters in spans of bytes."""
        return self._begun[first], self._begun[last] - self._cut[last]


class _Anchors:
    """The places of a sample, by the `width` bytes that begin there.

    Args:
        data: the sample.
        width: at most eight.
    """

    def __init__(self, data: bytes, width: int) -> None:
        self._mask = np.uint64(2 ** (8 * width) - 1)
        padded = np.frombuffer(data + bytes(_WORD), np.uint8)
        words = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(padded, _WORD))
        keys = words.view("<u8")[: max(0, len(data) - width + 1), 0] & self._mask
        again = np.zeros(len(keys), bool)  # the eight bytes before are the same ones
        again[_WORD:] = (keys[_WORD:] == keys[:-_WORD]) & (width == _WORD)
        self._order = np.lexsort((again, keys))
        self._keys = keys[self._order]
        self._fresh = np.append(0, np.cumsum(~again[self._order]))
        self._reach = len(data) // _WORD + 3  # words on each side that a passage can touch
        bits = max(16, len(keys).bit_length() + 5)  # few of the table's slots are taken
        self._shift = np.uint64(64 - bits)
        self._taken = np.zeros(2**bits, bool)
        self._taken[self._slots(keys)] = True

    def _slots(self, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return (keys * _MULTIPLIER) >> self._shift

    def pairs(self, data: bytes, first: int) -> Iterator[tuple[Ints, Ints]]:
        """Where data and sample have the same bytes: places in both, some at a time.

        In a run of one word (blanks, zeros) the places that show nothing new are left out: those
        with the whole reach of a passage on both sides, and pairs whose eight bytes before are
        the same word in both, since that pair is an anchor too.

        Args:
            data: looked up at every eighth byte.
            first: the first byte looked up.
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
    """How many words of its run come before each, and how many from it on.

    Args:
        hits: numbers of words in a piece, rising.
        words: the words; a run is of equal ones side by side.
    """
    breaks = np.flatnonzero((np.diff(hits) != 1) | (words[1:] != words[:-1])) + 1
    bounds = np.concatenate([[0], breaks, [len(hits)]])
    sizes = np.diff(bounds)
    number = np.arange(len(hits))
    return number - np.repeat(bounds[:-1], sizes), np.repeat(bounds[1:], sizes) - number


@dataclass(frozen=True)
class _Piece:
    """Parts of documents in a row, with an edge around each.

    Attributes:
        data: the bytes.
        starts: where in them each part begins.
        places: where in the corpus it begins.
        is_text: whether it was characters.
    """

    data: bytes
    starts: list[int]
    places: list[Place]
    is_text: list[bool]

    def place(self, at: int) -> Place:
        """Where in the corpus a byte of the data is."""
        part = bisect_right(self.starts, at) - 1
        number, offset = self.places[part]
        before = self.data[self.starts[part] : at]
        text = before.decode("utf-8", "surrogatepass") if self.is_text[part] else before
        return number, offset + len(text)


def _pieces(corpus: Sequence[Document], overlap: int) -> Iterator[_Piece]:
    """The corpus in pieces; of a long document each begins before the one before it ends."""
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
    """Shared passages that hold an anchor: those of `least_chars`, and the longest so far."""
    anchors = _Anchors(sample.data, width)
    found: dict[Span, Place] = {}
    longest = 1
    for piece in _pieces(corpus, len(sample.data)):
        values = np.frombuffer(piece.data, np.uint8)
        here: dict[Span, int] = {}
        for first in range(0, _WORD, stride):
            for places, own in anchors.pairs(piece.data, first):
                starts, ends, begins = _lengthen(sample, values, places, own, stride)
                longest = max(longest, int((ends - starts).max(initial=0)))
                kept = np.flatnonzero(ends - starts >= min(longest, least_chars))
                for i in kept[np.lexsort((begins[kept], ends[kept], starts[kept]))]:
                    span = int(starts[i]), int(ends[i])
                    here[span] = min(here.get(span, len(values)), int(begins[i]))
        for span, at in here.items():
            if span not in found:
                found[span] = piece.place(at)
    return found


def _lengthen(
    sample: _Sample, values: NDArray[np.uint8], places: Ints, own: Ints, stride: int
) -> tuple[Ints, Ints, Ints]:
    """Make a passage's first anchor as long as it gets, in whole characters.

    Args:
        sample: the text.
        values: a piece of the corpus.
        places: of the anchors in the piece.
        own: of the anchors in the sample, in bytes.
        stride: bytes between the anchors of a passage.

    Returns:
        first characters, characters after the last, and where that is in the piece.
    """
    left = _shared(values, sample.edged, places - 1, own, step=-1, most=stride)
    first = left < stride  # else there is an anchor `stride` bytes before
    left, places, own = left[first], places[first], own[first]
    right = _shared(values, sample.edged, places, own + 1, step=1, most=len(sample.data))
    starts, ends = sample.characters(own - left, own + right)
    return starts, ends, places + sample.starts[starts] - own


def _shared(
    one: NDArray[np.uint8], other: NDArray[np.int16], at: Ints, place: Ints, *, step: int, most: int
) -> Ints:
    """How many values, at most `most`, two rows share from `at` and `place` on.

    A `step` of -1 counts backwards.
    """
    lengths = np.zeros(len(at), np.int64)
    alive = np.arange(len(at))
    for length in range(most):
        reach = step * length
        alive = alive[one[at[alive] + reach] == other[place[alive] + reach]]
        if not len(alive):
            break
        lengths[alive] += 1
    return lengths
