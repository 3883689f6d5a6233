"""Runs of the decoding kernels: how many steps and threads, and texts that are decoded at once.

Letters: B slots (one a request), V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mygpt.core.config import SamplingConfig
from mygpt.cpu.common.build import load_library
from mygpt.cpu.common.layout import padded
from mygpt.cpu.common.workers import run_on_threads, usable_cores
from mygpt.cpu.decode import layout as at
from mygpt.cpu.decode.memory import Memory
from mygpt.cpu.decode.pack import PackedModel
from mygpt.cpu.decode.speculation import Counts, Drafts, Speculation, counts_of
from mygpt.engine import Request
from mygpt.errors import InputError, broken_model, overflowing_settings

# A run lasts about this long; between runs Python can react to signals. 50 ms are not felt by
# somebody who presses a key, and make the start of a run (some 30 us) negligible.
_RUN_S = 0.05
# Multiply-adds of one step for which one more thread is used. Threads wait for each other five
# times a layer, so less work is done sooner by one: a second thread gains nothing at the tutorial's
# 207,296 parameters and one row, where 25 barriers a token cost what it brings; at 462,304 it is
# 1.7 times as fast (docs/lab-notes.md).
_PRODUCTS_A_THREAD = 400_000
# Where other processes need the cores too, each barrier may wait until a thread has its core back,
# some milliseconds: eight steps of a small model took 0.4 s. One thread does not wait. A run of
# several threads is too slow when it lasted at least _SHORTEST_S and this thread had less than
# _LEAST_FRACTION of that time on a core.
_SHORTEST_S, _LEAST_FRACTION = 0.005, 0.5
# For how long one thread is used then: at first, and at most; the time doubles as long as the next
# try is too slow as well. Short times waste tries, long ones the speed of free cores; no
# measurement is recorded.
_ONE_THREAD_S = (0.25, 2.0)
_LONG_RUN = 2**40  # passes: as many as the time allows
# Passes and seconds of a run from which on its time is that of its passes; starting it takes some
# 30 us.
_LEAST_TIMED, _LEAST_TIMED_S = 4, 0.001


class Loop:
    """Runs of the decoding kernels on one memory, with a number of threads that suits the work.

    Args:
        memory: the texts and buffers.
        threads: how many to use; None chooses by the next step's work, at each run.
        speculation: chooses how many drafts a pass has; None for none.
    """

    def __init__(
        self, memory: Memory, threads: int | None, speculation: Speculation | None = None
    ) -> None:
        self.speculation = speculation
        self._memory, self._slots, self._job = memory, memory.slots, memory.job
        self._wanted = threads
        self._products = memory.config.num_parameters()  # of a row
        self._kernel = load_library()["run"]
        self._threads = 0
        self._step_s = self._took_s = 0.0
        self._one_thread_s = self._one_thread_until = 0.0

    @property
    def active(self) -> int:
        """The number of rows that have not ended."""
        return int(np.count_nonzero(self._slots[:, at.STATUS] == at.ACTIVE))

    def draw(
        self,
        goals: NDArray[np.int64],
        make_space: Callable[[int], object],
        *,
        spare: int = 0,
        most_tokens: int = _LONG_RUN,
        most_of_several: int = _LONG_RUN,
    ) -> bool:
        """One run, which draws tokens for the active rows until they have as many as their goals.

        It ends earlier when it has lasted long enough.

        Args:
            goals: (B,) tokens that each row is to have drawn in all.
            make_space: called before the run with the number of tokens that rows may get in it.
            spare: how many tokens may be missing to the goals.
            most_tokens: how many tokens of a row a run may draw.
            most_of_several: how many passes a run by several threads may have.

        Returns:
            Whether any row had tokens to draw.
        """
        slots = self._slots
        # How many tokens each row may get, and how many it has to.
        drawn = slots[:, at.DRAWN].copy()
        possible = slots[:, at.LIMIT] - drawn
        possible[slots[:, at.STATUS] != at.ACTIVE] = 0
        missing = np.minimum(goals - drawn, possible)
        needed = np.minimum(missing, goals - spare - drawn)
        rows, most = int(np.count_nonzero(needed > 0)), int(missing.max(initial=0))
        if not rows:
            return False
        passes = min(int(needed.max()), self._choose_drafts(rows, most))
        self.choose_threads(self._job[at.MOST_DRAFTS])
        if self._threads > 1:
            passes = min(passes, 1 if self._one_thread_s else most_of_several)
        tokens = min(most, most_tokens, passes * (1 + int(self._job[at.MOST_DRAFTS])))
        make_space(tokens)
        slots[:, at.GOAL] = drawn + np.minimum(missing, tokens)
        slots[:, at.ENOUGH] = drawn + np.minimum(needed, tokens)
        if self.speculation is None or not self._is_plain(tokens):
            self.run(at.DRAW, min(passes, tokens))
        else:
            self._run_and_record(self.speculation, rows, min(passes, tokens))
        return True

    def _run_and_record(self, speculation: Speculation, rows: int, steps: int) -> None:
        """Draw in so many steps, and note what the passes took and how their drafts did."""
        is_first, crowded = not self._step_s, self._crowded
        before, starts = counts_of(self._slots), self._slots[:, at.START].copy()
        self.run(at.DRAW, steps)
        after = counts_of(self._slots)
        made = Counts(after.passes - before.passes, after.right - before.right)
        # A first run is cold; in a window that moved tokens were read again; and a run that shows
        # that its threads have too little processor time says nothing about the work.
        is_measured = (
            not is_first
            and (made.passes.sum() >= _LEAST_TIMED * rows or self._took_s >= _LEAST_TIMED_S)
            and (starts == self._slots[:, at.START]).all()
            and crowded == self._crowded
        )
        speculation.record(crowded, rows, made, self._took_s if is_measured else math.nan)

    def _choose_drafts(self, rows: int, most: int) -> int:
        """Choose the largest number of drafts of a pass; returns how many passes a run may have."""
        self._job[at.MOST_DRAFTS] = 0
        if not self._step_s:
            return 1
        most_passes = _LONG_RUN
        if self.speculation is not None and most > 1 and self._is_plain(1):
            most_passes = self.speculation.choose(self._crowded, rows)
            self._job[at.MOST_DRAFTS] = self.speculation.drafts
        return max(1, min(most, most_passes, self.steps_in_time))

    @property
    def steps_in_time(self) -> int:
        """How many steps like the last run's a run may have; 1 before the first."""
        return max(1, int(_RUN_S / self._step_s)) if self._step_s else 1

    @property
    def _crowded(self) -> bool:
        """Whether only one thread is used, because several had too little processor time."""
        return time.perf_counter() < self._one_thread_until

    def _is_plain(self, tokens: int) -> bool:
        """Whether the next tokens' steps read one token each: no prompt, no cropped window."""
        slots = self._slots[self._slots[:, at.STATUS] == at.ACTIVE]
        read = slots[:, at.START] + slots[:, at.CACHED] >= slots[:, at.LENGTH] - 1
        longest = np.where(slots[:, at.OVERFLOW] == at.CROP, slots[:, at.LENGTH] + tokens, 0)
        return bool(read.all() and (longest <= self._memory.config.max_seq_len).all())

    def read(self, rows: list[int]) -> None:
        """Read all but the last token of some rows' texts into the caches (prefill)."""
        status = self._slots[:, at.STATUS].copy()
        self._slots[:, at.STATUS] = at.ENDED
        self._slots[rows, at.STATUS] = at.ACTIVE
        self.choose_threads()
        self.run(at.PREFILL, 1)
        self._slots[:, at.STATUS] = status

    def choose_threads(self, drafts: int = 0) -> None:
        """Choose the number of threads by the work of the next step, with so many drafts."""
        threads = self._wanted or 0
        if not threads:
            rows, window = 0, self._memory.config.max_seq_len
            for slot in self._slots.tolist():
                if slot[at.STATUS] == at.ACTIVE:
                    crops = slot[at.OVERFLOW] == at.CROP and slot[at.LENGTH] > window
                    unread = slot[at.LENGTH] - max(slot[at.START], 0) - slot[at.CACHED]
                    rows += window if crops else unread + drafts
            threads = min(usable_cores(), 1 + rows * self._products // _PRODUCTS_A_THREAD)
            if threads > 1 and self._crowded:
                threads = 1
        if threads != self._threads:
            self._threads = self._job[at.THREADS] = threads
            self._memory.reset_barrier()

    def run(self, mode: int, steps: int) -> None:
        """One run of the kernels by the chosen number of threads."""
        self._job[at.MODE], self._job[at.STEPS] = mode, steps
        address, start = self._memory.job_address, time.perf_counter()
        if self._threads > 1 and steps:
            # The time is measured inside of the processor time, so that a pause between the two
            # readings does not look like a lack of it.
            used, began = time.thread_time(), time.perf_counter()
            run_on_threads(self._kernel, address, self._threads)
            self._check_processor_time(time.perf_counter() - began, time.thread_time() - used)
        else:
            self._kernel(address, 0)
        self._took_s = time.perf_counter() - start
        if mode in (at.DRAW, at.RACE):
            self._step_s = self._took_s / steps

    def _check_processor_time(self, took_s: float, used_s: float) -> None:
        """Use one thread for some time where several had too little processor time."""
        if took_s < _SHORTEST_S:
            return
        if used_s < _LEAST_FRACTION * took_s:
            first_s, most_s = _ONE_THREAD_S
            self._one_thread_s = min(most_s, 2 * self._one_thread_s or first_s)
            self._one_thread_until = time.perf_counter() + self._one_thread_s
        else:
            self._one_thread_s = 0.0

    def take_failures(self, settings_of: Callable[[int], SamplingConfig]) -> dict[int, InputError]:
        """The rows that failed in the last run, each with its error; they become ended."""
        if not self._job[at.FAILED]:
            return {}
        self._job[at.FAILED] = 0
        failures = {}
        for row in np.flatnonzero(self._slots[:, at.STATUS] >= at.BROKEN_MODEL).tolist():
            if self._slots[row, at.STATUS] == at.BROKEN_MODEL:
                failures[row] = broken_model()
            else:
                used = settings_of(row)
                failures[row] = overflowing_settings(used.temperature, used.repetition_penalty)
            self._slots[row, at.STATUS] = at.ENDED
            self._memory.keep_logits(row)
        return failures


class CpuDecoding:
    """See `mygpt.engine.Decoding`; `race` draws with the caller's random numbers."""

    draws_in_blocks = True

    def __init__(
        self,
        model: PackedModel,
        requests: Sequence[Request],
        threads: int | None,
        drafts: Drafts | None = None,
    ) -> None:
        self._requests = list(requests)
        self._drafts = drafts  # the job has addresses of its arrays
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
        speculation = None
        if drafts is not None:
            greedy = all(request.sampling.greedy for request in requests)
            speculation = drafts.begin(self._memory.job, greedy=greedy)
        self._loop = Loop(self._memory, threads, speculation)
        self._shared = False

    def advance(self, most: int, least: int | None = None) -> list[list[int]]:
        """Draw tokens for each row; see `Decoding`."""
        before = self._slots[:, at.LENGTH].copy()
        self._share_prompts()
        goals = self._slots[:, at.DRAWN] + most
        while self._loop.draw(
            goals, self._memory.reserve_text, spare=most - (most if least is None else least)
        ):
            self._raise_failure()
        ends = self._slots[:, at.LENGTH]
        return [
            self._memory.text[row, start : ends[row]].tolist() for row, start in enumerate(before)
        ]

    def next_probabilities(self) -> NDArray[np.float32]:
        """Each row's next-token probabilities, (B, V), a view that the next call overwrites."""
        self._share_prompts()
        self._memory.reserve_text(1)
        self._loop.choose_threads()
        self._do(at.PREDICT, 1)
        return self._memory.probabilities[:, : self._config.vocab_size]

    @property
    def steps_of_a_run(self) -> int:
        """How many steps a run may have, so that Python can react to signals."""
        return self._loop.steps_in_time

    def race(self, noise: NDArray[np.float32]) -> None:
        """Append tokens to each row, each the one of largest probability / noise.

        With numbers from Exp(1) this draws from the probabilities.

        Args:
            noise: (steps, B, V); see `steps_of_a_run`.
        """
        steps = len(noise)
        self._share_prompts()
        self._memory.reserve_text(steps + 1)
        self._loop.choose_threads()
        goals = self._slots[:, at.DRAWN] + steps
        self._slots[:, at.GOAL] = self._slots[:, at.ENOUGH] = goals
        self._memory.job[at.NOISE] = noise.ctypes.data
        self._do(at.RACE, steps)

    def last_ids(self, count: int) -> NDArray[np.int64]:
        """(B, count) the last tokens of rows that are equally long, a copy."""
        length = self._slots[0, at.LENGTH]
        return self._memory.text[:, length - count : length].copy()

    def end(self, row: int) -> None:
        """End this row: it gets no further tokens."""
        if self._slots[row, at.STATUS] == at.ACTIVE:
            self._memory.keep_logits(row)
            self._slots[row, at.STATUS] = at.ENDED

    def logits(self, row: int) -> NDArray[np.float32]:
        """(V,) the prediction behind the row's last token; see `Decoding`."""
        return self._memory.logits_of(row)

    def passes(self, row: int) -> int:
        """In how many passes the row's tokens were drawn; see `Decoding`."""
        return int(counts_of(self._slots[row : row + 1]).passes.sum())

    def _share_prompts(self) -> None:
        """At the first call: read a prompt that several rows have only once, and copy its cache."""
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
        self._loop.run(mode, steps)
        self._raise_failure()

    def _raise_failure(self) -> None:
        for error in self._loop.take_failures(lambda row: self._requests[row].sampling).values():
            raise error
