"""Requests in the decoding thread: their rows, the queue of their results, and who is next."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mygpt.engine import Request
from mygpt.server.problems import ApiError, busy

# Many messages may wait for a client that reads slowly. They are taken in parts of this size, so
# that encoding one part as JSON does not block the event loop for long.
_MOST_AT_ONCE = 256
_MOST_OF_ONE = 16  # slots of one request, or half of all slots if that is more
_URGENT_FRACTION = 8  # urgent work uses at most 1/8 of the slots


class Work(Protocol):
    """The work of one slot: a row that decodes (`Sample`, or the page's `NextToken`)."""

    request: Request
    wants_logits: bool  # whether `take` needs the logits that each token was sampled from

    @property
    def ended(self) -> bool:
        """Whether it needs no more tokens."""

    def take(self, token_id: int, logits: NDArray[np.float32] | None) -> None:
        """Add a token."""

    def finish(self) -> None:
        """End: no more tokens are sampled."""

    def update(self) -> Any | None:
        """The new result since the last call, or None."""


class Ticket:
    """A request's rows, and the queue of their results for the event loop that waits for them.

    Args:
        works: the request's rows, one or more.
        urgent: whether they take about one token each, and may use the reserved slot.
        client: the client's address.
    """

    def __init__(self, works: Sequence[Work], *, urgent: bool = False, client: str = "") -> None:
        self.urgent, self.client = urgent, client
        self.loop = asyncio.get_running_loop()
        self.pending = deque(works)
        self.left = len(works)
        self.begun = self.cancelled = False
        self._messages: asyncio.Queue[tuple[Any, bool] | ApiError] = asyncio.Queue()

    def deliver(self, message: tuple[Any, bool] | ApiError) -> None:
        """Pass a message of the thread to `updates`; called on the event loop."""
        self._messages.put_nowait(message)

    async def updates(self) -> AsyncIterator[list[Any]]:
        """The rows' new results, in lists of limited length, until all rows have ended.

        Raises:
            ApiError: if the request cannot be finished.
        """
        left = self.left
        while left:
            messages = [await self._messages.get()]
            while len(messages) < _MOST_AT_ONCE and not self._messages.empty():
                messages.append(self._messages.get_nowait())
            new = []
            for message in messages:
                if isinstance(message, ApiError):
                    raise message
                left -= message[1]
                if message[0] is not None:
                    new.append(message[0])
            if new:
                yield new


class Queue:
    """Tickets whose rows wait for a slot; not thread-safe.

    There are two queues, for urgent and for ordinary work, each with the oldest ticket first. If
    both could use a free slot, they alternate. Urgent work uses at most an eighth of the slots, and
    one slot is reserved for it. Of ordinary work, the client with the fewest slots is served first;
    while several tickets wait, none uses more than its equal part of the slots; and no request
    uses more than 16 slots, or half of them, at a time.

    Args:
        slots: the number of slots.
        max_waiting: how many tickets of each kind may wait in addition to the free slots.
    """

    def __init__(self, slots: int, max_waiting: int) -> None:
        self._slots, self._max_waiting = slots, max_waiting
        self._most_urgent = max(1, slots // _URGENT_FRACTION)
        self._others = slots - 1 if slots > 1 else 1  # all but the reserved one
        self._most_of_one = max(_MOST_OF_ONE, self._others // 2)
        self._waiting: dict[bool, deque[Ticket]] = {True: deque(), False: deque()}
        self._urgent_is_next = True

    def __len__(self) -> int:
        return len(self._waiting[True]) + len(self._waiting[False])

    def __iter__(self) -> Iterator[Ticket]:
        yield from self._waiting[True]
        yield from self._waiting[False]

    def add(self, ticket: Ticket, running: Sequence[Ticket]) -> None:
        """Add a ticket; `ApiError` 429 if too many of its kind wait.

        Args:
            ticket: the ticket.
            running: for each slot in use, its ticket.
        """
        waiting, limit = self._waiting[ticket.urgent], self._most_urgent
        free = limit - sum(other.urgent for other in running)
        if not ticket.urgent:
            free = self._others - len(running)
        if len(waiting) >= self._max_waiting + max(0, free):
            raise busy(len(waiting))
        waiting.append(ticket)

    def remove(self, ticket: Ticket) -> None:
        """Remove the waiting rows of a ticket."""
        ticket.pending.clear()
        if ticket in self._waiting[ticket.urgent]:
            self._waiting[ticket.urgent].remove(ticket)

    def next(self, running: Sequence[Ticket]) -> tuple[Ticket, Work] | None:
        """Remove and return the next row to run; None if none may run now.

        Args:
            running: for each slot in use, its ticket.
        """
        if len(running) >= self._slots:
            return None
        urgent, other = self._urgent(running), self._other(running)
        ticket = urgent if other is None or self._urgent_is_next else other
        ticket = ticket or other
        if ticket is None:
            return None
        self._urgent_is_next = not ticket.urgent
        ticket.begun = True
        work = ticket.pending.popleft()
        if not ticket.pending:
            self._waiting[ticket.urgent].remove(ticket)
        return ticket, work

    def _urgent(self, running: Sequence[Ticket]) -> Ticket | None:
        waiting = self._waiting[True]
        held = sum(ticket.urgent for ticket in running)
        return waiting[0] if waiting and held < self._most_urgent else None

    def _other(self, running: Sequence[Ticket]) -> Ticket | None:
        waiting = self._waiting[False]
        if not waiting or len(running) >= self._others:
            return None
        share = self._slots // len(waiting)
        held = Counter(id(ticket) for ticket in running)
        clients = Counter(ticket.client for ticket in running if not ticket.urgent)
        free = [ticket for ticket in waiting if held[id(ticket)] < self._most_of_one]
        # Among clients with equally many slots, the one with the oldest ticket.
        client = min((t.client for t in free), key=clients.__getitem__, default=None)
        own = [ticket for ticket in free if ticket.client == client]
        within = [ticket for ticket in own if held[id(ticket)] < share]
        return next(iter(within or own), None)
