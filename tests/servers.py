"""Servers for tests: tiny writers, a batch that waits for permits, uvicorn in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from starlette.testclient import TestClient

from mygpt import CharTokenizer, GPTConfig, Writer
from mygpt.server.app import make_app
from mygpt.server.scheduler import Scheduler
from mygpt.server.serving import Server, listen, make_server
from mygpt.server.settings import ServerSettings
from shapes import build

BODY = {"model": "mygpt", "prompt": "ab", "max_tokens": 6, "seed": 1}
JSON = {"content-type": "application/json"}
CHARS = CharTokenizer("abc\n")
SHAPE = {"embed_dim": 8, "num_heads": 2, "num_layers": 2, "max_seq_len": 16}


def tiny_writer(tokenizer=CHARS, kind: type[Writer] = Writer, **shape: int) -> Writer:
    config = GPTConfig(tokenizer.vocab_size, **(SHAPE | shape))
    return kind(build(config, 0, 0.3), tokenizer)


@contextlib.contextmanager
def client(writer: Writer | None = None, **settings: Any) -> Iterator[TestClient]:
    app = make_app(writer or tiny_writer(), ServerSettings(**settings))
    with TestClient(app, base_url="http://127.0.0.1:8000") as made:
        made.scheduler = app.state.scheduler
        yield made


class GatedBatch:
    """A batch that draws one token per permit, until the gate is opened for good.

    It raises `error`; a new batch raises it again only if `lasting`.
    """

    def __init__(self, batch) -> None:
        self.batch, self.size = batch, batch.size
        self.permits = threading.Semaphore(0)
        self.opened = self.lasting = False
        self.error: BaseException | None = None
        self.ended: list[int] = []

    def allow(self, tokens: int) -> None:
        self.permits.release(tokens)

    def open(self) -> None:
        self.opened = True
        self.permits.release()

    def advance(self, most: int, least: int | None = None) -> dict[int, list[int]]:
        if not self.opened:
            self.permits.acquire()
            time.sleep(0.011)  # so slow that the scheduler asks for one token at a time
        if self.error is not None:
            raise self.error
        assert self.opened or (least or most) == 1
        return self.batch.advance(least or most if not self.opened else most, least)

    def end(self, slot: int) -> None:
        self.ended.append(slot)
        self.batch.end(slot)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batch, name)


class GatedWriter(Writer):
    gate: GatedBatch | None = None

    def open_batch(self, size: int):
        before, self.gate = self.gate, GatedBatch(super().open_batch(size))
        if before is not None:  # the batch before this one failed
            self.gate.opened, self.gate.lasting = before.opened, before.lasting
            self.gate.error = before.error if before.lasting else None
        return self.gate


@dataclass
class Running:
    url: str
    port: int
    scheduler: Scheduler
    server: Server
    thread: threading.Thread

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=10, **options)

    def post(self, body: Any, path: str = "/v1/completions", **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=30, **options)


@contextlib.contextmanager
def running(writer: Writer | None = None, **settings: Any) -> Iterator[Running]:
    """uvicorn in a thread, on a free port."""
    settings.setdefault("shutdown_limit_s", 5.0)
    bound = listen("127.0.0.1", 0)
    started = threading.Event()
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        started.set()

    writer = writer or tiny_writer()
    server = make_server(writer, ServerSettings(**settings), bound, report)
    port = bound.getsockname()[1]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
    thread.start()
    try:
        assert started.wait(10)
        name = settings.get("name", "mygpt")
        assert lines == [f"serving {name} at http://127.0.0.1:{port} (Ctrl-C ends)"]
        yield Running(f"http://127.0.0.1:{port}", port, server.scheduler, server, thread)
    finally:
        if isinstance(writer, GatedWriter):
            writer.gate.open()
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive(), "the server did not end"


def wait_until(true, seconds: float = 5.0) -> None:
    """Wait until `true()`, which other threads make true."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"not true after {seconds} s"
        time.sleep(0.005)


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
