"""Requests on their way through the decoding thread: what they want done, and whose turn it is."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mygpt.engines.contract import Request
from mygpt.server.problems import ApiError, busy

# A client that reads slowly finds much at once: parts are bounded, so that turning one into JSON
# does not hold up the event loop.
_MOST_AT_ONCE = 256
_MOST_OF_ONE = 16  # rows of one request, or half of the slots where that is more
_URGENT_SHARE = 8  # urgent works take one slot in so many


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
        """What is new since the last time, or None."""
        ...


class Ticket:
    """A request's works and the way back to whoever waits for them, on one event loop.

    Args:
        works: one or more.
        urgent: whether they are of a token or so, and have slots of their own.
        client: who asks, as an address.
    """

    def __init__(self, works: Sequence[Work], *, urgent: bool = False, client: str = "") -> None:
        self.urgent, self.client = urgent, client
        self.loop = asyncio.get_running_loop()
        self.pending = deque(works)
        self.left = len(works)
        self.begun = self.over = False
        self._letters: asyncio.Queue[tuple[Any, bool] | ApiError] = asyncio.Queue()

    def deliver(self, letter: tuple[Any, bool] | ApiError) -> None:
        """Put what the thread sends where `news` finds it; on the event loop."""
        self._letters.put_nowait(letter)

    async def news(self) -> AsyncIterator[list[Any]]:
        """What is new, as much as there is at once within limits, until all works have ended.

        Raises:
            ApiError: when the request cannot be finished.
        """
        left = self.left
        while left:
            letters = [await self._letters.get()]
            while len(letters) < _MOST_AT_ONCE and not self._letters.empty():
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


class Queue:
    """Tickets of which works wait for a slot; for one thread at a time.

    Urgent works and the others wait in a queue each, the oldest first, and take turns where both
    could have a slot. Urgent ones never hold more than an eighth of the slots, and one slot is
    theirs alone. Among the others none takes more than its share while several wait, the client
    that holds the fewest slots comes first, and no request has more than 16 rows, or half of the
    slots, at a time.

    Args:
        slots: how many slots there are.
        max_waiting: how many tickets of each kind may wait beyond the free slots.
    """

    def __init__(self, slots: int, max_waiting: int) -> None:
        self._slots, self._max_waiting = slots, max_waiting
        self._most_urgent = max(1, slots // _URGENT_SHARE)
        self._others = slots - 1 if slots > 1 else 1  # all but the urgent ones' own
        self._most_of_one = max(_MOST_OF_ONE, self._others // 2)
        self._waiting: dict[bool, deque[Ticket]] = {True: deque(), False: deque()}
        self._urgent_is_next = True

    def __len__(self) -> int:
        return len(self._waiting[True]) + len(self._waiting[False])

    def __iter__(self) -> Iterator[Ticket]:
        yield from self._waiting[True]
        yield from self._waiting[False]

    def add(self, ticket: Ticket, running: Sequence[Ticket]) -> None:
        """Let a ticket wait; `ApiError` 429 where too many of its kind do.

        Args:
            ticket: the ticket.
            running: for each slot in use, whose it is.
        """
        waiting, limit = self._waiting[ticket.urgent], self._most_urgent
        free = limit - sum(other.urgent for other in running)
        if not ticket.urgent:
            free = self._others - len(running)
        if len(waiting) >= self._max_waiting + max(0, free):
            raise busy(len(waiting))
        waiting.append(ticket)

    def remove(self, ticket: Ticket) -> None:
        """Forget what waits of a ticket."""
        ticket.pending.clear()
        if ticket in self._waiting[ticket.urgent]:
            self._waiting[ticket.urgent].remove(ticket)

    def next(self, running: Sequence[Ticket]) -> tuple[Ticket, Work] | None:
        """The work whose turn it is, which then waits no more; None where nothing may run.

        Args:
            running: for each slot in use, whose it is.
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
        # Of several that hold alike, the one whose ticket is the oldest.
        client = min((t.client for t in free), key=clients.__getitem__, default=None)
        own = [ticket for ticket in free if ticket.client == client]
        within = [ticket for ticket in own if held[id(ticket)] < share]
        return next(iter(within or own), None)
