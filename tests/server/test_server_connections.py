"""Connections: time limits, idle, slow and unread ones, clients that disconnect, pipelining."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from servers import (
    BODY,
    GatedWriter,
    connect,
    read_all,
    request_bytes,
    running,
    tiny_writer,
    wait_until,
)

pytestmark = pytest.mark.processes


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


@pytest.mark.parametrize(("size", "gone"), [(0, True), (100, True), (10**6, False)])
def test_a_client_that_reads_too_slowly_is_disconnected(size, gone):
    """Its response does not accumulate in memory, and its slot becomes free.

    One kept reading a little, so that no limit on idle time applied.
    """
    with running(write_limit_s=0.4, max_tokens=10**6) as server, socket.socket() as connection:
        for listener in server.server.servers:  # a small buffer is full soon
            listener.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        body = BODY | {"max_tokens": 10**6, "stream": True, "logprobs": 5}
        connection.sendall(request_bytes(body))
        wait_until(lambda: server.scheduler.running == 1)
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < (15 if gone else 2):
                if size and not connection.recv(size):
                    break
                if not server.server.server_state.connections:
                    break
                time.sleep(0.05 if gone else 0)
        assert (not server.server.server_state.connections) == gone, "who reads fast enough stays"
        if gone:
            wait_until(lambda: server.scheduler.running == 0)
