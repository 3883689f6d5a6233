"""What a decoding remembers between steps, and its room to work in, as the kernels want it.

Letters: B slots (one a request), C embedding, D head size, G key/value heads, N layers, R rows,
T time, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mygpt.core.config import GREEDY_BELOW
from mygpt.engines.contract import Request, check_prompt_ids
from mygpt.engines.cpu import layout as at
from mygpt.engines.cpu.pack import Arena, PackedModel, padded

_OVERFLOWS = {"crop": at.CROP, "refill": at.REFILL, "stop": at.STOP}
_MAX_ROWS = 240  # rows of one pass: whole tiles for two threads, and few enough to stay in cache


class Memory:
    """Everything that a job's addresses point to, besides the model; slots are free at first.

    Args:
        model: the model.
        count: B, how many slots there are.
        capacity: tokens that a slot's cache has room for, a whole number of vectors.
        text_width: tokens that a slot's text has room for.
        threads: how many will work at the most.

    Attributes:
        job: the job (see `layout`).
        slots: (B, SLOT_SIZE) int64.
        settings: (B, SETTINGS_SIZE) float32.
        seen: (B, V) int8, which tokens occurred, and which end the row (see `layout`).
        text: (B, T) int64, prompts and what was drawn.
        keys: (B, N G, D, T) float32.
        values: (B, N G, T, D padded) float32.
        probabilities: (B, V padded) float32; `logits` likewise, in an order of its own.
        noise: (B, V) float32, the caller's.
    """

    def __init__(
        self, model: PackedModel, count: int, *, capacity: int, text_width: int, threads: int
    ) -> None:
        self.config = config = model.config
        self._model = model  # the job's addresses point into it
        self.job = job = model.job.copy()
        self.slots = np.zeros((count, at.SLOT_SIZE), np.int64)
        self.settings = np.zeros((count, at.SETTINGS_SIZE), np.float32)
        self.seen = np.zeros((count, config.vocab_size), np.int8)
        self.text = np.zeros((count, text_width), np.int64)
        pieces, size = config.num_layers * config.kv_heads, config.head_size
        self.keys = np.zeros((count, pieces, size, capacity), np.float32)
        self.values = np.zeros((count, pieces, capacity, padded(size)), np.float32)
        job[at.SLOTS], self._threads = count, threads
        job[at.MAX_ROWS] = rows = max(1, min(_MAX_ROWS, count * capacity))
        self._make_room(rows, threads)
        for place, array in (
            (at.SLOT_TABLE, self.slots),
            (at.SETTINGS, self.settings),
            (at.SEEN, self.seen),
        ):
            job[place] = array.ctypes.data
        self._place_cache()
        self._place_text()
        self.job_address: int = job.ctypes.data

    def _place_cache(self) -> None:
        """Tell the job where keys and values are, and give it what grows with their room."""
        job, capacity = self.job, self.keys.shape[-1]
        job[at.TIME_STRIDE] = capacity
        job[at.KEYS], job[at.VALUES] = self.keys.ctypes.data, self.values.ctypes.data
        count = self._threads * at.ROWS * capacity
        self._scores = Arena(4 * count + 64).take(count)
        job[at.SCORES] = self._scores.ctypes.data
        self._model.place_rotary(job, min(capacity, self.config.max_seq_len))

    def grow(self, capacity: int, text_width: int) -> None:
        """Have room for longer texts in every slot; what was read and written is kept."""
        keys, values, text = self.keys, self.values, self.text
        self.keys = np.zeros((*keys.shape[:-1], capacity), np.float32)
        self.values = np.zeros((*values.shape[:2], capacity, values.shape[-1]), np.float32)
        self.text = np.zeros((len(text), text_width), np.int64)
        for slot, cached in enumerate(self.slots[:, at.CACHED].tolist()):
            self.keys[slot, :, :, :cached] = keys[slot, :, :, :cached]
            self.values[slot, :, :cached] = values[slot, :, :cached]
        self.text[:, : text.shape[1]] = text
        self._place_cache()
        self._place_text()

    def put(self, number: int, request: Request, shown: NDArray[np.int64] | None = None) -> None:
        """Have a request in a slot, whatever was there before.

        Args:
            number: the slot.
            request: what to continue.
            shown: the prompt's end alone, of a window's length at least, where nobody will ask
                for what stands before it.

        Raises:
            InputError: for a prompt that is empty or holds an unknown id; nothing was changed.
        """
        check_prompt_ids(request.prompt, self.config.vocab_size)
        text = request.prompt if shown is None else shown
        sampling, slot = request.sampling, self.slots[number]
        room = request.room(self.config.max_seq_len)
        slot[:] = 0
        slot[at.STATUS] = at.ACTIVE if room else at.ENDED
        slot[at.LENGTH], slot[at.START], slot[at.LIMIT] = len(text), -1, room
        slot[at.OVERFLOW] = _OVERFLOWS[request.overflow]
        slot[at.TOP_K] = min(sampling.top_k or 0, self.config.vocab_size)
        slot[at.GREEDY] = sampling.greedy
        seed = request.stream.seed  # 64 bits without a sign, in the place of 64 with one
        slot[at.SEED] = seed - 2**64 if seed >= 2**63 else seed
        slot[at.INDEX] = request.stream.index
        slot[at.LOGITS_ROW] = -1  # the slot's own, in `probabilities`
        self.probabilities[number] = 0
        min_p = sampling.min_p or 0.0
        penalty = sampling.repetition_penalty
        with np.errstate(over="ignore"):  # past float32 a temperature is infinite, as in torch
            self.settings[number] = (
                max(sampling.temperature, GREEDY_BELOW),
                1.0 if sampling.top_p is None else sampling.top_p,
                np.log(min_p) if min_p > 0 else -np.inf,
                1.0 if penalty is None else penalty,
            )
        self.text[number, : len(text)] = text
        self.seen[number] = 0
        ends = [end for end in request.ends if 0 <= end < self.config.vocab_size]
        self.seen[number, ends] = at.ENDS
        self.seen[number, request.prompt] |= at.OCCURRED

    def _make_room(self, rows: int, threads: int) -> None:
        """Buffers that hold nothing between runs, and the results."""
        job, count = self.job, len(self.slots)
        width, vocab = int(job[at.WIDTH_STRIDE]), int(job[at.VOCAB_STRIDE])
        sizes = {
            at.X: rows * width,
            at.X_LAST: rows * width,
            at.NORMED: threads * rows * width,
            at.QUERY: rows * int(job[at.QUERY_STRIDE]),
            at.KEY_VALUE: rows * int(job[at.KEY_VALUE_STRIDE]),
            at.ATTENDED: rows * int(job[at.ATTENDED_STRIDE]),
            at.GATE: rows * int(job[at.HIDDEN_STRIDE]),
            at.UP: rows * int(job[at.HIDDEN_STRIDE]),
            at.SCRATCH: threads * vocab,
            at.BARRIER: 16,  # a line of its own
            at.PROBABILITIES: count * vocab,
            at.LOGITS: count * vocab,
            at.NOISE: count * self.config.vocab_size,
        } | dict.fromkeys(range(at.ROW_SLOT, at.OUTPUT_POSITION + 1), 2 * rows)
        # Sizes are in floats; every buffer is rounded up to whole lines.
        starts = np.cumsum([0, *(-(-size // 16) * 16 for size in sizes.values())])
        self._room = Arena(int(starts[-1]) * 4 + 64).take(int(starts[-1]))
        address = self._room.ctypes.data
        for place, start in zip(sizes, starts.tolist(), strict=False):
            job[place] = address + 4 * start
        places = dict(zip(sizes, starts.tolist(), strict=False))

        def view(place: int, columns: int) -> NDArray[np.float32]:
            return self._room[places[place] :][: count * columns].reshape(count, columns)

        self.probabilities, self.logits = view(at.PROBABILITIES, vocab), view(at.LOGITS, vocab)
        self.noise = view(at.NOISE, self.config.vocab_size)
        self._barrier = self._room[places[at.BARRIER] :][:16]

    def reset_barrier(self) -> None:
        """Count meetings from nothing: needed where the number of threads has changed."""
        self._barrier.fill(0)

    def _place_text(self) -> None:
        self.job[at.TEXT], self.job[at.TEXT_STRIDE] = self.text.ctypes.data, self.text.shape[1]

    def reserve_text(self, steps: int) -> None:
        """Have room for `steps` more tokens in every row: texts grow."""
        needed = int(self.slots[:, at.LENGTH].max(initial=0)) + steps
        if needed > self.text.shape[1]:
            room = np.zeros((len(self.text), needed + needed // 2), np.int64)
            room[:, : self.text.shape[1]] = self.text
            self.text = room
            self._place_text()

    def slide_texts(self, steps: int) -> None:
        """Have room for `steps` more tokens in every row that draws: texts forget.

        What lies before a row's window goes. There must be room for a window and `steps` + 1.
        """
        slots = self.slots
        full = slots[:, at.LENGTH] + steps > self.text.shape[1]
        if not full.any():
            return
        for row in np.flatnonzero(full & (slots[:, at.STATUS] == at.ACTIVE)).tolist():
            start, length = slots[row, at.START], slots[row, at.LENGTH]
            self.text[row, : length - start] = self.text[row, start:length]
            slots[row, at.START], slots[row, at.LENGTH] = 0, length - start

    def known_prefixes(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """(B,) how many of these tokens, from the first on, each slot has read first."""
        counts = np.arange(len(ids))
        places = np.maximum(self.slots[:, at.START], 0)[:, None] + counts  # (B, T)
        places = np.minimum(places, self.text.shape[1] - 1)
        same = np.take_along_axis(self.text, places, axis=1) == ids
        same &= counts < self.slots[:, at.CACHED, None]
        known: NDArray[np.int64] = np.logical_and.accumulate(same, axis=1).sum(axis=1)
        return known

    def share_cache(self, first: int, others: list[int], count: int) -> None:
        """Give rows that have read nothing the first `count` tokens of what another has read."""
        self.keys[others, :, :, :count] = self.keys[first, :, :, :count]
        self.values[others, :, :count] = self.values[first, :, :count]
        self.slots[others, at.CACHED] = count
        hidden = self.slots[others, at.LENGTH] - self.config.max_seq_len
        self.slots[others, at.START] = np.maximum(0, hidden)  # as `Window` begins

    def is_sound(self, row: int, count: int) -> bool:
        """Whether the first `count` tokens' keys and values are numbers."""
        keys, values = self.keys[row, :, :, :count], self.values[row, :, :count]
        return bool(np.isfinite(keys).all() and np.isfinite(values).all())

    def keep_logits(self, row: int) -> None:
        """Put a row's logits where later steps of others leave them alone."""
        self.probabilities[row, : self.config.vocab_size] = self.logits_of(row)
        self.slots[row, at.LOGITS_ROW] = -1

    def logits_of(self, row: int) -> NDArray[np.float32]:
        """(V,) the prediction behind a row's last token, a copy."""
        place = self.slots[row, at.LOGITS_ROW]
        held = self.probabilities[row] if place < 0 else self.logits[place]
        return held[: self.config.vocab_size].copy()
