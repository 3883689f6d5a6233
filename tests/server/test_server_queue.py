"""The queue: urgent rows and completions alternate, and clients share the slots."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from mygpt.server.problems import ApiError
from mygpt.server.tickets import Queue, Ticket
from servers import (
    BODY,
    running,
    wait_until,
)

pytestmark = pytest.mark.processes


class Nothing:
    """A row of which only the position in the queue matters."""


def tickets(kinds: str, works: int = 1) -> list[Ticket]:
    """One for each letter: u urgent, others named by their client."""

    async def make() -> list[Ticket]:
        return [Ticket([Nothing()] * works, urgent=k == "u", client=k) for k in kinds]

    return asyncio.run(make())


def test_urgent_rows_and_completions_alternate_and_the_oldest_is_first():
    """Urgent rows used all slots before any completion, the newest first."""
    queue, running, waits = Queue(33, 100), [], {True: [], False: []}
    arrived = {}
    for ticket in tickets("u" * 90 + "a" * 90):
        queue.add(ticket, running)
        arrived[ticket] = 0
    order = []
    for turn in range(60):
        while found := queue.next(running):
            running.append(found[0])
            order.append(found[0])
            waits[found[0].urgent].append(turn - arrived[found[0]])
        held = sum(ticket.urgent for ticket in running)
        assert held <= 4
        assert len(running) - held <= 32
        running = [ticket for ticket in running if not ticket.urgent and turn % 10]
        for ticket in tickets("u" * held):  # whoever has an answer asks again
            queue.add(ticket, running)
            arrived[ticket] = turn
    assert len(waits[False]) == 90
    assert max(waits[False]) <= 31, "32 slots that are free again after ten turns"
    assert max(waits[True]) <= 40, (
        "90 of them, with one slot of their own and a share of the others"
    )
    for urgent in (True, False):
        of_kind = [ticket for ticket in order if ticket.urgent == urgent]
        assert of_kind == sorted(of_kind, key=lambda t: list(arrived).index(t))


def test_waiting_urgent_rows_do_not_fill_the_queue_of_completions():
    """Each kind has a queue of its own."""
    queue = Queue(9, 5)
    urgent = tickets("u" * 7)
    for ticket in urgent[:6]:  # one more for the slot that is free
        queue.add(ticket, [])
    with pytest.raises(ApiError, match="6 requests are waiting"):
        queue.add(urgent[6], [])
    for ticket in tickets("a" * 5):
        queue.add(ticket, [])
    for ticket in tickets("a" * 8):
        queue.add(ticket, [])


def test_the_client_with_the_fewest_slots_is_first():
    queue = Queue(9, 50)
    first, second, third = tickets("aab", works=6)
    for ticket in (first, second, third):
        queue.add(ticket, [])
    running = []
    while found := queue.next(running):
        running.append(found[0])
    held = [running.count(ticket) for ticket in (first, second, third)]
    assert sum(held) == 8, "the last slot is for urgent works"
    assert held[2] == 4
    assert held[0] + held[1] == 4


def test_one_request_has_a_limited_number_of_slots():
    """Further choices wait, so that the next request does not have to."""
    queue, running = Queue(33, 5), []
    (many,) = tickets("a", works=100)
    queue.add(many, running)
    while found := queue.next(running):
        running.append(found[0])
    assert len(running) == 16
    (one,) = tickets("b")
    queue.add(one, running)
    assert queue.next(running)[0] is one


def test_many_predictions_do_not_delay_completions():
    """90 clients of /api/next held up requests of a few tokens for half a minute."""
    with running(slots=4) as server, ThreadPoolExecutor(30) as clients:
        over = threading.Event()

        def predict(number: int) -> None:
            with httpx.Client(base_url=server.url, timeout=30) as http:
                while not over.is_set():
                    http.post("/api/next", json={"text": "abc" * (number % 5)})

        asking = [clients.submit(predict, number) for number in range(30)]
        wait_until(lambda: server.scheduler.waiting > 5)
        began = time.monotonic()
        for _ in range(5):
            assert server.post(BODY).status_code == 200
        took = time.monotonic() - began
        over.set()
        for done in asking:
            done.result()
        assert took < 5.0
