"""Texts on their way through the compiled loop.

Letters: B slots (one a request), V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mygpt.core.config import SamplingConfig, broken_model, overflowing_settings
from mygpt.engines.contract import Request
from mygpt.engines.cpu import layout as at
from mygpt.engines.cpu.build import load_kernels
from mygpt.engines.cpu.memory import Memory
from mygpt.engines.cpu.pack import PackedModel, padded
from mygpt.engines.cpu.workers import run_on_threads, usable_cores
from mygpt.errors import InputError

_PATIENCE_S = 0.05  # a run lasts about this long, then Python may look at signals
# Products of one step that are worth one thread more: the threads meet five times a layer.
_MANY_PRODUCTS = 1_500_000
# Where other processes want the cores too, each of those meetings may wait until a thread has its
# core back, some milliseconds: eight steps of a small model took 0.4 s. One thread waits for none.
_SHORTEST_S, _LEAST_SHARE = 0.005, 0.5  # of a run whose threads had too little processor time
_ALONE_S = (0.25, 2.0)  # how long one thread is used then: at first, and at the most
_STEPS_BETWEEN_LOOKS = 32  # at how much work a step is: it grows where the window is full


class Loop:
    """Runs of the compiled loop over one memory, by as many threads as the work is worth.

    Args:
        memory: what it works on.
        threads: how many; None lets the next step's work decide, each time.
    """

    def __init__(self, memory: Memory, threads: int | None) -> None:
        self._memory, self._slots, self._job = memory, memory.slots, memory.job
        self._wanted = threads
        self._products = memory.config.num_parameters()  # of a row
        self._run = load_kernels().run
        self._threads = 0
        self._step_s = 0.0
        self._alone_s = self._alone_until = 0.0

    @property
    def active(self) -> int:
        """How many rows go on."""
        return int(np.count_nonzero(self._slots[:, at.STATUS] == at.ACTIVE))

    def steps_at_once(self, most: int, together: int | None = None) -> int:
        """How many steps to draw before Python looks at signals again; and by how many threads.

        Args:
            most: at the most.
            together: at the most by several threads, where others wait for the end of the run.
        """
        self.choose_threads()
        if not self._step_s:
            return 1
        if self._threads > 1:
            most = min(most, 1 if self._alone_s else together or most)
        return max(1, min(most, int(_PATIENCE_S / self._step_s)))

    def draw(self, steps: int) -> None:
        """Draw up to so many tokens, as `steps_at_once` says, for each active row."""
        began = time.perf_counter()
        self.do(at.DRAW, steps)
        self._step_s = (time.perf_counter() - began) / steps

    def read(self, rows: list[int]) -> None:
        """Read all but the last token of some rows' texts."""
        status = self._slots[:, at.STATUS].copy()
        self._slots[:, at.STATUS] = at.ENDED
        self._slots[rows, at.STATUS] = at.ACTIVE
        self.choose_threads()
        self.do(at.PREFILL, 1)
        self._slots[:, at.STATUS] = status

    def choose_threads(self) -> None:
        """As many as the next step's work is worth."""
        threads = self._wanted or 0
        if not threads:
            rows, window = 0, self._memory.config.max_seq_len
            for slot in self._slots.tolist():
                if slot[at.STATUS] == at.ACTIVE:
                    crops = slot[at.OVERFLOW] == at.CROP and slot[at.LENGTH] > window
                    unread = slot[at.LENGTH] - max(slot[at.START], 0) - slot[at.CACHED]
                    rows += window if crops else unread
            threads = min(usable_cores(), 1 + rows * self._products // _MANY_PRODUCTS)
            if threads > 1 and time.perf_counter() < self._alone_until:
                threads = 1
        if threads != self._threads:
            self._threads = self._job[at.THREADS] = threads
            self._memory.reset_barrier()

    def do(self, mode: int, steps: int) -> None:
        """One run."""
        self._job[at.MODE], self._job[at.STEPS] = mode, steps
        address = self._memory.job_address
        if self._threads > 1 and steps:
            began, used = time.perf_counter(), time.thread_time()
            run_on_threads(self._run, address, self._threads)
            self._judge(time.perf_counter() - began, time.thread_time() - used)
        else:
            self._run(address, 0)

    def _judge(self, took_s: float, used_s: float) -> None:
        """Use one thread for a while where several had too little processor time."""
        if took_s < _SHORTEST_S:
            return
        if used_s < _LEAST_SHARE * took_s:
            self._alone_s = min(_ALONE_S[1], 2 * self._alone_s or _ALONE_S[0])
            self._alone_until = time.perf_counter() + self._alone_s
        else:
            self._alone_s = 0.0

    def take_failures(self, settings_of: Callable[[int], SamplingConfig]) -> dict[int, InputError]:
        """The rows that failed in the last run, each with its error; they have ended."""
        if not self._job[at.FAILED]:
            return {}
        self._job[at.FAILED] = 0
        failures = {}
        for row in np.flatnonzero(self._slots[:, at.STATUS] >= at.BROKEN_MODEL).tolist():
            broken = self._slots[row, at.STATUS] == at.BROKEN_MODEL
            failures[row] = broken_model() if broken else overflowing_settings(settings_of(row))
            self._slots[row, at.STATUS] = at.ENDED
            self._memory.keep_logits(row)
        return failures


class CpuDecoding:
    """See `mygpt.engines.contract.Decoding`.

    Besides, for draws that are the caller's: `weigh` leaves the probabilities; then `push`
    appends the caller's ids. Or `race` draws with what the caller puts into `noise`.
    """

    def __init__(
        self, model: PackedModel, requests: Sequence[Request], threads: int | None
    ) -> None:
        self._requests = list(requests)
        self._config = model.config
        window = model.config.max_seq_len
        # Caches are as long as the longest text may need.
        needed = max((len(r.prompt) + min(r.max_new_tokens, window) for r in requests), default=1)
        self._memory = Memory(
            model,
            len(requests),
            capacity=padded(min(window, needed)),
            text_width=max((len(r.prompt) for r in requests), default=0) + 32,
            threads=threads or usable_cores(),
        )
        for number, request in enumerate(requests):
            self._memory.put(number, request)
        self._slots = self._memory.slots
        self._loop = Loop(self._memory, threads)
        self._shared = False
        self.noise = self._memory.noise

    def advance(self, most: int) -> list[list[int]]:
        """Draw up to `most` tokens for each row; see `Decoding`."""
        before = self._slots[:, at.LENGTH].copy()
        self._share_prompts()
        while most > 0 and self._loop.active:
            steps = self._loop.steps_at_once(most)
            self._memory.reserve_text(steps)
            self._loop.draw(steps)
            self._raise_failure()
            most -= steps
        ends = self._slots[:, at.LENGTH]
        return [
            self._memory.text[row, start : ends[row]].tolist() for row, start in enumerate(before)
        ]

    def weigh(self) -> NDArray[np.float32]:
        """Each row's next-token probabilities, (B, V), a view that the next call overwrites."""
        self._prepare(1)
        self._do(at.PREDICT, 1)
        return self._memory.probabilities[:, : self._config.vocab_size]

    def race(self, steps: int, fill_noise: Callable[[], object]) -> Iterator[None]:
        """Append `steps` tokens to each row, each the one of largest probability / noise.

        `fill_noise` puts new numbers into `noise` before each step; with numbers from Exp(1)
        this draws from the probabilities. Yields after each step.
        """
        self._prepare(_STEPS_BETWEEN_LOOKS + 1)
        self._do(at.PREDICT, 1)
        for step in range(steps):
            if step and step % _STEPS_BETWEEN_LOOKS == 0:
                self._prepare(_STEPS_BETWEEN_LOOKS + 1)
            fill_noise()
            self._do(at.RACE, int(step < steps - 1))  # then weigh the next, if there is one
            yield

    def _prepare(self, steps: int) -> None:
        """Room and threads for some steps whose draws are the caller's."""
        self._share_prompts()
        self._memory.reserve_text(steps)
        self._loop.choose_threads()

    def push(self, ids: NDArray[np.int64]) -> None:
        """Append one token, drawn by the caller, to every row.

        Raises:
            InputError: when a row has had all the tokens that were asked for.
        """
        if (self._slots[:, at.DRAWN] >= self._slots[:, at.LIMIT]).any():
            raise InputError(
                f"max_new_tokens={int(self._slots[:, at.LIMIT].min())} tokens were pushed: "
                "ask for more from the start"
            )
        self._memory.reserve_text(1)
        rows = np.arange(len(ids))
        self._memory.text[rows, self._slots[:, at.LENGTH]] = ids
        self._memory.seen[rows, ids] |= at.OCCURRED
        self._slots[:, at.LENGTH] += 1
        self._slots[:, at.DRAWN] += 1

    def next_logits(self) -> NDArray[np.float32]:
        """(B, V) the model's own prediction of each row's next token, before filters."""
        self.weigh()
        return np.stack([self._memory.logits_of(row) for row in range(len(self._slots))])

    def last_ids(self, count: int) -> NDArray[np.int64]:
        """(B, count) the last tokens of rows that are equally long, a copy."""
        length = self._slots[0, at.LENGTH]
        return self._memory.text[:, length - count : length].copy()

    def end(self, row: int) -> None:
        """Draw nothing more for this row."""
        if self._slots[row, at.STATUS] == at.ACTIVE:
            self._memory.keep_logits(row)
            self._slots[row, at.STATUS] = at.ENDED

    def logits(self, row: int) -> NDArray[np.float32]:
        """(V,) the prediction behind the row's last token; see `Decoding`."""
        return self._memory.logits_of(row)

    def _share_prompts(self) -> None:
        """Once: read a prompt that several rows have for the first of them alone."""
        if self._shared:
            return
        self._shared = True
        if len(self._requests) == 1:
            return
        groups: dict[tuple[bytes, str], list[int]] = {}
        for row, request in enumerate(self._requests):
            if self._slots[row, at.STATUS] == at.ACTIVE and len(request.prompt) > 1:
                key = (np.asarray(request.prompt).tobytes(), request.overflow)
                groups.setdefault(key, []).append(row)
        shared = [rows for rows in groups.values() if len(rows) > 1]
        if not shared:
            return
        self._loop.read([rows[0] for rows in shared])
        for first, *others in shared:
            self._memory.share_cache(first, others, int(self._slots[first, at.CACHED]))

    def _do(self, mode: int, steps: int) -> None:
        self._loop.do(mode, steps)
        self._raise_failure()

    def _raise_failure(self) -> None:
        for error in self._loop.take_failures(lambda row: self._requests[row].sampling).values():
            raise error
