"""The server of a training's page: its files, who may use it, and readers that do not read."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from event_streams import updates_of
from mygpt.errors import InputError
from mygpt.server import live
from mygpt.server.live import LiveServer
from mygpt.server.problems import SAFE_HEADERS

FILES = {
    "/": ("text/html; charset=utf-8", b"<!doctype html>"),
    "/page.js": ("text/javascript", b"1"),
}


@pytest.fixture
def server() -> Iterator[LiveServer]:
    made = LiveServer(FILES, lambda: None)
    yield made
    made.close(0.0)


def port_of(server: LiveServer) -> int:
    return int(server.url.rpartition(":")[2])


def get(server: LiveServer, path: str = "/", method: str = "GET", **headers: str):
    connection = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=10)
    with contextlib.closing(connection):  # also if the server has ended
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        body = b"" if path == "/events" and response.status == 200 else response.read()
        response.close()
    return response, body


def wait_until(true, seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_it_serves_the_given_files_and_nothing_else(server):
    for path, (kind, content) in FILES.items():
        response, body = get(server, path)
        assert (response.status, body, response.headers["content-type"]) == (200, content, kind)
        for name, value in SAFE_HEADERS.items():
            assert response.headers[name] == value
    for path in (
        "/page",
        "/page.js/",
        "//page.js/..",
        "/../live.py",
        "/%2e%2e/live.py",
        "/events/",
    ):
        response, body = get(server, path)
        assert response.status == 404
        assert json.loads(body)["error"]["code"] == "not_found"
    response, body = get(server, "/events", method="POST")
    assert response.status == 501
    assert response.headers["content-security-policy"] == SAFE_HEADERS["Content-Security-Policy"]


@pytest.mark.parametrize("path", ["/", "/events"])
@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:99", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("localhost:8000@evil.example", 400),
        ("192.168.1.5", 403),
        ("", 400),
    ],
)
def test_only_loopback_names_are_accepted(server, path, host, status):
    """Another site's name that resolves to this machine (DNS rebinding) is refused."""
    response, body = get(server, path, host=host)
    assert response.status == status
    if status == 403:
        assert json.loads(body)["error"]["message"].endswith("call it by its address")


@pytest.mark.parametrize("path", ["/", "/events"])
def test_pages_of_other_sites_are_refused(server, path):
    own = server.url.removeprefix("http://")
    for origin, status in (
        (f"http://{own}", 200),
        ("http://127.0.0.1:1", 403),
        ("http://evil.example", 403),
        ("null", 403),
    ):
        response, _ = get(server, path, origin=origin)
        assert response.status == status
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    "headers",
    [b"", b"Host: localhost\r\nHost: localhost\r\n"],
    ids=["no host", "two hosts"],
)
def test_requests_without_one_host_are_refused(server, headers):
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n" + headers + b"\r\n")
        assert b" 400 " in connection.recv(65536).split(b"\r\n")[0]


def test_a_reader_gets_the_newest_update_and_the_last_one(server):
    """Updates that were replaced meanwhile are not sent."""
    server.updates.publish(b'{"n":1}')
    server.updates.publish(b'{"n":2}')
    with updates_of(server.url) as updates:
        assert next(updates) == ("message", {"n": 2})
        server.updates.publish(b'{"n":3}')
        assert next(updates) == ("message", {"n": 3})
        server.updates.publish(b'{"n":4}', last=True)
        assert list(updates) == [("end", {"n": 4})]
    with updates_of(server.url) as updates:
        assert list(updates) == [("end", {"n": 4})]


def test_a_reader_that_does_not_read_delays_nobody(server, monkeypatch):
    """Its connection is closed after a while; publishing and other readers do not wait for it."""
    monkeypatch.setattr(live.Handler, "timeout", 0.5)
    large = json.dumps("x" * 2**20).encode()
    with socket.create_connection(("127.0.0.1", port_of(server))) as stuck:
        stuck.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: server.updates.readers == 1)
        began = time.monotonic()
        for _ in range(50):
            server.updates.publish(large)
        assert time.monotonic() - began < 1.0
        with updates_of(server.url) as updates:
            assert next(updates)[1] == "x" * 2**20

        def one_reads() -> bool:
            server.updates.publish(large)  # fills the buffers of the connection
            return server.updates.readers == 0

        wait_until(one_reads, 20)


def test_readers_that_are_gone_are_noticed(server, monkeypatch):
    monkeypatch.setattr(live, "_ALIVE_S", 0.02)
    with updates_of(server.url):
        wait_until(lambda: server.updates.readers == 1)
    wait_until(lambda: server.updates.readers == 0)


def test_the_number_of_connections_is_limited(monkeypatch):
    monkeypatch.setattr(live, "_MOST_CONNECTIONS", 2)
    server = LiveServer(FILES, lambda: None)
    held = [socket.create_connection(("127.0.0.1", port_of(server)), timeout=10) for _ in range(3)]
    try:
        assert held[2].recv(1) == b""
        held[0].close()
        wait_until(lambda: _answers(server))
    finally:
        for connection in held:
            connection.close()
        server.close(0.0)


def _answers(server: LiveServer) -> bool:
    try:
        return get(server)[0].status == 200
    except (OSError, http.client.HTTPException):
        return False


def test_a_port_in_use_is_replaced_by_a_free_one(server, monkeypatch):
    monkeypatch.setattr(live, "PORT", port_of(server))
    other = LiveServer(FILES, lambda: None)
    assert port_of(other) not in (0, port_of(server))
    assert get(other)[0].status == 200
    other.close(0.0)


def test_a_machine_that_cannot_listen_is_reported_in_one_line(monkeypatch):
    monkeypatch.setattr(live, "HOST", "192.0.2.1")  # reserved for documentation
    with pytest.raises(InputError, match=r"no page can be served at 192\.0\.2\.1: .*: omit --open"):
        LiveServer(FILES, lambda: None)


def test_closing_lets_readers_receive_the_last_update(server):
    with updates_of(server.url) as updates:
        wait_until(lambda: server.updates.readers == 1)
        server.updates.publish(b"{}", last=True)
        server.close(10.0)
        assert server.updates.readers == 0
        assert list(updates) == [("end", {})]
    wait_until(lambda: not _answers(server))


@pytest.mark.slow
def test_it_needs_no_extra():
    """Neither Starlette nor uvicorn, which the extra `serve` installs."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['starlette', 'uvicorn', 'msgspec', 'h11']));"
        "from mygpt.server.live import LiveServer; print(LiveServer({}, print).url)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("http://127.0.0.1:"), done.stderr
