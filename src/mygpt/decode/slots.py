"""A batch for engines that decode each row separately: every request has its own `Decoding`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mygpt.engine import Decoding, Engine, Request, check_prompt_fits, check_prompt_ids
from mygpt.errors import InputError


@dataclass
class _Row:
    """The decoding of one row, and how many more tokens it may draw."""

    decoding: Decoding
    left: int
    ends: frozenset[int]


class SeparateBatch:
    """See `mygpt.engine.Batch`; rows share no computation.

    Args:
        engine: starts the decodings.
        size: the number of slots.
        vocab_size: V of its model; None if it is not known: then ids are not checked.
        max_seq_len: the model's window.
    """

    def __init__(
        self, engine: Engine, size: int, *, vocab_size: int | None, max_seq_len: int
    ) -> None:
        self._engine, self._vocab_size, self._max_seq_len = engine, vocab_size, max_seq_len
        self._rows: dict[int, _Row] = {}  # by slot
        self._size = size
        self._free = deque(range(size))
        self._failures: dict[int, InputError] = {}

    @property
    def size(self) -> int:
        """The number of slots."""
        return self._size

    @property
    def active(self) -> int:
        """The number of rows that have not ended."""
        return sum(row.left > 0 for row in self._rows.values())

    def join(self, request: Request) -> int:
        """Take a free slot; see `Batch`."""
        assert self._free, "no slot is free: the caller has to count them"
        check_prompt_fits(len(request.prompt), self._max_seq_len, request.overflow)
        if self._vocab_size is not None:
            check_prompt_ids(request.prompt, self._vocab_size)
        row = _Row(
            self._engine.start([request]), request.most_tokens(self._max_seq_len), request.ends
        )
        slot = self._free.popleft()
        self._rows[slot] = row
        return slot

    def advance(self, most: int) -> dict[int, list[int]]:
        """Draw up to `most` tokens for every row; see `Batch`."""
        self._failures = {}
        new: dict[int, list[int]] = {slot: [] for slot in self._rows}
        for slot, row in self._rows.items():
            try:
                # One by one: tokens drawn before a failure are returned.
                while row.left > 0 and len(new[slot]) < most:
                    (ids,) = row.decoding.advance(1)
                    new[slot] += ids
                    row.left = row.left - 1 if row.ends.isdisjoint(ids) else 0
            except InputError as error:
                self._failures[slot], row.left = error, 0
        return new

    def failures(self) -> dict[int, InputError]:
        """The slots that failed in the last `advance`; see `Batch`."""
        return dict(self._failures)

    def end(self, slot: int) -> None:
        """Free a slot and its row's cache; see `Batch`."""
        del self._rows[slot]
        self._free.append(slot)

    def logits(self, slot: int) -> NDArray[np.float32]:
        """(V,) the logits of the row's last token; see `Batch`."""
        return self._rows[slot].decoding.logits(0)
