"""The server's limits: no blocking, bounded memory, no access for other sites, no lost requests."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import itertools
import json
import logging
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import typer

from mygpt import BPETokenizer, CharTokenizer, Writer, save_checkpoint
from mygpt.cli.serve import serve
from mygpt.engines.contract import Request
from mygpt.errors import InputError
from mygpt.server.bodies import free_memory, grouped, json_pieces
from mygpt.server.completions import encode
from mygpt.server.guards import host_name
from mygpt.server.log import NonBlockingStream, RateLimit
from mygpt.server.problems import ApiError, to_json
from mygpt.server.samples import Sample
from mygpt.server.serving import ServerDied, connections_within, listen
from mygpt.server.serving import serve as serve_writer
from mygpt.server.settings import ServerSettings
from mygpt.server.tickets import Queue, Ticket
from paths import SOURCES
from servers import CHARS, GatedWriter, client, running, tiny_writer, wait_until

pytestmark = pytest.mark.processes

BODY = {"model": "mygpt", "prompt": "ab", "max_tokens": 6, "seed": 1}
JSON = {"content-type": "application/json"}


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def request_bytes(body: dict, path: str = "/v1/completions") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content


def read_all(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


# --- who may ask ---------------------------------------------------------------------------


def test_all_routes_but_the_pages_need_the_key():
    with client(api_key="pass wörd") as api:
        good = {"authorization": "Bearer pass wörd".encode()}
        routes = [
            *(("GET", path) for path in ("/health", "/v1/models", "/v1/models/x", "/openapi.json")),
            *(("GET", path) for path in ("/api/model", "/nothing")),
            *(("POST", path) for path in ("/v1/completions", "/api/next", "/api/attention")),
            ("POST", "/v1/chat/completions"),
        ]
        for method, path in routes:
            for header in (None, b"Bearer wrong", b"Basic cGFzcw==", b"", b"Bearer", b"\xff\xfe"):
                answer = api.request(
                    method, path, headers={} if header is None else {"authorization": header}
                )
                assert answer.status_code == 401, (path, header)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"
            assert api.request(method, path, headers=good).status_code != 401
        for path in ("/", "/static/none.js"):
            assert api.get(path).status_code in (200, 404)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:99", 200),
        ("[::1]:8000", 200),
        ("box.lan", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("localhost:8000@evil.example", 400),
        ("evil.example#localhost", 400),
        ("192.168.1.5", 403),
        ("localhost:port", 400),
        ("", 400),
    ],
)
def test_only_the_servers_own_host_names_are_accepted(host, status):
    """Another site's name that resolves to this machine (DNS rebinding) is refused."""
    with client(hosts=("box.lan",)) as api:
        assert api.get("/health", headers={"host": host}).status_code == status


def test_a_server_on_all_addresses_accepts_any_address_and_no_other_name():
    with client(any_address=True) as api:
        assert api.get("/health", headers={"host": "192.168.1.5:8000"}).status_code == 200
        assert api.get("/health", headers={"host": "evil.example"}).status_code == 403


def test_host_names():
    assert host_name("Box.LAN.:80") == "box.lan"
    assert host_name("[::1]") == "::1"
    for wrong in ("a/b", "a b:1:2", "user@box", "box:99999", "[::1"):
        assert host_name(wrong) == ""


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8000", 200),
        ("https://127.0.0.1:8000", 200),
        ("http://127.0.0.1:9000", 403),
        ("http://evil.example", 403),
        ("null", 403),
        ("file://127.0.0.1:8000", 403),
        ("", 403),
    ],
)
def test_pages_of_other_sites_are_refused(origin, status):
    with client() as api:
        for method, path in (("GET", "/health"), ("POST", "/v1/completions"), ("OPTIONS", "/")):
            wanted = 405 if method == "OPTIONS" and status == 200 else status
            answer = api.request(
                method, path, headers={"origin": origin}, json=BODY if method == "POST" else None
            )
            assert answer.status_code == wanted
            assert "access-control-allow-origin" not in answer.headers


# --- how much ------------------------------------------------------------------------------


def test_bodies_over_the_limit_are_refused_with_and_without_content_length():
    """By Content-Length before a byte is read, and by counting where there is none."""
    with client(max_body_bytes=1000) as api:
        fits = json.dumps(BODY).encode().ljust(1000)
        assert api.post("/v1/completions", content=fits, headers=JSON).status_code == 200
        for content in (fits + b" ", iter([fits, b" "])):
            answer = api.post("/v1/completions", content=content, headers=JSON)
            assert answer.status_code == 413
            assert "1,000 bytes" in answer.json()["error"]["message"]
            assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_refused_body_does_not_keep_its_connection():
    with running(max_body_bytes=1000) as server, connect(server.port) as connection:
        head = b"POST /api/next HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000000\r\n\r\n"
        connection.sendall(head)
        assert read_all(connection).startswith(b"HTTP/1.1 413")


def test_a_full_queue_is_an_error_with_the_time_to_retry():
    """Two run, two wait, the fifth is refused; then all four are answered."""
    writer = tiny_writer(kind=GatedWriter)
    with running(writer, slots=2, max_waiting=2) as server, ThreadPoolExecutor(4) as clients:
        answers = []
        for running_now, waiting in ((1, 0), (1, 1), (2, 1), (2, 2)):
            answers.append(clients.submit(server.post, BODY))
            wait_until(lambda n=running_now: server.scheduler.running == n)
            wait_until(lambda n=waiting: server.scheduler.waiting == n)
            if (running_now, waiting) == (1, 1):
                writer.gate.allow(1)  # between tokens the second joins
                wait_until(lambda: server.scheduler.running == 2)
        refused = server.post(BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        writer.gate.open()
        assert {answer.result().status_code for answer in answers} == {200}
        assert len({answer.result().json()["choices"][0]["text"] for answer in answers}) == 1


@pytest.mark.parametrize("key", [" abc", "abc ", "a\nb", "a\udcffb"])
def test_a_key_that_no_header_can_have_is_refused(key):
    with pytest.raises(InputError, match="API key"):
        ServerSettings(api_key=key)


@pytest.mark.parametrize("name", ["slots", "max_waiting", "request_limit_s", "api_key", "name"])
def test_impossible_settings_are_refused(name):
    with pytest.raises(InputError, match=name.replace("api_key", "API key")):
        ServerSettings(**{name: "" if name in ("api_key", "name") else 0})


# --- how long ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        b"",
        b"G",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
        b"POST /api/next HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 9\r\n\r\n{",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea",
    ],
    ids=["nothing", "a byte", "no end of headers", "half a body", "half a second request"],
)
def test_incomplete_requests_time_out(part, caplog):
    """uvicorn alone waits for ever; others are answered meanwhile."""
    with running(request_limit_s=0.4) as server:
        began = time.monotonic()
        connections = [connect(server.port) for _ in range(30)]
        for connection in connections:
            connection.sendall(part)
        assert server.get("/health").status_code == 200
        for connection in connections:
            found = read_all(connection)
            if part and b"\r\n\r\nGET" not in part:
                assert b"HTTP/1.1 408" in found
                assert b'"error"' in found
            connection.close()
        assert 0.3 < time.monotonic() - began < 3.0
        assert not server.server.server_state.connections
    assert not caplog.records, "it is nothing that the log need know"


def test_a_request_that_arrives_slowly_times_out():
    """The limit is from the first byte, not from the last one."""
    with running(request_limit_s=0.5) as server, connect(server.port) as connection:
        began = time.monotonic()
        found = b""
        connection.settimeout(0.02)
        for byte in request_bytes(BODY):
            connection.sendall(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                found = connection.recv(65536)
            if found:
                break
        assert found.startswith(b"HTTP/1.1 408")
        assert 0.4 < time.monotonic() - began < 2.0


def test_the_time_limit_starts_again_for_each_request_of_a_connection():
    """A connection that is used lives on past the limit; the answer's time is not the client's."""
    writer = tiny_writer(kind=GatedWriter)
    with running(writer, request_limit_s=0.4) as server, httpx.Client(base_url=server.url) as http:
        timer = threading.Timer(1.0, writer.gate.open)
        timer.start()
        assert http.post("/v1/completions", json=BODY).status_code == 200
        before = set(server.server.server_state.connections)
        for _ in range(4):
            time.sleep(0.2)
            assert http.get("/health").status_code == 200
        assert set(server.server.server_state.connections) == before


def test_an_incomplete_second_request_times_out():
    """The limit starts with its first byte; an idle connection is closed without an error."""
    with running(request_limit_s=0.4) as server, connect(server.port) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        time.sleep(0.8)
        connection.sendall(b"GET /hea")
        began = time.monotonic()
        assert b"HTTP/1.1 408" in read_all(connection)
        assert 0.3 < time.monotonic() - began < 2.0


def test_idle_connections_are_closed():
    with running(idle_limit_s=1.0) as server, connect(server.port) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_a_client_that_reads_nothing_is_disconnected():
    """Its response does not accumulate in memory, and its slot becomes free."""
    with running(write_limit_s=0.4, max_tokens=10**6) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        body = BODY | {"max_tokens": 10**6, "stream": True, "logprobs": 5}
        connection.sendall(request_bytes(body))
        wait_until(lambda: server.scheduler.running == 1)
        wait_until(lambda: server.scheduler.running == 0, 20)
        assert not server.server.server_state.connections


def test_with_too_many_connections_the_oldest_idle_one_is_closed():
    with running(max_connections=5) as server:
        idle = [connect(server.port) for _ in range(5)]
        wait_until(lambda: len(server.server.server_state.connections) == 5)
        began = time.monotonic()
        assert server.get("/health").status_code == 200
        assert b" 408 " in read_all(idle[0])
        assert time.monotonic() - began < 2.0, "that was the time limit's work"
        for connection in idle:
            connection.close()


def test_if_all_connections_are_busy_more_are_refused():
    writer = tiny_writer(kind=GatedWriter)
    with running(writer, max_connections=2) as server, ThreadPoolExecutor(2) as clients:
        answers = [clients.submit(server.post, BODY) for _ in range(2)]
        wait_until(lambda: server.scheduler.running + server.scheduler.waiting == 2)
        assert server.get("/health").status_code == 503
        writer.gate.open()
        assert {answer.result().status_code for answer in answers} == {200}


def test_bytes_that_are_not_http_get_an_error_in_json():
    with running() as server, connect(server.port) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        found = read_all(connection)
        assert found.startswith(b"HTTP/1.1 400")
        assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["message"]


# --- clients that go -----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_slot(stream):
    """Its row ends before the next token; the other row continues."""
    writer = tiny_writer(kind=GatedWriter)
    with running(writer, slots=2) as server, ThreadPoolExecutor(1) as clients:
        other = clients.submit(server.post, BODY)
        wait_until(lambda: server.scheduler.running == 1)
        with connect(server.port) as connection:
            body = BODY | {"max_tokens": 4000, "stream": stream}
            connection.sendall(request_bytes(body))
            wait_until(lambda: server.scheduler.waiting == 1)
            writer.gate.allow(3)
            wait_until(lambda: server.scheduler.running == 2)
            if stream:
                assert b"text" in connection.recv(65536)
        wait_until(lambda: len(server.server.server_state.connections) == 1)
        writer.gate.allow(1)
        wait_until(lambda: server.scheduler.running == 1)
        writer.gate.open()
        assert other.result().json()["usage"]["completion_tokens"] == 6


def test_a_client_that_disconnects_while_it_waits_leaves_the_queue():
    writer = tiny_writer(kind=GatedWriter)
    with running(writer, slots=1) as server, ThreadPoolExecutor(1) as clients:
        first = clients.submit(server.post, BODY)
        wait_until(lambda: server.scheduler.running == 1)
        with connect(server.port) as connection:
            connection.sendall(request_bytes(BODY))
            wait_until(lambda: server.scheduler.waiting == 1)
        wait_until(lambda: server.scheduler.waiting == 0)
        writer.gate.open()
        assert first.result().status_code == 200
        assert len(writer.gate.ended) == 1, "the one that went never took the slot"


def test_after_many_disconnects_the_batch_is_empty():
    """At random tokens, streaming or not, waiting or running."""
    rng = random.Random(0)
    with running(slots=4, max_tokens=10**6) as server:

        def go(number: int) -> None:
            with connect(server.port) as connection:
                body = BODY | {"max_tokens": 10**6, "n": 1 + number % 3}
                connection.sendall(request_bytes(body | {"stream": number % 4 > 0}))
                if number % 4:
                    for _ in range(rng.randrange(4)):
                        connection.recv(rng.randrange(1, 5000))

        with ThreadPoolExecutor(8) as clients:
            list(clients.map(go, range(100)))
        wait_until(lambda: server.scheduler.running == server.scheduler.waiting == 0, 10)
        assert server.scheduler._batch.active == 0
        assert server.post(BODY).status_code == 200


# --- shares --------------------------------------------------------------------------------


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


# --- the event loop ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", BODY | {"prompt": "ab" * 4000}),
        ("/v1/completions", BODY | {"prompt": [0, 1] * 4000}),
        ("/api/next", {"text": "ab" * 4000}),
        ("/api/attention", {"ids": [0] * 4000}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_large_bodies_are_parsed_in_a_thread(path, body, monkeypatch):
    """A text of a megabyte blocked all streams while it was encoded."""
    held = threading.Event()

    def slow(*args):
        assert held.wait(10)
        return encode(*args)

    monkeypatch.setattr("mygpt.server.completions.encode", slow)
    monkeypatch.setattr("mygpt.server.playground.encode", slow)
    with running() as server, ThreadPoolExecutor(2) as clients:
        large = [clients.submit(server.post, body, path) for _ in range(2)]
        time.sleep(0.05)
        with pytest.raises(TimeoutError):
            large[0].result(0.1)
        assert server.get("/health").status_code == 200
        held.set()
        assert {answer.result().status_code for answer in large} == {200}


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        (
            "/v1/completions",
            BODY | {"n": 16, "max_tokens": 200, "logprobs": 1},
            "mygpt.server.completions.choice_of",
        ),
        (
            "/v1/completions",
            BODY | {"prompt": "ab", "echo": True, "logprobs": 1},
            "mygpt.server.completions.choice_of",
        ),
        ("/api/next", {"ids": [0] * 3000}, "mygpt.server.playground.logits_content"),
        ("/api/attention", {"ids": [0] * 16}, "mygpt.server.playground.json_pieces"),
    ],
    ids=["many tokens", "a scored prompt", "a long text", "attention"],
)
def test_large_responses_are_built_in_a_thread(path, body, place, monkeypatch):
    held = threading.Event()
    module, _, name = place.rpartition(".")
    inner = getattr(sys.modules[module], name)

    def slow(*args):
        assert held.wait(10)
        return inner(*args)

    monkeypatch.setattr(place, slow)
    with running() as server, ThreadPoolExecutor(1) as clients:
        large = clients.submit(server.post, body, path)
        with pytest.raises(TimeoutError):
            large.result(0.3)
        assert server.get("/health").status_code == 200
        held.set()
        answer = large.result()
        assert answer.status_code == 200
        assert answer.headers["content-length"] == str(len(answer.content))
        assert answer.json()


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"a": [], "b": {}, "c": None},
        {"a": list(range(1000)), "b": [{"c": [0.5] * 600}, {"d": "e\u00e9"}], "f": [[1, [2]], 3]},
        [{"g": n} for n in range(700)],
        "text",
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_in_pieces_equals_the_json_in_one(content):
    assert b"".join(json_pieces(content)) == to_json(content)
    assert b"".join(grouped(json_pieces(content))) == to_json(content)


def test_no_piece_of_json_takes_long():
    entries = [{f"token {k}": -0.5 for k in range(5)} for _ in range(4096)]
    content = {"choices": [{"text": "a", "logprobs": {"top": entries}} for _ in range(4)]}
    assert max(map(len, json_pieces(content))) < 40_000
    assert max(map(len, grouped(json_pieces(content)))) < 2**17


def test_a_text_that_is_too_long_is_not_encoded_to_its_end(monkeypatch):
    """Characters are counted, BPE stops at the limit, and imported tokenizers limit characters."""
    settings = ServerSettings(max_prompt_tokens=100)
    seen = []

    def counted(self, pieces):
        for piece in pieces:
            seen.append(len(piece))
            yield np.zeros(len(piece) // 4, np.int64)

    bpe = BPETokenizer.train(["abc ab " * 50], 270)
    monkeypatch.setattr(BPETokenizer, "encode_pieces", counted)
    monkeypatch.setattr(CharTokenizer, "encode_pieces", counted)
    monkeypatch.setattr("mygpt.server.completions._CHARACTERS_PER_TOKEN", 10**6)
    for tokenizer in (CHARS, bpe):
        with pytest.raises(ApiError, match="more than the limit of 100: shorten it"):
            encode(tiny_writer(tokenizer), "ab" * 10**6, settings, "prompt")
    assert seen == [2**14]
    monkeypatch.undo()
    with pytest.raises(ApiError, match="2000 characters, more than the 1600 that 100 tokens"):
        encode(tiny_writer(bpe), "ab" * 1000, settings, "prompt")
    found = encode(tiny_writer(bpe), "abc ab " * 20, settings, "prompt")
    assert found.ids.tolist() == bpe.encode_array("abc ab " * 20).tolist()


def test_the_memory_of_large_bodies_is_freed(monkeypatch):
    """Once for many of them, and soon: the C library kept 150 MB after a text of one megabyte."""
    given = []
    monkeypatch.setattr("mygpt.server.bodies.free_memory", lambda: given.append(1))
    monkeypatch.setattr("mygpt.server.bodies._FREE_AFTER_S", 0.5)
    with running() as server:
        for _ in range(3):
            assert server.post(BODY | {"prompt": "a" * 2**18}).status_code == 400
        wait_until(lambda: given)
    assert len(given) < 3
    monkeypatch.undo()
    free_memory()


# --- clients that are odd ------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_after_a_second_request_frees_its_slot(stream):
    """uvicorn stopped reading at the second request, and did not notice the disconnect."""
    writer = tiny_writer(kind=GatedWriter)
    with running(writer, slots=4) as server:
        with contextlib.ExitStack() as clients:
            body = request_bytes(BODY | {"max_tokens": 4000, "stream": stream})
            for more in (body, body[:20], body * 5):
                connection = clients.enter_context(connect(server.port))
                connection.sendall(body)
                count = server.scheduler.running + server.scheduler.waiting
                time.sleep(0.05)
                connection.sendall(more)
                assert count < 4
            wait_until(lambda: server.scheduler.running + server.scheduler.waiting == 3)
            time.sleep(0.1)
        wait_until(lambda: not server.server.server_state.connections)
        writer.gate.open()
        wait_until(lambda: server.scheduler.running + server.scheduler.waiting == 0)


def test_pipelined_requests_are_all_answered():
    """More than a buffer of them; above a limit the connection is closed."""
    with running() as server:
        with connect(server.port) as connection:
            connection.sendall(request_bytes(BODY) * 300)
            found = b""
            while found.count(b"HTTP/1.1 200") < 300:
                found += connection.recv(2**20)
        writer = tiny_writer(kind=GatedWriter)
    with running(writer, max_body_bytes=1000) as server, connect(server.port) as connection:
        connection.sendall(request_bytes(BODY))
        wait_until(lambda: server.scheduler.running == 1)
        with contextlib.suppress(OSError):
            for _ in range(1000):
                connection.sendall(request_bytes(BODY))
        wait_until(lambda: not server.server.server_state.connections)
        writer.gate.open()
        wait_until(lambda: server.scheduler.running == 0)


@pytest.mark.parametrize("size", [100, 10**6])
def test_a_client_that_reads_too_slowly_is_disconnected(size):
    """It kept reading a little, so that no limit on idle time applied."""
    with running(write_limit_s=0.4, max_tokens=10**6) as server:
        for listener in server.server.servers:  # a small buffer is full soon
            listener.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        with connection:
            body = BODY | {"max_tokens": 10**6, "stream": True, "logprobs": 5}
            connection.sendall(request_bytes(body))
            began = time.monotonic()
            with contextlib.suppress(OSError):
                while time.monotonic() - began < (15 if size == 100 else 2):
                    if not connection.recv(size) or not server.server.server_state.connections:
                        break
                    time.sleep(0.05 if size == 100 else 0)
            gone = not server.server.server_state.connections
            assert gone == (size == 100), "who reads fast enough stays"


@pytest.mark.parametrize("gone", [False, True])
def test_the_memory_of_large_responses_is_freed(gone, monkeypatch):
    """Also of those that a client did not wait for: the server kept a hundred megabytes."""
    given = []
    monkeypatch.setattr("mygpt.server.bodies.free_memory", lambda: given.append(1))
    monkeypatch.setattr("mygpt.server.bodies._FREE_AFTER_S", 0.05)
    body = {"model": "mygpt", "prompt": "ab", "n": 9, "max_tokens": 300, "logprobs": 2}
    with running() as server, httpx.Client(base_url=server.url) as http:
        with contextlib.suppress(httpx.TimeoutException):
            http.post("/v1/completions", json=body, timeout=0.02 if gone else 60)
        wait_until(lambda: given)


def test_a_full_collection_of_garbage_is_rare_while_serving(monkeypatch):
    """It blocked /health for 0.2 s after large responses had created a million objects."""
    seen = []
    monkeypatch.setattr("asyncio.run", lambda work: (work.close(), seen.append(gc.get_threshold())))
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    serve_writer(tiny_writer(), ServerSettings(), port=0, notify=str)
    assert seen[0][:2] == before[:2]
    assert seen[0][2] > 100
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, frozen), "as it was"


def test_log_lines_that_are_not_read_are_dropped_and_counted():
    """A full pipe behind standard error stopped every request, and SIGTERM too."""
    reading, writing = os.pipe()
    stream = NonBlockingStream(writing, "ascii")
    began = time.monotonic()
    for number in range(50_000):
        print(f"line {number} of a log, with an é", file=stream, flush=True)
    assert time.monotonic() - began < 5.0
    found = b""
    with open(reading, "rb", buffering=0) as pipe:
        while b"dropped" not in found:
            found += pipe.read(2**20)
        lines = found.decode().splitlines()
        assert lines[0] == "line 0 of a log, with an \\xe9"
        dropped = int(lines[-1].split()[0][1:].replace(",", ""))
        assert len(lines) - 1 + dropped == 50_000
        print("again", file=stream)
        assert pipe.read(100) == b"again\n"
        stream.end()
        os.close(writing)


def test_an_error_that_repeats_is_logged_a_few_times(caplog):
    """44 megabytes of tracebacks came from one limit that was reached."""
    logger = logging.getLogger("mygpt.server.repeats")
    logger.addFilter(RateLimit())
    for _ in range(100):
        logger.error("too many")
    assert len(caplog.records) == 5


# --- ends ----------------------------------------------------------------------------------


class Panic(BaseException):
    """Like a panic of a Rust library: not an Exception."""


def test_if_the_batch_fails_its_requests_end_and_the_next_ones_are_answered():
    """The decoding thread died with the first error, and every request after it got a 500."""
    writer = tiny_writer(kind=GatedWriter)
    with running(writer, slots=1) as server, ThreadPoolExecutor(2) as clients:
        first = clients.submit(server.post, BODY)
        wait_until(lambda: server.scheduler.running == 1)
        second = clients.submit(server.post, BODY)
        wait_until(lambda: server.scheduler.waiting == 1)
        writer.gate.error = Panic("made up")
        writer.gate.open()
        assert first.result().status_code == 500
        assert first.result().json()["error"]["code"] == "worker_died"
        assert "made up" not in first.result().text
        assert second.result().status_code == server.post(BODY).status_code == 200
        health = server.get("/health")
        assert (health.status_code, health.json()["restarts"]) == (200, 1)


def test_if_no_batch_can_be_opened_all_requests_get_an_error_and_the_server_ends(monkeypatch):
    """Running, waiting and later requests get a 500, /health a 503, and the server ends."""
    monkeypatch.setattr("mygpt.server.scheduler._PAUSES_S", (0.01, 0.01))
    writer = tiny_writer(kind=GatedWriter)
    with running(writer, slots=1) as server, ThreadPoolExecutor(2) as clients:
        answers = [clients.submit(server.post, BODY) for _ in range(2)]
        wait_until(lambda: server.scheduler.waiting == 1)
        writer.gate.error, writer.gate.lasting = MemoryError("made up"), True
        writer.gate.open()
        found = [answer.result() for answer in answers] + [server.post(BODY)]
        for answer in found:
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "worker_died"
            assert "made up" not in answer.text
        health = server.get("/health")
        assert (health.status_code, health.json()["healthy"]) == (503, False)
        assert "could not be restarted" in health.json()["error"]["message"]
        server.thread.join(5)
        assert not server.thread.is_alive(), "a supervisor sees that it has ended"


def test_a_server_that_cannot_decode_ends_with_an_exit_code(monkeypatch):
    """1, and one line; not 0 as after Ctrl-C's clean end."""

    def died(*_, **__):
        raise ServerDied("made up")

    monkeypatch.setattr("mygpt.server.serving.serve", died)
    monkeypatch.setattr("mygpt.generation.writer.load", lambda *_, **__: tiny_writer())
    monkeypatch.setattr("mygpt.checkpoint.resolve", lambda path: Path("a/best.safetensors"))
    with pytest.raises(typer.Exit) as ended:
        serve(None)
    assert ended.value.exit_code == 1


def test_any_exception_of_one_row_ends_only_its_request(monkeypatch):
    """A library's panic in the decoding thread ended the server for all requests."""
    writer = tiny_writer()
    kind = type(writer.open_batch(1))
    places = [(kind, "join"), (kind, "logits")]
    places += [(Sample, name) for name in ("take", "update", "finish")]
    odd = {  # by seed
        100 + number: (owner, name, error)
        for number, ((owner, name), error) in enumerate(
            itertools.product(places, (Panic, MemoryError, ValueError, SystemExit))
        )
    }

    def seed_of(subject, *args):
        if isinstance(subject, Sample):
            return subject.request.stream.seed
        request = args[0] if isinstance(args[0], Request) else subject._requests[args[0]]
        return request.stream.seed

    def watched(owner, name):
        inner = getattr(owner, name)

        def call(*args):
            planned = odd.get(seed_of(*args))
            if planned is not None and planned[:2] == (owner, name):
                raise planned[2]("made up")
            return inner(*args)

        return call

    for owner, name in places:
        monkeypatch.setattr(owner, name, watched(owner, name))
    with running(writer) as server, ThreadPoolExecutor(3) as clients:
        good = [clients.submit(server.post, BODY | {"max_tokens": 4000}) for _ in range(3)]
        for seed, (_, name, error) in odd.items():
            answer = server.post(BODY | {"seed": seed, "logprobs": 0, "n": 2})
            assert answer.status_code == 500, (name, error)
            code = "out_of_memory" if error is MemoryError else "bug"
            assert answer.json()["error"]["code"] == code
        assert {answer.result().status_code for answer in good} == {200}
        assert server.get("/health").json()["restarts"] == 0
        wait_until(lambda: server.scheduler._batch.active == 0)


def test_a_panic_on_the_event_loop_is_a_500(monkeypatch):
    """For example while a prompt is encoded: the error has the API's form, and others succeed."""

    def panics(*_):
        raise Panic("made up")

    monkeypatch.setattr("mygpt.server.completions.encode", panics)
    with running() as server:
        for size in (1, 5000):
            answer = server.post(BODY | {"prompt": "a" * size})
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "bug"
        assert server.get("/health").status_code == 200


def test_one_request_does_not_block_all_others():
    """The page's predictions have a reserved slot; waiting requests share the others."""
    with running(slots=4, max_tokens=10**9) as server, ThreadPoolExecutor(1) as clients:
        long = BODY | {"max_tokens": 10**9, "n": 4, "stream": True}
        with connect(server.port) as first:
            first.sendall(request_bytes(long))
            wait_until(lambda: server.scheduler.running == 4)
            assert server.post({"text": "ab"}, "/api/next").status_code == 200
        wait_until(lambda: server.scheduler.running == 0)
        with connect(server.port) as first, connect(server.port) as second:
            first.sendall(request_bytes(long | {"n": 3}))
            wait_until(lambda: server.scheduler.running == 3)
            second.sendall(request_bytes(long))
            wait_until(lambda: server.scheduler.running == 4)
            third = clients.submit(server.post, BODY)
            wait_until(lambda: server.scheduler.waiting == 2)
            first.close()
            assert third.result().status_code == 200, "the second has three waiting, and its share"


@pytest.mark.parametrize("path", ["/v1/completions", "/api/attention"])
def test_a_forward_pass_of_a_disconnected_client_ends(path, monkeypatch):
    """The thread of forward passes was blocked for a client that had disconnected."""
    held, read = threading.Event(), Writer.read

    def slow(self, ids, shown=None):
        held.wait(5)
        return read(self, ids, shown)

    with running(max_prompt_tokens=10**5) as server:
        monkeypatch.setattr(Writer, "read", slow)
        body = BODY | {"prompt": "ab" * 500, "echo": True, "logprobs": 0, "overflow": "refill"}
        body = body if path.startswith("/v1") else {"ids": [0, 1]}
        with connect(server.port) as connection:
            connection.sendall(request_bytes(body, path))
            wait_until(lambda: server.server.server_state.connections)
            time.sleep(0.1)
        wait_until(lambda: not server.server.server_state.connections)
        monkeypatch.setattr(Writer, "read", read)
        held.set()
        began = time.monotonic()
        assert server.post({"ids": [0, 1]}, "/api/attention").status_code == 200
        assert time.monotonic() - began < 5


def test_logprobs_of_many_prompts_at_once_are_refused():
    with client(max_prompt_tokens=20) as api:
        body = BODY | {"prompt": ["ababab"] * 4, "echo": True, "logprobs": 1, "max_tokens": 0}
        answer = api.post("/v1/completions", json=body)
        assert answer.status_code == 400
        assert "24 prompt tokens are more than 20" in answer.json()["error"]["message"]


def test_echoes_of_a_long_prompt_have_a_limit_together():
    """A body of a megabyte with 128 choices led to a response of 128 megabytes."""
    with client(max_body_bytes=1000) as api:
        body = BODY | {"prompt": "ab" * 300, "echo": True, "max_tokens": 0}
        assert api.post("/v1/completions", json=body | {"n": 26}).status_code == 200
        answer = api.post("/v1/completions", json=body | {"n": 27})
        assert answer.status_code == 400
        assert "16200 echoed characters of prompts are more than 16000" in answer.text


@pytest.mark.parametrize(
    ("body", "message"),
    [('{"model": "mygpt", "model": "x"}', "'model' occurs twice"),
     ('{"max_tokens": ' + "1" * 5000 + "}", "5000 digits")],
)  # fmt: skip
def test_json_with_contradictory_fields_is_refused(body, message):
    with client() as api:
        answer = api.post("/v1/completions", content=body, headers=JSON)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]


def test_a_bug_is_a_500_without_its_traceback(monkeypatch, caplog):
    monkeypatch.setattr("mygpt.server.app.json_answer", lambda *_: 1 / 0)
    with running() as server:
        answer = server.get("/v1/models")
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert "division" not in answer.text
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "ZeroDivisionError" in caplog.text, "the log says more"


def test_a_shutdown_finishes_running_streams():
    """Running requests are finished; waiting and new ones get an error."""
    writer = tiny_writer(kind=GatedWriter)
    with running(writer, slots=2) as server, ThreadPoolExecutor(2) as clients:
        body = BODY | {"n": 3, "stream": True}  # one choice of it still waits for its slot
        streaming = clients.submit(server.post, body)
        wait_until(lambda: server.scheduler.running == 2)
        waiting = clients.submit(server.post, BODY)
        wait_until(lambda: server.scheduler.waiting == 2)
        server.server.should_exit = True
        assert waiting.result().status_code == 503
        assert waiting.result().json()["error"]["code"] == "shutting_down"
        with pytest.raises(httpx.ConnectError):
            server.get("/health")
        writer.gate.open()
        events = streaming.result().text.split("\n\n")
        assert events[-2] == "data: [DONE]"
        assert sum('"finish_reason":"length"' in event for event in events) == 3
        server.thread.join(5)
        assert not server.thread.is_alive()


def test_a_shutdown_does_not_wait_for_ever():
    """Shortly before the time limit, running requests get an error."""
    with running(shutdown_limit_s=2.0, max_tokens=10**9) as server, connect(server.port) as one:
        one.sendall(request_bytes(BODY | {"max_tokens": 10**9, "stream": True}))
        last = b""
        assert one.recv(1000)
        began = time.monotonic()
        server.server.should_exit = True
        while data := one.recv(65536):
            last = (last + data)[-1000:]
        assert b"shutting_down" in last
        assert b"[DONE]" in last
        server.thread.join(10)
        assert time.monotonic() - began < 4.0


def test_requests_are_logged_in_one_line_without_their_text():
    lines: list[str] = []
    with client(log=lines.append) as api:
        api.post("/v1/completions", json=BODY | {"prompt": "cab\ncab"})
        api.get("/no%1B%5B31mthing")
    assert len(lines) == 2
    assert lines[0].startswith("POST /v1/completions 200 ")
    assert lines[1].startswith("GET /no%1B%5B31mthing 404 ")


def test_a_port_in_use_is_an_error_with_the_remedy():
    with listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} is in use.*--port"):
            listen("127.0.0.1", port)
    with pytest.raises(InputError, match=r"host 'no\.such\.host\.invalid' cannot be resolved"):
        listen("no.such.host.invalid", 0)


def test_without_the_extra_the_error_names_how_to_install_it(monkeypatch):
    """Before the checkpoint is searched for, and in one line."""
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(InputError, match=r"pip install 'mygpt\[serve\]'"):
        serve(Path("no such run"))


@contextlib.contextmanager
def served(folder: Path, *options: str, **popen) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The command in a process of its own that serves a run called "poems"; and its URL."""
    run = folder / "poems"
    run.mkdir()
    save_checkpoint(run / "best.safetensors", tiny_writer().model, CHARS)
    code = "import sys; from mygpt.cli import main; main(['serve', *sys.argv[1:]])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run), "--port", "0", "--slots", "2", *options],
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(SOURCES)} | popen.pop("env", {}),
        bufsize=0,  # so that what is read stops at the end of a line
        **popen,
    )
    try:
        line = b""
        while not line.startswith(b"serving poems at http://127.0.0.1:"):
            line = process.stderr.readline()
            assert line
        yield process, line.split()[3].decode()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_a_run_and_ends_by_signal(tmp_path, number):
    """It reports its address; the model's id is the run folder's name; the key is in a variable."""
    with served(tmp_path, env={"MYGPT_API_KEY": "k"}) as (process, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        answer = httpx.post(
            f"{url}/v1/completions",
            json=BODY | {"model": "poems"},
            headers={"authorization": "Bearer k"},
            timeout=30,
        )
        expected = tiny_writer().complete("ab", 6, seed=1)[0].text
        assert answer.json()["choices"][0]["text"] == expected
        process.send_signal(number)
        rest = process.communicate(timeout=20)[1]
    assert b"POST /v1/completions 200" in rest
    assert b"Traceback" not in rest
    assert process.returncode == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once_and_quietly(tmp_path, number):
    """It printed the tracebacks of all running requests."""
    with served(tmp_path, "--max-tokens", "1000000000") as (process, url):
        with connect(int(url.rpartition(":")[2])) as connection:
            body = BODY | {"model": "poems", "max_tokens": 10**9, "stream": True}
            connection.sendall(request_bytes(body))
            assert connection.recv(100)
            process.send_signal(number)
            assert b"30 s" in process.stderr.readline()
            time.sleep(0.3)
            assert process.poll() is None, "what streams is to be finished"
            process.send_signal(number)
            began = time.monotonic()
            assert process.wait(5) == 128 + number
            assert time.monotonic() - began < 1.0
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.skipif(sys.platform != "linux", reason="it sets limits of Linux's")
def test_a_log_that_is_not_read_blocks_nothing(tmp_path):
    """A pipe of 64 KiB was full after 2,719 requests; then no request was answered any more."""
    with served(tmp_path) as (process, url):
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        with httpx.Client(base_url=url, timeout=5) as http:
            for _ in range(300):
                assert http.get("/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="it sets limits of Linux's")
def test_connections_are_limited_by_the_limit_of_open_files(tmp_path):
    """With more of them no connection could be accepted, and the log filled with tracebacks."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))

    with served(tmp_path, "--quiet", preexec_fn=limit) as (process, url):
        with contextlib.ExitStack() as idle:
            for _ in range(150):
                idle.enter_context(connect(int(url.rpartition(":")[2])))
            for _ in range(5):
                began = time.monotonic()
                assert httpx.get(f"{url}/health", timeout=5).status_code == 200
                assert time.monotonic() - began < 1.0
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=10)[1]
    assert b"Traceback" not in rest
    assert len(rest) < 1000


def test_the_limit_of_open_files_is_raised_as_far_as_permitted():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
        assert connections_within(300) == min(300, before[1] - 200)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 300
        assert connections_within(10) == 10
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
