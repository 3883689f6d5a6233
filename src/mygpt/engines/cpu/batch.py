"""A batch that requests join and leave between tokens ("continuous batching").

After Yu et al., "Orca: a distributed serving system for transformer-based generative models",
2022: the compiled loop lists its rows anew at each step, so that a row may come at any.
Letters: B slots, D head size, G key/value heads, L window, N layers, V vocabulary.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from mygpt.core.config import GPTConfig
from mygpt.core.window import check_prompt_fits
from mygpt.engines.contract import Request
from mygpt.engines.cpu import layout as at
from mygpt.engines.cpu.decoding import Loop
from mygpt.engines.cpu.memory import Memory
from mygpt.engines.cpu.pack import PackedModel, padded
from mygpt.engines.cpu.workers import usable_cores
from mygpt.errors import InputError

# Steps that several threads take in a run, which costs some 30 us and up to a tenth of the speed of
# one text alone; but a run whose threads wait for their cores holds up all who want to join.
_TOGETHER = 8
_POSITIONS = 1024  # that a slot has room for at first
_SPARE_TEXT = 64  # tokens of a text beyond two windows
_WORTH_SHARING = 16  # tokens of a prompt: fewer are read as fast as looked for
# What others wait for at a time while prompts are read: a few ms; and tokens that it takes at
# the least, as each piece passes over all weights.
_PIECE_PRODUCTS, _LEAST_PIECE = 500_000_000, 32


class CpuBatch:
    """See `mygpt.engines.contract.Batch`.

    All memory is taken at the beginning and none later: `slot_bytes` a slot, nearly all of it
    keys and values for a whole window, of which the system gives only what texts have filled.
    Of a window past 1,024 tokens it grows, to what the longest text has needed so far.
    A text keeps the window and some more, so it may be written on for ever.

    A long prompt is read in pieces between the others' tokens. One that begins as another
    slot's text did is not read again as far as they agree: as when one prompt has many samples,
    or grows a token at a time. Slots that are free again still count, and are taken in the
    order in which they became so.

    Args:
        model: the model; it stays as it is now.
        size: B, how many slots.
        threads: how many to use; None lets the work of each step decide.
    """

    def __init__(self, model: PackedModel, size: int, threads: int | None) -> None:
        window = model.config.max_seq_len
        self._window = window
        self._positions = min(window, _POSITIONS)  # that a text has room for
        self._memory = Memory(
            model,
            size,
            capacity=padded(self._positions),
            text_width=_text_width(self._positions),
            threads=threads or usable_cores(),
        )
        self._slots = self._memory.slots
        self._loop = Loop(self._memory, threads)
        self._requests: dict[int, Request] = {}  # by slot
        self._free = deque(range(size))
        self._unread: list[int] = []  # slots whose prompts are still to be read, oldest first
        self._piece = max(_LEAST_PIECE, _PIECE_PRODUCTS // model.config.num_parameters())
        self._failures: dict[int, InputError] = {}

    @property
    def size(self) -> int:
        """How many slots there are."""
        return len(self._slots)

    @property
    def active(self) -> int:
        """How many rows still draw."""
        return self._loop.active + len(self._unread)

    def join(self, request: Request) -> int:
        """Take a free slot; see `Batch`."""
        assert self._free, "no slot is free: the caller counts"
        check_prompt_fits(len(request.prompt), self._window, request.overflow)
        self._fit(len(request.prompt))
        slot = self._free[0]
        try:
            self._memory.put(slot, request, shown=request.prompt[-self._window :])
        except BaseException:  # no memory, say: half a request must not draw
            self._slots[slot, at.STATUS] = at.FREE
            raise
        self._free.popleft()
        self._requests[slot] = request
        row = self._slots[slot]
        if row[at.STATUS] == at.ACTIVE and row[at.LENGTH] > _WORTH_SHARING:
            row[at.STATUS] = at.ENDED  # until it is read
            self._unread.append(slot)
        return slot

    def advance(self, most: int) -> dict[int, list[int]]:
        """Draw up to `most` tokens for every row; see `Batch`."""
        new: dict[int, list[int]] = {slot: [] for slot in self._requests}
        self._failures = {}
        if most > 0:
            self._read_prompts()
        while most > 0 and self._loop.active:
            steps = min(
                self._loop.steps_at_once(most, _TOGETHER), self._positions + _SPARE_TEXT - 1
            )
            if self._positions < self._window:
                self._fit(self._longest() + steps)
            self._memory.slide_texts(steps)
            before = self._slots[:, at.LENGTH].tolist()
            self._loop.draw(steps)
            self._failures |= self._loop.take_failures(lambda row: self._requests[row].sampling)
            ends = self._slots[:, at.LENGTH].tolist()
            for slot, ids in new.items():
                if ends[slot] > before[slot]:
                    ids += self._memory.text[slot, before[slot] : ends[slot]].tolist()
            most -= steps
        return {slot: ids for slot, ids in new.items() if slot not in self._unread}

    def _longest(self) -> int:
        """Tokens that a row which draws sees, at the most."""
        active = self._slots[self._slots[:, at.STATUS] == at.ACTIVE]
        return int((active[:, at.LENGTH] - np.maximum(active[:, at.START], 0)).max(initial=0))

    def _fit(self, positions: int) -> None:
        """Have room for texts of so many tokens, though for no more than a window."""
        positions = min(positions, self._window)
        if positions > self._positions:
            self._positions = min(self._window, max(positions, 2 * self._positions))
            self._memory.grow(padded(self._positions), _text_width(self._positions))

    def failures(self) -> dict[int, InputError]:
        """The slots that failed in the last `advance`; see `Batch`."""
        return dict(self._failures)

    def end(self, slot: int) -> None:
        """Free a slot; see `Batch`."""
        del self._requests[slot]
        self._slots[slot, at.STATUS] = at.FREE
        self._free.append(slot)
        if slot in self._unread:
            self._unread.remove(slot)

    def logits(self, slot: int) -> NDArray[np.float32]:
        """(V,) the prediction behind the row's last token; see `Batch`."""
        assert slot in self._requests, "the slot is free"
        return self._memory.logits_of(slot)

    def _read_prompts(self) -> None:
        """Read a piece of the prompts that wait, or more while no row draws."""
        room = self._piece
        while self._unread and (room > 0 or not self._loop.active):
            room -= self._read_piece(room if room > 0 else self._piece)

    def _read_piece(self, room: int) -> int:
        """Read up to `room` tokens of prompts, first come, first served; how many they were.

        Of prompts that begin alike one is read, and the others wait to take over from it.
        Rows whose prompt is read draw from now on.
        """
        lengths: dict[int, int] = {}
        beginnings, left = set(), room
        for slot in self._unread:
            beginning = self._memory.text[slot, :_WORTH_SHARING].tobytes()
            if left == 0 or beginning in beginnings:
                continue
            if not self._slots[slot, at.CACHED]:
                self._take_over(slot)
            length, cached = self._slots[slot, [at.LENGTH, at.CACHED]].tolist()
            unread = min(left, length - 1 - cached)
            if unread:
                beginnings.add(beginning)
            left -= unread
            lengths[slot] = length
            self._slots[slot, at.LENGTH] = cached + unread + 1  # all but the last token is read
        if left < room:
            self._loop.read(list(lengths))
        for slot, length in lengths.items():
            self._slots[slot, at.LENGTH] = length
            if self._slots[slot, at.CACHED] == length - 1:
                self._slots[slot, at.STATUS] = at.ACTIVE
                self._unread.remove(slot)
        return room - left

    def _take_over(self, slot: int) -> None:
        """Copy what some slot has read of this one's prompt, but for the last token."""
        last = self._slots[slot, at.LENGTH] - 1
        known = self._memory.known_prefixes(self._memory.text[slot, :last])
        best = int(known.argmax())
        count = int(known[best])
        # What a broken model made of a later token may have spoilt an earlier one's.
        if count >= _WORTH_SHARING and self._memory.is_sound(best, count):
            self._memory.share_cache(best, [slot], count)


def _text_width(window: int) -> int:
    return 2 * window + _SPARE_TEXT


def slot_bytes(config: GPTConfig) -> int:
    """Bytes of memory that each slot of a `CpuBatch` takes at the most."""
    window, vocab = config.max_seq_len, config.vocab_size
    head = config.head_size + padded(config.head_size)  # a key and a value
    floats = config.num_layers * config.kv_heads * padded(window) * head
    floats += 2 * padded(vocab) + vocab + at.SETTINGS_SIZE
    return 4 * floats + 8 * (_text_width(window) + at.SLOT_SIZE) + vocab
