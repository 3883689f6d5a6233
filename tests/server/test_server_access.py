"""Who may use the server, and how much: keys, host names, other sites, body and queue limits."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from mygpt.errors import InputError
from mygpt.server.guards import host_name
from mygpt.server.settings import ServerSettings
from servers import (
    BODY,
    JSON,
    GatedWriter,
    client,
    connect,
    read_all,
    running,
    tiny_writer,
    wait_until,
)

pytestmark = pytest.mark.processes


def test_all_routes_but_the_pages_need_the_key():
    with client(api_key="pass wörd") as api:
        good = {"authorization": "Bearer pass wörd".encode()}
        routes = [
            *(("GET", path) for path in ("/health", "/v1/models", "/v1/models/x", "/openapi.json")),
            *(("GET", path) for path in ("/api/model", "/nothing")),
            *(("POST", path) for path in ("/v1/completions", "/api/next", "/api/attention")),
            *(("POST", path) for path in ("/api/inside", "/v1/chat/completions")),
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
        for path in ("/", "/write", "/static/none.js"):
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
