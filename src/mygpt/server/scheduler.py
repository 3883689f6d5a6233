"""The one thread that decodes: requests join its batch and leave it between tokens.

Requests take slots as these become free, in the order that `Queue` gives them, and nothing is
computed for rows that wait. What is drawn goes back to the event loop in one call a turn.

Whatever one row raises ends its request alone. Where the batch itself fails, the requests in it
get an error, those that wait keep their places, and a fresh batch takes its place.
"""

from __future__ import annotations

import asyncio
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
from mygpt.engines.contract import Batch, Request
from mygpt.errors import InputError, broken_model
from mygpt.server.problems import ApiError, broken, closing, restarted, row_failed
from mygpt.server.tickets import Queue, Ticket, Work

# A compiled step is so short that asking for each alone would cost; longer blocks would hold up
# those who want to join.
_BLOCK_S = 0.010
_LONGEST_BLOCK = 64
# How long to wait before each try to begin anew: memory that was short may be there again.
_PAUSES_S = (0.5, 2.0)

_LOG = logging.getLogger("mygpt.server")


class Scheduler:
    """Owns a batch; every method but the thread's own is for any thread.

    Args:
        open_batch: opens a batch, where rows decode; nobody else may use it.
        max_waiting: how many requests may wait beyond the free slots (see `Queue`).

    Attributes:
        dead: whether the thread has ended for good: no batch can be opened and used any more.
        restarts: how often a batch failed and another one took its place.
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
        """Queue a request's works; to be called on the event loop that waits for them.

        Args:
            works: one or more.
            urgent: whether they are of a token or so, and have slots of their own.
            client: who asks, as an address.

        Raises:
            ApiError: 429 when too many wait, 503 while shutting down, 500 without a thread.
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
        """Nobody waits for it any more: its rows end before the next token."""
        with self._change:
            ticket.over = True
            self._queue.remove(ticket)
            self._change.notify()

    def drain(self) -> None:
        """Refuse new requests, and those of which nothing has begun; finish the others."""
        with self._change:
            self._draining = True
            for ticket in [t for t in self._queue if not t.begun]:
                self._queue.remove(ticket)
                self._post([(ticket, closing())])

    def stop(self) -> None:
        """Drain, give up what still runs, and end the thread."""
        self.drain()
        with self._change:
            self._stopping = True
            self._change.notify()
        if self._thread is not None:
            self._thread.join(timeout=10.0)

    @property
    def healthy(self) -> bool:
        """Whether requests are taken."""
        return not self.dead and not self._draining

    @property
    def running(self) -> int:
        """Rows that decode."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests of which rows wait."""
        return len(self._queue)

    def _holders(self) -> list[Ticket]:
        return [ticket for ticket, _ in self._running.values()]

    # --- the thread's own ------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while not self._stopping:
                try:
                    self._decode()
                except BaseException as problem:  # whatever it was, nobody may wait for ever
                    self._begin_anew(problem)
        except BaseException as problem:
            with contextlib.suppress(Exception):
                _LOG.critical("no batch can be used any more", exc_info=problem)
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
        """Decode until the end."""
        assert self._batch is not None
        while self._wait():
            self._end_given_up(self._batch)
            self._join(self._batch)
            self._advance(self._batch)

    def _begin_anew(self, problem: BaseException) -> None:
        """Open another batch, or raise what keeps it from being used."""
        with contextlib.suppress(Exception):
            _LOG.error("decoding failed; the requests of this batch end", exc_info=problem)
        traceback.clear_frames(problem.__traceback__)  # they hold the batch
        with self._change:
            tickets = dict.fromkeys(self._holders())
            tickets |= dict.fromkeys(ticket for ticket in self._queue if ticket.begun)
            for ticket in tickets:
                self._queue.remove(ticket)
            self._running.clear()
            self._batch = None  # its memory is wanted for the next one
            self.restarts += 1
        self._post([(ticket, restarted()) for ticket in tickets])
        for pause_s in (*_PAUSES_S, None):
            try:
                self._batch = self._tried(self._open_batch())
            except BaseException as error:
                if pause_s is None:
                    raise
                with contextlib.suppress(Exception):
                    _LOG.error("another batch failed too: %r", error)
            else:
                return
            with self._change:
                if self._change.wait_for(lambda: self._stopping, pause_s):
                    return

    def _tried(self, batch: Batch) -> Batch:
        """The batch, once it has drawn a token."""
        prompt = np.zeros(1, np.int64)
        slot = batch.join(Request(prompt, 1, SamplingConfig(temperature=0.0), Stream(0)))
        batch.advance(1)  # what the model predicts is no matter here: see `failures`
        batch.end(slot)
        return batch

    def _wait(self) -> bool:
        """Sleep until there is something to do; False at the end."""
        with self._change:
            self._change.wait_for(lambda: self._running or len(self._queue) or self._stopping)
            return not self._stopping

    def _end_given_up(self, batch: Batch) -> None:
        for slot, (ticket, _) in list(self._running.items()):
            if ticket.over:
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
        """End a request for what one of its rows raised."""
        self._post([(ticket, _problem(error))])
        self.cancel(ticket)

    def _advance(self, batch: Batch) -> None:
        if not self._running:
            return
        watched = any(work.wants_logits for _, work in self._running.values())
        length = 1 if watched else self._block
        began = time.perf_counter()
        new = batch.advance(length)
        if not watched:
            fit = int(_BLOCK_S * length / max(1e-9, time.perf_counter() - began))
            self._block = max(1, min(_LONGEST_BLOCK, fit))
        failures = batch.failures()
        letters: list[tuple[Ticket, tuple[Any, bool] | ApiError]] = []
        for slot, (ticket, work) in list(self._running.items()):
            if slot not in new and slot not in failures:  # its prompt is still being read
                continue
            try:
                if slot in failures:
                    raise failures[slot]
                ended = _take(batch, slot, work, new[slot], length)
                news = work.news()
            except BaseException as error:
                self._fail(ticket, error)
                self._release(batch, slot)
                continue
            if ended:
                self._release(batch, slot)
            if ended or news is not None:
                letters.append((ticket, (news, ended)))
        self._post(letters)

    def _post(self, letters: list[tuple[Ticket, Any]]) -> None:
        """Send letters to their event loops, in one call for each loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Any]]] = {}
        for letter in letters:
            by_loop.setdefault(letter[0].loop, []).append(letter)
        for loop, part in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, part)
            except RuntimeError:  # that loop has ended, and all that waited on it
                for ticket, _ in part:
                    self.cancel(ticket)


def _deliver(letters: list[tuple[Ticket, Any]]) -> None:
    for ticket, letter in letters:
        ticket.deliver(letter)


def _take(batch: Batch, slot: int, work: Work, ids: list[int], length: int) -> bool:
    """Give a work its new tokens; whether it has ended."""
    for token_id in ids:
        if work.ended:  # by a stop string, within a block
            break
        work.take(token_id, batch.logits(slot) if work.wants_logits else None)
    if not work.ended and len(ids) < length:
        work.finish()
        return True
    return work.ended


def _problem(error: BaseException) -> ApiError:
    """What a row raised as an answer: a broken model is no fault of the request's."""
    if isinstance(error, InputError):
        if str(error) == str(broken_model()):
            return ApiError(500, str(error), code="broken_model")
        return ApiError(400, str(error), code="invalid_value")
    with contextlib.suppress(Exception):
        _LOG.error("a request failed", exc_info=error)
    return row_failed(error)
