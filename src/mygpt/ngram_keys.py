"""Which n-grams have a row of their own: their keys, counted in a text and looked up again.

A table of order n knows the n-grams that occur in the training text by their keys, sorted; the
row of an n-gram is its key's place among them plus 1, and row 0 stands for all others. The key is
(row of the first n - 1 tokens) * V + last token, where a single token's row is itself; so an
n-gram is in its table only if its first n - 1 tokens are in theirs.
Letters: N highest order, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError

Keys = NDArray[np.int64]
Tokens = NDArray[np.integer[Any]]

_PIECE = 2**22  # tokens at a time
_DENSE = 2**22  # up to so many possible keys each has a number of its own, and nothing is sorted
_MOST_PENDING = 2**23  # keys and counts of pieces that wait to be merged


def count_ngrams(
    tokens: Tokens, vocab_size: int, orders: int, *, min_count: int = 1, max_rows: int = 2**17
) -> list[Keys]:
    """The keys of a text's n-grams, sorted, one array for each order from 2 to `orders`.

    Args:
        tokens: (T,) ids below V; a mapped file is read in pieces.
        vocab_size: V.
        orders: N.
        min_count: n-grams that occur less often are left out.
        max_rows: of more than `max_rows` - 1, the most frequent are kept (of equals those with
            the lower key): row 0 is a row too.

    Memory: 16 bytes for each different n-gram of one order, beside some 200 MB.

    Raises:
        InputError: for tokens that are not below V.
    """
    _check_tokens(tokens, vocab_size)
    tables: list[Keys] = []
    contexts = vocab_size  # rows that a context may have, 0 included
    for order in range(2, orders + 1):
        counts = _Counts(contexts * vocab_size)
        for first in range(0, len(tokens), _PIECE):
            # An n-gram is counted in the piece that its last token lies in.
            piece = tokens[max(0, first - order + 1) : first + _PIECE]
            counts.add(_keys_in(piece, tables, vocab_size))
        keys, times = counts.total()
        keys, times = keys[times >= min_count], times[times >= min_count]
        if len(keys) > max_rows - 1:
            keys = np.sort(keys[np.argsort(-times, kind="stable")[: max_rows - 1]])
        tables.append(keys)
        contexts = len(keys) + 1
    return tables


def ngram_rows_of(tokens: Tokens, keys: Sequence[Keys], vocab_size: int) -> list[NDArray[np.int32]]:
    """The row at each position of a text, (T,) for each order from 2 on.

    n-grams reach back as far as the text does: who cuts windows out of it sets the first n - 1
    positions of each to 0. A negative token stands for none: no n-gram holds it.
    """
    found: list[NDArray[np.int32]] = []
    for known in keys:
        context = found[-1] if found else tokens
        look_up = _Lookup(known, len(tokens))
        rows = np.zeros(len(tokens), np.int32)
        for first in range(1, len(tokens), _PIECE):
            last = first + _PIECE
            before = context[first - 1 : min(last, len(tokens)) - 1].astype(np.int64)
            rows[first:last] = look_up(before * vocab_size + tokens[first:last])
        found.append(rows)
    return found


def check_keys(keys: Sequence[Keys], vocab_size: int) -> None:
    """Raise `InputError` where tables' keys are none: they rise, and contexts have rows."""
    contexts = range(vocab_size)  # an n-gram's first tokens have one of these rows
    for order, known in enumerate(keys, start=2):
        if (known[1:] <= known[:-1]).any():
            raise InputError(f"the keys of the {order}-grams do not rise")
        least, end = contexts.start * vocab_size, contexts.stop * vocab_size
        if len(known) and not (least <= known[0] and known[-1] < end):
            raise InputError(
                f"the keys of the {order}-grams run from {known[0]} to {known[-1]}, and with "
                f"{len(contexts):,} contexts they lie from {least} to {end - 1}"
            )
        contexts = range(1, len(known) + 1)  # row 0 is no n-gram's


def _check_tokens(tokens: Tokens, vocab_size: int) -> None:
    for first in range(0, len(tokens), _PIECE):
        piece = tokens[first : first + _PIECE]
        if piece.min() < 0 or piece.max() >= vocab_size:
            wrong = piece[(piece < 0) | (piece >= vocab_size)][0]
            raise InputError(
                f"the text holds id {wrong}: with vocab_size={vocab_size} ids run from 0 to "
                f"{vocab_size - 1}"
            )


def _keys_in(piece: Tokens, tables: Sequence[Keys], vocab_size: int) -> Keys:
    """The keys of all n-grams of the order after `tables`' whose contexts have rows."""
    last = piece[1:]
    if not tables:
        return piece[:-1].astype(np.int64) * vocab_size + last
    context = ngram_rows_of(piece, tables, vocab_size)[-1][:-1].astype(np.int64)
    known = context > 0
    keys: Keys = context[known] * vocab_size + last[known]
    return keys


class _Counts:
    """How often each key occurs, added up piece by piece.

    Args:
        space: keys are below it.
    """

    def __init__(self, space: int) -> None:
        self._dense = np.zeros(space, np.int64) if space <= _DENSE else None
        self._pending: list[tuple[Keys, Keys]] = []  # keys, sorted, and their counts

    def add(self, keys: Keys) -> None:
        """Count these too."""
        if self._dense is not None:
            self._dense += np.bincount(keys, minlength=len(self._dense))
            return
        self._pending.append(np.unique(keys, return_counts=True))
        if sum(len(known) for known, _ in self._pending[1:]) > _MOST_PENDING:
            self._pending = [self._merged()]

    def total(self) -> tuple[Keys, Keys]:
        """All keys that occurred, sorted, and how often each did."""
        if self._dense is None:
            return self._merged()
        keys = np.flatnonzero(self._dense)
        return keys, self._dense[keys]

    def _merged(self) -> tuple[Keys, Keys]:
        if not self._pending:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        if len(self._pending) == 1:
            return self._pending[0]
        keys, counts = (np.concatenate(parts) for parts in zip(*self._pending, strict=True))
        self._pending.clear()
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], counts[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        return keys[starts], np.add.reduceat(counts, starts) if len(starts) else counts


class _Lookup:
    """From keys to rows; where many are asked for, by a list of all possible keys.

    Args:
        known: a table's keys.
        times: about how many will be asked for.
    """

    def __init__(self, known: Keys, times: int) -> None:
        self._known = known
        self._rows: NDArray[np.int32] | None = None
        if len(known) and known[-1] < min(_DENSE, 4 * times):
            self._rows = np.zeros(known[-1] + 2, np.int32)  # the last one's for what lies beyond
            self._rows[known] = np.arange(1, len(known) + 1)

    def __call__(self, keys: Keys) -> NDArray[np.integer[Any]]:
        """The row of each key; 0 for one that is not known."""
        if len(self._known) == 0:
            return np.zeros(len(keys), np.int32)
        if self._rows is not None:
            beyond = len(self._rows) - 1
            inside = (keys >= 0) & (keys < beyond)
            return self._rows[np.where(inside, keys, beyond)]
        place = np.searchsorted(self._known, keys)
        held = self._known[np.minimum(place, len(self._known) - 1)]
        return np.where(held == keys, place + 1, 0)
