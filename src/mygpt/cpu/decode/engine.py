"""The `cpu` engine: the decoding loop as machine code, and its batch.

README.md in the folder above describes the memory layout, the threads and the cache of machine
code. `decoding` runs the kernels on the arrays of `memory` with the threads of `workers`. A batch's
requests join and leave between tokens ("continuous batching"), after Yu et al., "Orca: a
distributed serving system for transformer-based generative models", 2022: the decoding loop lists
the rows of each pass, so a request can join at any step.
Letters: B slots, D head size, G key/value heads, L window, N layers, V vocabulary.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.core.config import GPTConfig
from mygpt.cpu.common.build import load_library
from mygpt.cpu.common.layout import padded
from mygpt.cpu.common.workers import usable_cores
from mygpt.cpu.decode import layout as at
from mygpt.cpu.decode.decoding import CpuDecoding, Loop
from mygpt.cpu.decode.memory import Memory
from mygpt.cpu.decode.pack import FORMATS, PackedModel
from mygpt.cpu.decode.speculation import Drafts
from mygpt.engine import Request, check_prompt_fits
from mygpt.errors import InputError, require_choice

# Steps of a run by several threads at most. Starting a run costs about 30 us: one text of a model
# of 10.7 million parameters had 0.86 to 0.98 of the speed of long runs (docs/lab-notes.md). That is
# accepted here, where a run whose threads wait for their cores keeps other requests from joining.
_STEPS_OF_SEVERAL_THREADS = 8
# Tokens that fit into a slot's cache at first; longer windows grow to what is needed.
_FIRST_CAPACITY = 1024
_SPARE_TEXT = 64  # tokens of a slot's text beyond two windows
# Tokens of a prompt from which on another slot's cache is searched for them: to read fewer takes no
# longer than to search and copy. An estimate: no measurement is recorded.
_LEAST_SHARED_PREFIX = 16
# Multiply-adds that a piece of a prompt may take, for which all other requests wait: 5 ms at
# 100 GFLOP/s a thread with two threads. And its least number of tokens, as each piece reads all
# weights once. Less would be a shorter wait and a lower throughput; no measurement is recorded.
_PIECE_PRODUCTS, _LEAST_PIECE = 500_000_000, 32


class CpuEngine:
    """Decodes on the CPU.

    Args:
        config: the model's shape.
        arrays: its parameters by name, as `GPT.state_dict` has them.
        weights: "float32", or "int8" or "int4" for a quarter or a seventh of the memory and of its
            traffic.
        threads: how many to use; None chooses by the amount of work.
        drafts: what the next tokens are guessed from, so that several can be checked at once; None
            guesses nothing. It has no influence on the tokens.
    """

    name = "cpu"

    def __init__(
        self,
        config: GPTConfig,
        arrays: Mapping[str, NDArray[Any]],
        *,
        weights: str = "float32",
        threads: int | None = None,
        drafts: Drafts | None = None,
    ) -> None:
        require_choice("weights", weights, tuple(FORMATS))
        self.model = PackedModel(config, arrays, weights=weights)
        self.threads, self.drafts = threads, drafts

    def with_drafts(self, drafts: Drafts | None) -> CpuEngine:
        """The same engine with other drafts; it shares the weights."""
        other = copy.copy(self)
        other.drafts = drafts
        return other

    def start(self, requests: Sequence[Request]) -> CpuDecoding:
        """Begin to decode; see `mygpt.engine.Engine`."""
        return CpuDecoding(self.model, requests, self.threads, self.drafts)

    def open(self, size: int) -> CpuBatch:
        """A batch that requests join and leave; see `mygpt.engine.Engine`."""
        return CpuBatch(self.model, size, self.threads, self.drafts)


def digest_of(places: Sequence[tuple[int, int]]) -> int:
    """A hash of arrays of 32-bit numbers, given as (address, count): equal means unchanged."""
    table = np.array(places, np.int64).reshape(-1, 2)
    return load_library()["digest"](table.ctypes.data, len(table))


class CpuBatch:
    """See `mygpt.engine.Batch`.

    All memory is allocated at the beginning, nearly all of it keys and values of a full window; the
    system provides pages only as texts fill them. With a window of more than 1,024 tokens the
    caches grow to what the longest text has needed so far. Of a text the window and some more
    tokens are kept, so its length has no limit.

    A long prompt is read in pieces between the other requests' tokens. Where it begins as the text
    of another slot does, that part of the cache is copied instead of computed: one prompt may have
    many samples, or grow a token at a time. The texts of freed slots are used for this too; free
    slots are reused in the order in which they were freed.

    Args:
        model: the model; later changes of its weights have no effect.
        size: B, the number of slots.
        threads: how many to use; None chooses by the work of each step.
        drafts: as for `CpuEngine`.
    """

    def __init__(
        self, model: PackedModel, size: int, threads: int | None, drafts: Drafts | None = None
    ) -> None:
        window = model.config.max_seq_len
        self._window = window
        self._capacity = min(window, _FIRST_CAPACITY)  # tokens that fit into a slot's cache
        self._memory = Memory(
            model,
            size,
            capacity=padded(self._capacity),
            text_width=_text_width(self._capacity),
            threads=threads or usable_cores(),
        )
        self._slots = self._memory.slots
        self._drafts = drafts  # the job has addresses of its arrays
        self._loop = Loop(
            self._memory, threads, None if drafts is None else drafts.begin(self._memory.job)
        )
        self._requests: dict[int, Request] = {}  # by slot
        self._free = deque(range(size))
        self._unread: list[int] = []  # slots whose prompts are not read yet, oldest first
        self._piece = max(_LEAST_PIECE, _PIECE_PRODUCTS // model.config.num_parameters())
        self._failures: dict[int, InputError] = {}

    @property
    def size(self) -> int:
        """The number of slots."""
        return len(self._slots)

    @property
    def active(self) -> int:
        """The number of rows that have not ended."""
        return self._loop.active + len(self._unread)

    def join(self, request: Request) -> int:
        """Take a free slot; see `Batch`."""
        assert self._free, "no slot is free: the caller has to count them"
        check_prompt_fits(len(request.prompt), self._window, request.overflow)
        self._reserve(len(request.prompt))
        slot = self._free[0]
        try:
            self._memory.put(slot, request, shown=request.prompt[-self._window :])
        except BaseException:  # such as MemoryError: half a request must not become active
            self._slots[slot, at.STATUS] = at.FREE
            raise
        self._free.popleft()
        self._requests[slot] = request
        row = self._slots[slot]
        if row[at.STATUS] == at.ACTIVE and row[at.LENGTH] > _LEAST_SHARED_PREFIX:
            row[at.STATUS] = at.ENDED  # until it is read
            self._unread.append(slot)
        return slot

    def advance(self, most: int, least: int | None = None) -> dict[int, list[int]]:
        """Draw tokens for every row; see `Batch`."""
        new: dict[int, list[int]] = {slot: [] for slot in self._requests}
        self._failures = {}
        if most > 0:
            self._read_prompts()
        goals = self._slots[:, at.DRAWN] + most
        while True:
            before = self._slots[:, at.DRAWN].tolist()
            if not self._loop.draw(
                goals,
                self._make_space,
                spare=most - (most if least is None else least),
                most_tokens=self._capacity + _SPARE_TEXT - 1,
                most_of_several=_STEPS_OF_SEVERAL_THREADS,
            ):
                break
            self._failures |= self._loop.take_failures(lambda row: self._requests[row].sampling)
            ends, drawn = (self._slots[:, field].tolist() for field in (at.LENGTH, at.DRAWN))
            for slot, ids in new.items():
                if count := drawn[slot] - before[slot]:
                    ids += self._memory.text[slot, ends[slot] - count : ends[slot]].tolist()
        return {slot: ids for slot, ids in new.items() if slot not in self._unread}

    def _make_space(self, tokens: int) -> None:
        """Make caches and texts large enough for so many more tokens of each row."""
        if self._capacity < self._window:
            self._reserve(self._longest() + tokens)
        self._memory.slide_texts(tokens)

    def _longest(self) -> int:
        """The largest number of tokens in any active row's window."""
        active = self._slots[self._slots[:, at.STATUS] == at.ACTIVE]
        return int((active[:, at.LENGTH] - np.maximum(active[:, at.START], 0)).max(initial=0))

    def _reserve(self, positions: int) -> None:
        """Make the caches large enough for so many tokens of a text, at most a window."""
        positions = min(positions, self._window)
        if positions > self._capacity:
            self._capacity = min(self._window, max(positions, 2 * self._capacity))
            self._memory.grow(padded(self._capacity), _text_width(self._capacity))

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
        """Read a piece of the waiting prompts, or several while no row is active."""
        budget = self._piece
        while self._unread and (budget > 0 or not self._loop.active):
            budget -= self._read_piece(budget if budget > 0 else self._piece)

    def _read_piece(self, budget: int) -> int:
        """Read up to `budget` tokens of prompts, the oldest first, and return their number.

        Of prompts with the same beginning one is read; the others wait and copy its cache.
        Rows whose prompt is completely read become active.
        """
        lengths: dict[int, int] = {}
        beginnings, left = set(), budget
        for slot in self._unread:
            beginning = self._memory.text[slot, :_LEAST_SHARED_PREFIX].tobytes()
            if left == 0 or beginning in beginnings:
                continue
            if not self._slots[slot, at.CACHED]:
                self._copy_cached_prefix(slot)
            length, cached = self._slots[slot, [at.LENGTH, at.CACHED]].tolist()
            unread = min(left, length - 1 - cached)
            if unread:
                beginnings.add(beginning)
            left -= unread
            lengths[slot] = length
            self._slots[slot, at.LENGTH] = cached + unread + 1  # all but the last token is read
        if left < budget:
            self._loop.read(list(lengths))
        for slot, length in lengths.items():
            self._slots[slot, at.LENGTH] = length
            if self._slots[slot, at.CACHED] == length - 1:
                self._slots[slot, at.STATUS] = at.ACTIVE
                self._unread.remove(slot)
        return budget - left

    def _copy_cached_prefix(self, slot: int) -> None:
        """Copy the longest beginning of this slot's prompt, except for the last token, that the
        cache of another slot has.
        """
        last = self._slots[slot, at.LENGTH] - 1
        cached = self._memory.cached_prefixes(self._memory.text[slot, :last])
        best = int(cached.argmax())
        count = int(cached[best])
        # A model with weights that are not finite may have left NaN, which must not spread.
        if count >= _LEAST_SHARED_PREFIX and self._memory.is_finite(best, count):
            self._memory.share_cache(best, [slot], count)


def _text_width(window: int) -> int:
    return 2 * window + _SPARE_TEXT
