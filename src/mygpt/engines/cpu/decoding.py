"""Texts on their way through the compiled loop: their memory, their threads, their results.

Letters: B slots (one a request), C embedding, D head size, L window, R rows, V vocabulary.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from mygpt.config import COLDEST
from mygpt.engines.contract import Request, broken_model, overflowing_settings
from mygpt.engines.cpu import layout as at
from mygpt.engines.cpu.build import load_kernels
from mygpt.engines.cpu.pack import PackedModel, aligned, padded

_OVERFLOWS = {"crop": at.CROP, "refill": at.REFILL, "stop": at.STOP}
_MAX_ROWS = 240  # rows of one pass: whole tiles for two threads, and few enough to stay in cache
_PATIENCE_S = 0.05  # a run lasts about this long, then Python may look at signals
# Products of one step below which a second thread costs more than it brings: the threads meet
# five times a layer.
_MANY_PRODUCTS = 1_500_000


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class CpuDecoding:
    """See `mygpt.engines.contract.Decoding`; besides, `weigh` and `push` for draws of one's own."""

    def __init__(
        self, model: PackedModel, requests: Sequence[Request], threads: int | None
    ) -> None:
        self._model = model
        self._requests = list(requests)
        self._threads_wanted = threads
        self._step_s = 0.0
        count = len(self._requests)
        self._slots = np.zeros((count, at.SLOT_SIZE), np.int64)
        self._settings = np.zeros((count, at.SETTINGS_SIZE), np.float32)
        self._seen = np.zeros((count, model.config.vocab_size), np.int8)
        longest = max(len(r.prompt) for r in self._requests)
        self._text = np.zeros((count, longest + 1), np.int64)
        for number, request in enumerate(self._requests):
            self._fill_slot(number, request)
        self._job = model.job.copy()
        self._run = load_kernels().run
        self._make_room(count)
        self._shared = False

    def _fill_slot(self, number: int, request: Request) -> None:
        sampling, slot = request.sampling, self._slots[number]
        room = request.room(self._model.config.max_seq_len)
        seed = np.array([request.stream.seed], np.uint64).view(np.int64)[0]
        slot[:] = 0
        for place, value in {
            at.STATUS: at.ACTIVE if room else at.ENDED,
            at.LENGTH: len(request.prompt),
            at.START: -1,
            at.LIMIT: room,
            at.OVERFLOW: _OVERFLOWS[request.overflow],
            at.END: -1 if request.end is None else request.end,
            at.TOP_K: min(sampling.top_k or 0, self._model.config.vocab_size),
            at.GREEDY: sampling.greedy,
            at.SEED: seed,
            at.INDEX: request.stream.index,
        }.items():
            slot[place] = value
        min_p = sampling.min_p or 0.0
        self._settings[number] = (
            max(sampling.temperature, COLDEST),
            1.0 if sampling.top_p is None else sampling.top_p,
            np.log(min_p) if min_p > 0 else -np.inf,
            1.0 if sampling.repetition_penalty is None else sampling.repetition_penalty,
        )
        self._text[number, : len(request.prompt)] = request.prompt
        self._seen[number, request.prompt] = 1

    def _make_room(self, count: int) -> None:
        """Caches as long as the longest text may need, and room to work in."""
        job, config = self._job, self._model.config
        needed = max(
            len(r.prompt) + min(r.max_new_tokens, config.max_seq_len) for r in self._requests
        )
        capacity = padded(min(config.max_seq_len, needed))
        pieces = config.num_layers * config.kv_heads * capacity
        threads = self._threads_wanted or usable_cores()
        rows = max(1, min(_MAX_ROWS, count * capacity))
        self._keys = np.zeros((count, pieces * config.head_size), np.float32)
        self._values = np.zeros((count, pieces * padded(config.head_size)), np.float32)
        self._probabilities = aligned(count * job[at.VOCAB_STRIDE]).reshape(count, -1)
        self._logits = aligned(count * job[at.VOCAB_STRIDE]).reshape(count, -1)
        job[at.SLOTS], job[at.MAX_ROWS], job[at.TIME_STRIDE] = count, rows, capacity
        self._room = {
            at.X: aligned(rows * job[at.WIDTH_STRIDE]),
            at.X_LAST: aligned(rows * job[at.WIDTH_STRIDE]),
            at.NORMED: aligned(threads * rows * job[at.WIDTH_STRIDE]),
            at.QUERY: aligned(rows * job[at.QUERY_STRIDE]),
            at.PAIR: aligned(rows * job[at.PAIR_STRIDE]),
            at.MIXED: aligned(rows * job[at.MIXED_STRIDE]),
            at.GATE: aligned(rows * job[at.HIDDEN_STRIDE]),
            at.UP: aligned(rows * job[at.HIDDEN_STRIDE]),
            at.SCORES: aligned(threads * at.ROWS * capacity),
            at.SCRATCH: aligned(threads * job[at.VOCAB_STRIDE]),
            at.BARRIER: aligned(8, np.int64),
            at.KEYS: self._keys,
            at.VALUES: self._values,
            at.PROBABILITIES: self._probabilities,
            at.LOGITS: self._logits,
            at.SLOT_TABLE: self._slots,
            at.SETTINGS: self._settings,
            at.SEEN: self._seen,
        }
        for place in range(at.ROW_SLOT, at.OUTPUT_POSITION + 1):
            self._room[place] = np.zeros(rows, np.int64)
        for place, array in self._room.items():
            job[place] = array.ctypes.data
        self._place_text()

    def _place_text(self) -> None:
        self._job[at.TEXT], self._job[at.TEXT_STRIDE] = self._text.ctypes.data, self._text.shape[1]

    def _reserve_text(self, steps: int) -> None:
        """Have room for `steps` more tokens in every row."""
        needed = int(self._slots[:, at.LENGTH].max()) + steps
        if needed > self._text.shape[1]:
            room = np.zeros((len(self._text), needed + needed // 2), np.int64)
            room[:, : self._text.shape[1]] = self._text
            self._text = room
            self._place_text()

    def advance(self, most: int) -> list[list[int]]:
        """Draw up to `most` tokens for each row; see `Decoding`."""
        before = self._slots[:, at.LENGTH].copy()
        self._share_prompts()
        while most > 0 and (self._slots[:, at.STATUS] == at.ACTIVE).any():
            steps = 1
            if self._step_s:
                steps = max(1, min(most, int(_PATIENCE_S / self._step_s)))
            self._reserve_text(steps)
            began = time.perf_counter()
            self._do(at.DRAW, steps)
            self._step_s = (time.perf_counter() - began) / steps
            most -= steps
        return [
            self._text[row, start : self._slots[row, at.LENGTH]].tolist()
            for row, start in enumerate(before)
        ]

    def weigh(self) -> NDArray[np.float32]:
        """Each row's next-token probabilities, (B, V), a view that the next call overwrites."""
        self._share_prompts()
        self._do(at.WEIGH, 1)
        return self._probabilities[:, : self._model.config.vocab_size]

    def push(self, ids: NDArray[np.int64]) -> None:
        """Append one token, drawn by the caller, to every row."""
        self._reserve_text(1)
        rows = np.arange(len(ids))
        self._text[rows, self._slots[:, at.LENGTH]] = ids
        self._seen[rows, ids] = 1
        self._slots[:, at.LENGTH] += 1

    def end(self, row: int) -> None:
        """Draw nothing more for this row."""
        self._slots[row, at.STATUS] = at.ENDED

    def logits(self, row: int) -> NDArray[np.float32]:
        """(V,) the prediction behind the row's last token; see `Decoding`."""
        return self._logits[self._slots[row, at.LOGITS_ROW], : self._model.config.vocab_size]

    def _share_prompts(self) -> None:
        """Once: read a prompt that several rows have for the first of them, and copy its cache."""
        if self._shared:
            return
        self._shared = True
        groups: dict[tuple[bytes, str], list[int]] = {}
        for row, request in enumerate(self._requests):
            if self._slots[row, at.STATUS] == at.ACTIVE and len(request.prompt) > 1:
                key = (np.asarray(request.prompt).tobytes(), request.overflow)
                groups.setdefault(key, []).append(row)
        shared = [rows for rows in groups.values() if len(rows) > 1]
        if not shared:
            return
        status = self._slots[:, at.STATUS].copy()
        self._slots[:, at.STATUS] = at.ENDED
        self._slots[[rows[0] for rows in shared], at.STATUS] = at.ACTIVE
        self._do(at.READ, 1)
        self._slots[:, at.STATUS] = status
        for first, *others in shared:
            self._keys[others] = self._keys[first]
            self._values[others] = self._values[first]
            for place in (at.START, at.CACHED):
                self._slots[others, place] = self._slots[first, place]

    def _do(self, mode: int, steps: int) -> None:
        """Run the compiled loop, on as many threads as the work is worth."""
        job = self._job
        self._slots[:, at.TURN] = 0
        job[at.MODE], job[at.STEPS], job[at.NUM_ROWS], job[at.OUTPUTS] = mode, steps, 0, 0
        job[at.THREADS] = threads = self._worthwhile_threads()
        self._room[at.BARRIER][0] = 0
        address = job.ctypes.data
        helpers = [_helper(n) for n in range(1, threads)]
        for number, helper in enumerate(helpers, 1):
            helper.begin(self._run, address, number)
        self._run(address, 0)
        for helper in helpers:
            helper.wait()
        self._raise_failures()

    def _worthwhile_threads(self) -> int:
        if self._threads_wanted:
            return self._threads_wanted
        slots, config = self._slots, self._model.config
        active = slots[slots[:, at.STATUS] == at.ACTIVE]
        unread = active[:, at.LENGTH] - np.maximum(active[:, at.START], 0) - active[:, at.CACHED]
        crops = (active[:, at.OVERFLOW] == at.CROP) & (active[:, at.LENGTH] > config.max_seq_len)
        rows = int(np.where(crops, config.max_seq_len, unread).sum())
        many = rows * config.num_parameters() >= _MANY_PRODUCTS
        return usable_cores() if many else 1

    def _raise_failures(self) -> None:
        failed = np.flatnonzero(self._slots[:, at.STATUS] >= at.BROKEN_MODEL)
        if failed.size:
            row = int(failed[0])
            status = self._slots[row, at.STATUS]
            self._slots[failed, at.STATUS] = at.ENDED
            if status == at.BROKEN_MODEL:
                raise broken_model()
            raise overflowing_settings(self._requests[row].sampling)


class _Helper:
    """A thread that waits for its part of a run; kept for the life of the process."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[tuple[Callable[[int, int], int], int, int]] = SimpleQueue()
        self._done: SimpleQueue[None] = SimpleQueue()
        threading.Thread(target=self._work, name="mygpt-cpu", daemon=True).start()

    def _work(self) -> None:
        while True:
            run, address, number = self._tasks.get()
            run(address, number)
            self._done.put(None)

    def begin(self, run: Callable[[int, int], int], address: int, number: int) -> None:
        """Start this thread's part."""
        self._tasks.put((run, address, number))

    def wait(self) -> None:
        """Return once the part is done."""
        self._done.get()


_helpers: dict[tuple[int, int, int], _Helper] = {}


def _helper(number: int) -> _Helper:
    """The calling thread's helper of that number: two callers never share one."""
    key = (os.getpid(), threading.get_ident(), number)
    if key not in _helpers:
        _helpers[key] = _Helper()
    return _helpers[key]
