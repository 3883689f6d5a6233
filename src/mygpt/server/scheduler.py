"""The one thread that decodes: requests join its batch and leave it between tokens.

First come, first served: a request's rows take slots as these become free, and nothing is
computed for rows that wait. What is drawn goes back to the event loop in one call a turn.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mygpt.config import broken_model
from mygpt.engines.contract import Batch, Request
from mygpt.errors import InputError
from mygpt.server.problems import ApiError

# A compiled step is so short that asking for each alone would cost; longer blocks would hold up
# those who want to join.
_BLOCK_S = 0.010
_LONGEST_BLOCK = 64


class Work(Protocol):
    """What takes a slot: see `samples`."""

    request: Request

    @property
    def wants_logits(self) -> bool:
        """Whether `take` needs the logits of each token."""
        ...

    @property
    def ended(self) -> bool:
        """Whether it takes no more tokens."""
        ...

    def take(self, token_id: int, logits: NDArray[np.float32] | None) -> None:
        """Take in a token."""
        ...

    def finish(self) -> None:
        """Nothing more will be drawn."""
        ...

    def news(self) -> Any | None:
        """What to tell since the last time, or None."""
        ...


class Ticket:
    """A request's works and the way back to whoever waits for them, on one event loop."""

    def __init__(self, works: Sequence[Work], *, urgent: bool = False) -> None:
        self.urgent = urgent
        self.loop = asyncio.get_running_loop()
        self.pending = deque(works)
        self.left = len(works)
        self.begun = self.over = False
        self._letters: asyncio.Queue[tuple[Any, bool] | ApiError] = asyncio.Queue()

    def deliver(self, letter: tuple[Any, bool] | ApiError) -> None:
        """Put what the thread sends where `news` finds it; on the event loop."""
        self._letters.put_nowait(letter)

    async def news(self) -> AsyncIterator[list[Any]]:
        """What is new, as much as there is at once, until all works have ended.

        Raises:
            ApiError: when the request cannot be finished.
        """
        left = self.left
        while left:
            letters = [await self._letters.get()]
            while not self._letters.empty():
                letters.append(self._letters.get_nowait())
            new = []
            for letter in letters:
                if isinstance(letter, ApiError):
                    raise letter
                left -= letter[1]
                if letter[0] is not None:
                    new.append(letter[0])
            if new:
                yield new


def busy(waiting: int) -> ApiError:
    """What is answered where too many wait."""
    return ApiError(
        429,
        f"{waiting} requests wait already: try again in a second",
        code="queue_full",
        headers={"Retry-After": "1"},
    )


def closing() -> ApiError:
    """What is answered while the server ends."""
    return ApiError(503, "the server is shutting down: ask another one", code="shutting_down")


def broken() -> ApiError:
    """What is answered once the decoding thread has died."""
    return ApiError(
        500, "the model's thread has died: the server has to be started anew", code="worker_died"
    )


class Scheduler:
    """Owns a batch; every method but the thread's own is for any thread.

    First come, first served, but for two things: while several wait, none takes more than its
    share of the slots, and the last slot is for urgent works alone, which go first.

    Args:
        batch: where rows decode; nobody else may use it.
        max_waiting: how many requests may wait beyond the free slots.
    """

    def __init__(self, batch: Batch, max_waiting: int) -> None:
        self._batch, self._max_waiting = batch, max_waiting
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, tuple[Ticket, Work]] = {}
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._block = 1
        self._draining = self._stopping = False
        self.dead = False

    def submit(self, works: Sequence[Work], *, urgent: bool = False) -> Ticket:
        """Queue a request's works; to be called on the event loop that waits for them.

        Args:
            works: one or more.
            urgent: works of a token or so, which go before all others.

        Raises:
            ApiError: 429 when too many wait, 503 while shutting down, 500 without a thread.
        """
        with self._change:
            if self.dead:
                raise broken()
            if self._draining:
                raise closing()
            kept = not urgent and self._batch.size > 1  # the last slot is for urgent works
            free = max(0, self._batch.size - len(self._running) - kept)
            if len(self._waiting) >= self._max_waiting + free:
                raise busy(len(self._waiting))
            ticket = Ticket(works, urgent=urgent)
            if urgent:
                self._waiting.appendleft(ticket)
            else:
                self._waiting.append(ticket)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mygpt-serve", daemon=True)
                self._thread.start()
            self._change.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for it any more: its rows end before the next token."""
        with self._change:
            ticket.over = True
            ticket.pending.clear()
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            self._change.notify()

    def drain(self) -> None:
        """Refuse new requests, and those of which nothing has begun; finish the others."""
        with self._change:
            self._draining = True
            for ticket in [t for t in self._waiting if not t.begun]:
                self._waiting.remove(ticket)
                ticket.pending.clear()
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
        return len(self._waiting)

    # --- the thread's own ------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._wait():
                self._end_given_up()
                self._join()
                self._advance()
            error = closing()
        except BaseException:  # whatever it was, nobody may wait for ever
            logging.getLogger("mygpt.server").exception("the decoding thread has died")
            self.dead, error = True, broken()
        with self._change:
            tickets = dict.fromkeys([*self._waiting, *(t for t, _ in self._running.values())])
            self._waiting.clear()
            self._running.clear()
        self._post([(ticket, error) for ticket in tickets])

    def _wait(self) -> bool:
        """Sleep until there is something to do; False at the end."""
        with self._change:
            self._change.wait_for(lambda: self._running or self._waiting or self._stopping)
            return not self._stopping

    def _end_given_up(self) -> None:
        for slot, (ticket, _) in list(self._running.items()):
            if ticket.over:
                self._release(slot)

    def _release(self, slot: int) -> None:
        self._batch.end(slot)
        with self._change:
            del self._running[slot]

    def _next(self) -> tuple[Ticket, Work] | None:
        """The work whose turn it is."""
        with self._change:
            free = self._batch.size - len(self._running)
            ticket = self._whose_turn(urgent_alone=free <= 1 < self._batch.size)
            if ticket is None:
                return None
            ticket.begun = True
            work = ticket.pending.popleft()
            if not ticket.pending:
                self._waiting.remove(ticket)
            return ticket, work

    def _whose_turn(self, *, urgent_alone: bool) -> Ticket | None:
        if not self._waiting or self._waiting[0].urgent or urgent_alone:
            return self._waiting[0] if self._waiting and self._waiting[0].urgent else None
        share = self._batch.size // len(self._waiting)
        held = Counter(id(ticket) for ticket, _ in self._running.values())
        within = (ticket for ticket in self._waiting if held[id(ticket)] < share)
        return next(within, self._waiting[0])

    def _join(self) -> None:
        while len(self._running) < self._batch.size:
            found = self._next()
            if found is None:
                return
            try:
                slot = self._batch.join(found[1].request)
            except InputError as error:
                self._post([(found[0], _problem(error))])
                self.cancel(found[0])
            else:
                with self._change:
                    self._running[slot] = found

    def _advance(self) -> None:
        if not self._running:
            return
        watched = any(work.wants_logits for _, work in self._running.values())
        length = 1 if watched else self._block
        began = time.perf_counter()
        new = self._batch.advance(length)
        if not watched:
            fit = int(_BLOCK_S * length / max(1e-9, time.perf_counter() - began))
            self._block = max(1, min(_LONGEST_BLOCK, fit))
        failures = self._batch.failures()
        letters: list[tuple[Ticket, tuple[Any, bool] | ApiError]] = []
        for slot, (ticket, work) in list(self._running.items()):
            if slot in failures:
                letters.append((ticket, _problem(failures[slot])))
                self.cancel(ticket)
                self._release(slot)
                continue
            if slot not in new:  # its prompt is still being read
                continue
            ended = self._take(slot, work, new[slot], length)
            news = work.news()
            if ended:
                self._release(slot)
            if ended or news is not None:
                letters.append((ticket, (news, ended)))
        self._post(letters)

    def _take(self, slot: int, work: Work, ids: list[int], length: int) -> bool:
        """Give a work its new tokens; whether it has ended."""
        for token_id in ids:
            if work.ended:  # by a stop string, within a block
                break
            work.take(token_id, self._batch.logits(slot) if work.wants_logits else None)
        if not work.ended and len(ids) < length:
            work.finish()
            return True
        return work.ended

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


def _problem(error: InputError) -> ApiError:
    """A row's error as an answer: a broken model is no fault of the request's."""
    if str(error) == str(broken_model()):
        return ApiError(500, str(error), code="broken_model")
    return ApiError(400, str(error), code="invalid_value")
