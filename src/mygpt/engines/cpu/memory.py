"""What a decoding remembers between steps, and its room to work in, as the kernels want it.

Letters: B slots (one a request), C embedding, D head size, R rows, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mygpt.config import COLDEST
from mygpt.engines.contract import Request
from mygpt.engines.cpu import layout as at
from mygpt.engines.cpu.pack import Arena, PackedModel, padded
from mygpt.errors import InputError

_OVERFLOWS = {"crop": at.CROP, "refill": at.REFILL, "stop": at.STOP}
_MAX_ROWS = 240  # rows of one pass: whole tiles for two threads, and few enough to stay in cache


class Memory:
    """Everything that a job's addresses point to, besides the model.

    Attributes:
        job: the job (see `layout`).
        slots: (B, SLOT_SIZE) int64.
        settings: (B, SETTINGS_SIZE) float32.
        seen: (B, V) int8, 1 for tokens that occurred.
        text: (B, T) int64, prompts and what was drawn; grows.
        keys: (B, all pieces) float32; `values` likewise.
        probabilities: (B, V padded) float32; `logits` likewise, in an order of its own.
        noise: (B, V) float32, the caller's.
    """

    def __init__(self, model: PackedModel, requests: Sequence[Request], threads: int) -> None:
        self.config = config = model.config
        self._model = model  # the job's addresses point into it
        count, vocab = len(requests), config.vocab_size
        self.job = job = model.job.copy()
        self.slots = np.zeros((count, at.SLOT_SIZE), np.int64)
        self.settings = np.zeros((count, at.SETTINGS_SIZE), np.float32)
        self.seen = np.zeros((count, vocab), np.int8)
        longest = max((len(request.prompt) for request in requests), default=0)
        self.text = np.zeros((count, longest + 32), np.int64)
        for number, request in enumerate(requests):
            self._fill_slot(number, request)
        # Caches are as long as the longest text may need.
        window = config.max_seq_len
        needed = max((len(r.prompt) + min(r.max_new_tokens, window) for r in requests), default=1)
        capacity = padded(min(window, needed))
        pieces = config.num_layers * config.kv_heads * capacity
        self.keys = np.zeros((count, pieces * config.head_size), np.float32)
        self.values = np.zeros((count, pieces * padded(config.head_size)), np.float32)
        job[at.SLOTS], job[at.TIME_STRIDE] = count, capacity
        job[at.MAX_ROWS] = rows = max(1, min(_MAX_ROWS, count * capacity))
        self._make_room(rows, threads, capacity)
        for place, array in (
            (at.SLOT_TABLE, self.slots),
            (at.SETTINGS, self.settings),
            (at.SEEN, self.seen),
            (at.KEYS, self.keys),
            (at.VALUES, self.values),
        ):
            job[place] = array.ctypes.data
        self._place_text()
        self.job_address: int = job.ctypes.data

    def _fill_slot(self, number: int, request: Request) -> None:
        sampling, slot, length = request.sampling, self.slots[number], len(request.prompt)
        room = request.room(self.config.max_seq_len)
        slot[at.STATUS] = at.ACTIVE if room else at.ENDED
        slot[at.LENGTH], slot[at.START], slot[at.LIMIT] = length, -1, room
        slot[at.OVERFLOW] = _OVERFLOWS[request.overflow]
        slot[at.END] = -1 if request.end is None else request.end
        slot[at.TOP_K] = min(sampling.top_k or 0, self.config.vocab_size)
        slot[at.GREEDY] = sampling.greedy
        seed = request.stream.seed  # 64 bits without a sign, in the place of 64 with one
        slot[at.SEED] = seed - 2**64 if seed >= 2**63 else seed
        slot[at.INDEX] = request.stream.index
        min_p = sampling.min_p or 0.0
        penalty = sampling.repetition_penalty
        with np.errstate(over="ignore"):  # past float32 a temperature is infinite, as in torch
            self.settings[number] = (
                max(sampling.temperature, COLDEST),
                1.0 if sampling.top_p is None else sampling.top_p,
                np.log(min_p) if min_p > 0 else -np.inf,
                1.0 if penalty is None else penalty,
            )
        outside = (request.prompt < 0) | (request.prompt >= self.config.vocab_size)
        if outside.any():
            raise InputError(
                f"prompt holds id {request.prompt[outside][0]}: this model's ids run from 0 to "
                f"{self.config.vocab_size - 1}"
            )
        self.text[number, :length] = request.prompt
        self.seen[number, request.prompt] = 1

    def _make_room(self, rows: int, threads: int, capacity: int) -> None:
        """Buffers that hold nothing between runs, and the results."""
        job, count = self.job, len(self.slots)
        width, vocab = int(job[at.WIDTH_STRIDE]), int(job[at.VOCAB_STRIDE])
        sizes = {
            at.X: rows * width,
            at.X_LAST: rows * width,
            at.NORMED: threads * rows * width,
            at.QUERY: rows * int(job[at.QUERY_STRIDE]),
            at.PAIR: rows * int(job[at.PAIR_STRIDE]),
            at.MIXED: rows * int(job[at.MIXED_STRIDE]),
            at.GATE: rows * int(job[at.HIDDEN_STRIDE]),
            at.UP: rows * int(job[at.HIDDEN_STRIDE]),
            at.SCORES: threads * at.ROWS * capacity,
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
        """Have room for `steps` more tokens in every row."""
        needed = int(self.slots[:, at.LENGTH].max(initial=0)) + steps
        if needed > self.text.shape[1]:
            room = np.zeros((len(self.text), needed + needed // 2), np.int64)
            room[:, : self.text.shape[1]] = self.text
            self.text = room
            self._place_text()

    def share_cache(self, first: int, others: list[int]) -> None:
        """Give the other slots what the first has read of a prompt they have in common."""
        self.keys[others] = self.keys[first]
        self.values[others] = self.values[first]
        for place in (at.START, at.CACHED):
            self.slots[others, place] = self.slots[first, place]
