"""The arrays that the decoding kernels work on: texts, caches, settings, and buffers of one pass.

Letters: B slots (one a request), C embedding, D head size, G key/value heads, N layers, R rows,
T time, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mygpt.core.config import GREEDY_BELOW
from mygpt.cpu.common.layout import Arena, padded
from mygpt.cpu.decode import layout as at
from mygpt.cpu.decode.pack import PackedModel
from mygpt.engine import Request, check_prompt_ids

_OVERFLOWS = {"crop": at.CROP, "refill": at.REFILL, "stop": at.STOP}
# Rows of one pass at most. 240 = 2 threads x 20 tiles of 6 rows (40 of 3): all tiles are full, and
# the buffers stay in a core's cache for small models: all buffers of one row of the tutorial's
# model (C = 64, M = 256) take 4 KB, those of 240 rows 1 MB.
_MAX_ROWS = 240
# Slots that can have drafts in one step: with more rows a pass is bound by its arithmetic.
_DRAFTED_SLOTS = 8
# How many tokens must be equal to copy what follows an earlier passage, and with how many an n-gram
# model and the passage count as much as each other; of small vocabularies (characters), and of
# others, whose tokens are about four characters.
_SMALL_VOCABULARY, _MATCHES = 512, ((6, 12), (3, 3))


class Memory:
    """Everything that a job's addresses point to, except for the model; slots are free at first.

    Args:
        model: the model.
        count: B, how many slots there are.
        capacity: tokens that fit into a slot's cache, a whole number of vectors.
        text_width: tokens that fit into a slot's text.
        threads: the largest number of threads that a run will have.

    Attributes:
        job: the job (see `layout`).
        slots: (B, SLOT_SIZE) int64.
        settings: (B, SETTINGS_SIZE) float32.
        seen: (B, V) int8, which tokens occurred, and which end the row (see `layout`).
        text: (B, T) int64, prompts and drawn tokens.
        keys: (B, N G, D, T) float32.
        values: (B, N G, T, D padded) float32.
        probabilities: (B, V padded) float32.
        logits: (B + spare, V padded) float32, in the order of the last step's outputs (see
            LOGITS_ROW), of which those of drafts need the spare rows.
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
        self._recent = np.zeros((count, at.RECENT_SIZE), np.int64)
        pieces, size = config.num_layers * config.kv_heads, config.head_size
        self.keys = np.zeros((count, pieces, size, capacity), np.float32)
        self.values = np.zeros((count, pieces, capacity, padded(size)), np.float32)
        job[at.SLOTS], self._threads = count, threads
        job[at.MAX_ROWS] = rows = max(1, min(_MAX_ROWS, count * capacity))
        job[at.SPARE_OUTPUTS] = min(count, _DRAFTED_SLOTS) * at.MOST_DRAFTS_A_PASS
        job[at.MATCH], job[at.HALF_MATCH] = _MATCHES[config.vocab_size > _SMALL_VOCABULARY]
        self._allocate_buffers(rows, threads)
        for place, array in (
            (at.SLOT_TABLE, self.slots),
            (at.SETTINGS, self.settings),
            (at.SEEN, self.seen),
            (at.RECENT, self._recent),
        ):
            job[place] = array.ctypes.data
        self._place_cache()
        self._place_text()
        self.job_address: int = job.ctypes.data

    def _place_cache(self) -> None:
        """Put the caches' addresses into the job, with all that grows with their capacity."""
        job, capacity = self.job, self.keys.shape[-1]
        job[at.TIME_STRIDE] = capacity
        job[at.KEYS], job[at.VALUES] = self.keys.ctypes.data, self.values.ctypes.data
        count = self._threads * at.ROWS * capacity
        self._scores = Arena(4 * count + 64).take(count)
        job[at.SCORES] = self._scores.ctypes.data
        self._model.place_rotary(job, min(capacity, self.config.max_seq_len))

    def grow(self, capacity: int, text_width: int) -> None:
        """Make caches and texts of every slot longer; their contents are kept."""
        keys, values = self.keys, self.values
        self.keys = np.zeros((*keys.shape[:-1], capacity), np.float32)
        self.values = np.zeros((*values.shape[:2], capacity, values.shape[-1]), np.float32)
        for slot, cached in enumerate(self.slots[:, at.CACHED].tolist()):
            self.keys[slot, :, :, :cached] = keys[slot, :, :, :cached]
            self.values[slot, :, :cached] = values[slot, :, :cached]
        self._place_cache()
        self._widen_text(text_width)

    def put(self, number: int, request: Request, shown: NDArray[np.int64] | None = None) -> None:
        """Put a request into a slot and overwrite what was there.

        Args:
            number: the slot.
            request: what to continue.
            shown: the last tokens of the prompt, a window or more, where the earlier ones will
                never be read.

        Raises:
            InputError: for a prompt that is empty or has an unknown id; nothing was changed.
        """
        check_prompt_ids(request.prompt, self.config.vocab_size)
        text = request.prompt if shown is None else shown
        sampling, slot = request.sampling, self.slots[number]
        limit = request.most_tokens(self.config.max_seq_len)
        slot[:] = 0
        slot[at.STATUS] = at.ACTIVE if limit else at.ENDED
        slot[at.LENGTH], slot[at.START], slot[at.LIMIT] = len(text), -1, limit
        slot[at.OVERFLOW] = _OVERFLOWS[request.overflow]
        slot[at.TOP_K] = min(sampling.top_k or 0, self.config.vocab_size)
        slot[at.GREEDY] = sampling.greedy
        seed = request.stream.seed  # uint64; the field is int64 with the same bits
        slot[at.SEED] = seed - 2**64 if seed >= 2**63 else seed
        slot[at.INDEX] = request.stream.index
        slot[at.LOGITS_ROW] = -1  # the slot's own, in `probabilities`
        slot[at.TRUSTED] = 1
        self._recent[number] = 0
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

    # One array holds all buffers, each a whole number of cache lines (16 float32), so that no two
    # threads write to one line at a border:
    #
    #     | X (R, C) | X_LAST | NORMED, one for each thread | QUERY | ... | LOGITS (B, V) | ... |
    #       ... | ROW_SLOT (R int64, twice as many floats) | ... | OUTPUT_POSITION |
    def _allocate_buffers(self, rows: int, threads: int) -> None:
        """Allocate the buffers of one pass, and the results."""
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
            at.INPUTS: threads * rows * int(job[at.INPUT_WORDS]),
            at.BARRIER: 16,  # alone on a cache line: all threads read it while they wait
            at.PROBABILITIES: count * vocab,
            at.LOGITS: (count + int(job[at.SPARE_OUTPUTS])) * vocab,
            at.GUESS: vocab,
        } | dict.fromkeys(range(at.ROW_SLOT, at.OUTPUT_POSITION + 1), 2 * rows)
        # Sizes are in float32; every buffer is rounded up to whole cache lines.
        starts = np.cumsum([0, *(-(-size // 16) * 16 for size in sizes.values())])
        self._buffers = Arena(int(starts[-1]) * 4 + 64).take(int(starts[-1]))
        address = self._buffers.ctypes.data
        for place, start in zip(sizes, starts.tolist(), strict=False):
            job[place] = address + 4 * start
        places = dict(zip(sizes, starts.tolist(), strict=False))

        def view(place: int, columns: int) -> NDArray[np.float32]:
            size = sizes[place]
            return self._buffers[places[place] :][:size].reshape(-1, columns)

        self.probabilities, self.logits = view(at.PROBABILITIES, vocab), view(at.LOGITS, vocab)
        self._barrier = self._buffers[places[at.BARRIER] :][:16]

    def reset_barrier(self) -> None:
        """Set the barrier's counter to 0: needed where the number of threads has changed."""
        self._barrier.fill(0)

    def _place_text(self) -> None:
        self.job[at.TEXT], self.job[at.TEXT_STRIDE] = self.text.ctypes.data, self.text.shape[1]

    def _widen_text(self, width: int) -> None:
        longer = np.zeros((len(self.text), width), np.int64)
        longer[:, : self.text.shape[1]] = self.text
        self.text = longer
        self._place_text()

    def reserve_text(self, steps: int) -> None:
        """Make the texts longer where `steps` more tokens would not fit."""
        needed = int(self.slots[:, at.LENGTH].max(initial=0)) + steps
        if needed > self.text.shape[1]:
            # Half as much again, so that a long text is copied a number of times that grows only
            # with the logarithm of its length.
            self._widen_text(needed + needed // 2)

    def slide_texts(self, steps: int) -> None:
        """Drop tokens before the window of active rows where `steps` more would not fit.

        The width must be at least a window and `steps` + 1.
        """
        #     | forgotten | window ... | free |   ->   | window ... |        free        |
        #                START       LENGTH           START = 0   LENGTH
        slots = self.slots
        full = slots[:, at.LENGTH] + steps > self.text.shape[1]
        if not full.any():
            return
        for row in np.flatnonzero(full & (slots[:, at.STATUS] == at.ACTIVE)).tolist():
            start, length = slots[row, at.START], slots[row, at.LENGTH]
            self.text[row, : length - start] = self.text[row, start:length]
            slots[row, at.START], slots[row, at.LENGTH] = 0, length - start
            self._recent[row], slots[row, at.INDEXED] = 0, 0

    def cached_prefixes(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """(B,) how many of these tokens, from the first on, each slot's cache begins with."""
        counts = np.arange(len(ids))
        places = np.maximum(self.slots[:, at.START], 0)[:, None] + counts  # (B, T)
        places = np.minimum(places, self.text.shape[1] - 1)
        same = np.take_along_axis(self.text, places, axis=1) == ids
        same &= counts < self.slots[:, at.CACHED, None]
        lengths: NDArray[np.int64] = np.logical_and.accumulate(same, axis=1).sum(axis=1)
        return lengths

    def share_cache(self, first: int, others: list[int], count: int) -> None:
        """Copy keys and values of row `first`'s first `count` tokens to rows with empty caches."""
        self.keys[others, :, :, :count] = self.keys[first, :, :, :count]
        self.values[others, :, :count] = self.values[first, :, :count]
        self.slots[others, at.CACHED] = count
        hidden = self.slots[others, at.LENGTH] - self.config.max_seq_len
        self.slots[others, at.START] = np.maximum(0, hidden)  # as `Window` begins

    def is_finite(self, row: int, count: int) -> bool:
        """Whether keys and values of the first `count` tokens are finite."""
        keys, values = self.keys[row, :, :, :count], self.values[row, :, :count]
        return bool(np.isfinite(keys).all() and np.isfinite(values).all())

    def keep_logits(self, row: int) -> None:
        """Copy a row's logits to its own row of `probabilities`: later steps overwrite `logits`."""
        self.probabilities[row, : self.config.vocab_size] = self.logits_of(row)
        self.slots[row, at.LOGITS_ROW] = -1

    def logits_of(self, row: int) -> NDArray[np.float32]:
        """(V,) the prediction behind a row's last token, a copy."""
        place = self.slots[row, at.LOGITS_ROW]
        logits = self.probabilities[row] if place < 0 else self.logits[place]
        return logits[: self.config.vocab_size].copy()
