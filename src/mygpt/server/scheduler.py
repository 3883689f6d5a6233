"""Continuous batching: one thread decodes all requests, which join and leave between tokens.

Rows take slots of the batch as they become free, in the order of `Queue`; nothing is computed for
waiting rows. The results of a step are passed to the event loop in one call.

An exception of one row ends its request only. If the batch itself fails, the requests in it get an
error, waiting requests stay in the queue, and a new batch is opened.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mygpt.core.config import SamplingConfig
from mygpt.core.random import Stream
from mygpt.engine import Batch, Request
from mygpt.errors import InputError, broken_model
from mygpt.server.problems import ApiError, broken, closing, restarted
from mygpt.server.tickets import Queue, Ticket, Work

# A step of the CPU engine is so short that one Python call per token would slow it down, so tokens
# are decoded in blocks. Longer blocks would delay requests that join.
_BLOCK_S = 0.010
_LONGEST_BLOCK = 64
_MOST_AHEAD = 7  # tokens that a row may get beyond these, where one pass gives several
# How long to wait before opening a new batch again: memory may be free again by then.
_PAUSES_S = (0.5, 2.0)

_LOG = logging.getLogger("mygpt.server")


class Scheduler:
    """Owns a batch and its thread; the public methods may be called from any thread.

    Args:
        open_batch: opens a batch, which only the scheduler uses.
        max_waiting: how many requests may wait in addition to the free slots (see `Queue`).

    Attributes:
        dead: whether the thread has ended after a failure: no new batch could be opened.
        restarts: how often a batch failed and was replaced.
    """

    def __init__(self, open_batch: Callable[[], Batch], max_waiting: int) -> None:
        self._open_batch = open_batch
        self._batch: Batch | None = open_batch()
        self._size = self._batch.size
        self._queue = Queue(self._size, max_waiting)
        self._running: dict[int, tuple[Ticket, Work]] = {}
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._block = 1
        self._draining = self._stopping = False
        self.dead, self.restarts = False, 0

    def submit(self, works: Sequence[Work], *, urgent: bool = False, client: str = "") -> Ticket:
        """Queue a request's rows; must be called on the event loop that waits for the results.

        Args:
            works: the rows, one or more.
            urgent: whether they take about one token each, and may use the reserved slot.
            client: the client's address.

        Raises:
            ApiError: 429 if too many wait, 503 during shutdown, 500 if decoding has failed.
        """
        with self._change:
            if self.dead:
                raise broken()
            if self._draining:
                raise closing()
            ticket = Ticket(works, urgent=urgent, client=client)
            self._queue.add(ticket, self._holders())
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mygpt-serve", daemon=True)
                self._thread.start()
            self._change.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a ticket's rows before the next token."""
        with self._change:
            ticket.cancelled = True
            self._queue.remove(ticket)
            self._change.notify()

    def drain(self) -> None:
        """Refuse new requests and those that have not started; let the others finish."""
        with self._change:
            self._draining = True
            new = [ticket for ticket in self._queue if not ticket.begun]
            for ticket in new:
                self._queue.remove(ticket)
            self._post([(ticket, closing()) for ticket in new])

    def stop(self) -> None:
        """Drain, cancel what still runs, and end the thread."""
        self.drain()
        with self._change:
            self._stopping = True
            self._change.notify()
        if self._thread is not None:
            self._thread.join(timeout=10.0)

    @property
    def healthy(self) -> bool:
        """Whether requests are accepted."""
        return not self.dead and not self._draining

    @property
    def running(self) -> int:
        """The number of rows that are decoding."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """The number of requests with waiting rows."""
        return len(self._queue)

    def _holders(self) -> list[Ticket]:
        return [ticket for ticket, _ in self._running.values()]

    # --- run in the thread -----------------------------------------------------------------

    def _work(self) -> None:
        try:
            while not self._stopping:
                try:
                    self._decode()
                except BaseException as problem:  # any kind: no request may wait for ever
                    self._restart(problem)
        except BaseException as problem:
            with contextlib.suppress(Exception):
                _LOG.critical("decoding cannot be restarted", exc_info=problem)
        finally:
            with self._change:
                self.dead = not self._stopping
                tickets = dict.fromkeys([*self._queue, *self._holders()])
                for ticket in tickets:
                    self._queue.remove(ticket)
                self._running.clear()
            error = broken() if self.dead else closing()
            self._post([(ticket, error) for ticket in tickets])

    def _decode(self) -> None:
        """Decode until the scheduler stops."""
        assert self._batch is not None
        while self._wait():
            self._end_cancelled(self._batch)
            self._join(self._batch)
            self._advance(self._batch)

    def _restart(self, problem: BaseException) -> None:
        """Open a new batch; raise if that fails several times."""
        with contextlib.suppress(Exception):
            _LOG.error("decoding failed; the requests of this batch end", exc_info=problem)
        traceback.clear_frames(problem.__traceback__)  # the frames reference the batch
        with self._change:
            tickets = dict.fromkeys(self._holders())
            tickets |= dict.fromkeys(ticket for ticket in self._queue if ticket.begun)
            for ticket in tickets:
                self._queue.remove(ticket)
            self._running.clear()
            self._batch = None  # free its memory for the next one
            self.restarts += 1
        self._post([(ticket, restarted()) for ticket in tickets])
        for pause_s in (*_PAUSES_S, None):
            try:
                self._batch = self._tested(self._open_batch())
            except BaseException as error:
                if pause_s is None:
                    raise
                with contextlib.suppress(Exception):
                    _LOG.error("a new batch failed, too: %r", error)
            else:
                return
            with self._change:
                if self._change.wait_for(lambda: self._stopping, pause_s):
                    return

    def _tested(self, batch: Batch) -> Batch:
        """The batch, after it has decoded one token."""
        prompt = np.zeros(1, np.int64)
        slot = batch.join(Request(prompt, 1, SamplingConfig(temperature=0.0), Stream(0)))
        batch.advance(1)  # NaN logits of a broken model do not matter here: see `failures`
        batch.end(slot)
        return batch

    def _wait(self) -> bool:
        """Sleep until there is work; False when the scheduler stops."""
        with self._change:
            self._change.wait_for(lambda: self._running or len(self._queue) or self._stopping)
            return not self._stopping

    def _end_cancelled(self, batch: Batch) -> None:
        for slot, (ticket, _) in list(self._running.items()):
            if ticket.cancelled:
                self._release(batch, slot)

    def _release(self, batch: Batch, slot: int) -> None:
        batch.end(slot)
        with self._change:
            del self._running[slot]

    def _join(self, batch: Batch) -> None:
        while True:
            with self._change:
                found = self._queue.next(self._holders())
            if found is None:
                return
            try:
                slot = batch.join(found[1].request)
            except BaseException as error:
                self._fail(found[0], error)
            else:
                with self._change:
                    self._running[slot] = found

    def _fail(self, ticket: Ticket, error: BaseException) -> None:
        """End a request after one of its rows raised."""
        self._post([(ticket, _problem(error))])
        self.cancel(ticket)

    def _advance(self, batch: Batch) -> None:
        if not self._running:
            return
        watched = any(work.wants_logits for _, work in self._running.values())
        length = 1 if watched else self._block
        began = time.perf_counter()
        new = batch.advance(1) if watched else batch.advance(length + _MOST_AHEAD, least=length)
        if not watched:
            drawn = max([length, *map(len, new.values())])
            fit = int(_BLOCK_S * drawn / max(1e-9, time.perf_counter() - began))
            self._block = max(1, min(_LONGEST_BLOCK, fit))
        failures = batch.failures()
        messages: list[tuple[Ticket, tuple[Any, bool] | ApiError]] = []
        for slot, (ticket, work) in list(self._running.items()):
            if slot not in new and slot not in failures:  # its prompt is still being processed
                continue
            try:
                if slot in failures:
                    raise failures[slot]
                ended = _take(batch, slot, work, new[slot], length)
                update = work.update()
            except BaseException as error:
                self._fail(ticket, error)
                self._release(batch, slot)
                continue
            if ended:
                self._release(batch, slot)
            if ended or update is not None:
                messages.append((ticket, (update, ended)))
        self._post(messages)

    def _post(self, messages: list[tuple[Ticket, Any]]) -> None:
        """Send messages to their tickets in one call of the event loop, which all share."""
        if not messages:
            return
        try:
            messages[0][0].loop.call_soon_threadsafe(_deliver, messages)
        except RuntimeError:  # the loop is closed, so nothing waits for these tickets
            for ticket, _ in messages:
                self.cancel(ticket)


def _deliver(messages: list[tuple[Ticket, Any]]) -> None:
    for ticket, message in messages:
        ticket.deliver(message)


def _take(batch: Batch, slot: int, work: Work, ids: list[int], length: int) -> bool:
    """Pass new tokens to a row; return whether it has ended."""
    for token_id in ids:
        if work.ended:  # within a block, by a stop string
            break
        work.take(token_id, batch.logits(slot) if work.wants_logits else None)
    if not work.ended and len(ids) < length:
        work.finish()
        return True
    return work.ended


def _problem(error: BaseException) -> ApiError:
    """The API's error for an exception of a row; a broken model is the server's error."""
    if isinstance(error, InputError):
        if str(error) == str(broken_model()):
            return ApiError(500, str(error), code="broken_model")
        return ApiError(400, str(error), code="invalid_value")
    with contextlib.suppress(Exception):
        _LOG.error("a request failed", exc_info=error)
    if isinstance(error, MemoryError):
        message = "not enough memory for this request: send a shorter prompt, or a smaller n"
        return ApiError(500, message, code="out_of_memory")
    return ApiError(500, "this request failed by an internal error: see the log", code="bug")
