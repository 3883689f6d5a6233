"""Clients that misbehave: `python -m torture.odd_clients NAME PORT`.

Each is a function of the server's port, and runs until it is killed.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

MODEL = "odd"  # the served model's id
_MEGABYTE = 10**6
_WORDS = "all the world is a stage and all the men and women merely players \n"


def post(path: str, content: Any) -> bytes:
    """A request with a JSON body."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def completion(**options: Any) -> bytes:
    """A request for a completion."""
    content = {"model": MODEL, "prompt": "the sea", "seed": 1, "overflow": "refill"}
    return post("/v1/completions", content | options)


def connect(port: int, buffer: int = 0) -> socket.socket:
    """A connection, with a receive buffer of that size unless it is 0."""
    sock = socket.socket()
    if buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.settimeout(60)
    sock.connect(("127.0.0.1", port))
    return sock


def read_answer(sock: socket.socket) -> bytes:
    """The head of an answer with a Content-Length, whose body is read; else what came."""
    found = b""
    while b"\r\n\r\n" not in found:
        data = sock.recv(65536)
        if not data:
            return found
        found += data
    head, _, body = found.partition(b"\r\n\r\n")
    length = next(
        (int(line[15:]) for line in head.split(b"\r\n") if line[:15].lower() == b"content-length:"),
        0,
    )
    while len(body) < length and (data := sock.recv(2**20)):
        body += data
    return head


def repeat(count: int, session: Callable[[int], None]) -> None:
    """`count` threads that repeat a session without end; a failed one is restarted."""

    def run(number: int) -> None:
        while True:
            try:
                session(number)
            except OSError:
                time.sleep(0.05)

    for number in range(count):
        threading.Thread(target=run, args=(number,), daemon=True).start()
    threading.Event().wait()


def asking(count: int, requests: Callable[[int], list[bytes]]) -> Callable[[int], None]:
    """Clients that send one request after another, over one connection each."""

    def odd(port: int) -> None:
        def session(number: int) -> None:
            with connect(port) as sock:
                for request in requests(number) * 50:
                    sock.sendall(request)
                    if b" 429 " in read_answer(sock):
                        time.sleep(0.1)

        repeat(count, session)

    return odd


def pipelining(port: int) -> None:
    """30 that send a long request, begin another, and disconnect."""

    def session(number: int) -> None:
        with connect(port) as sock:
            request = completion(max_tokens=4096, stream=number % 2 == 0)
            sock.sendall(request)
            time.sleep(0.2)
            sock.sendall(request + request[:60])
            time.sleep(0.2)

    repeat(30, session)


def idling(port: int) -> None:
    """300 connections that send nothing."""

    def session(number: int) -> None:
        with connect(port) as sock:
            sock.recv(1)
            time.sleep(0.2)

    repeat(300, session)


def dripping(port: int) -> None:
    """100 that send their requests byte by byte."""

    def session(number: int) -> None:
        with connect(port) as sock:
            for byte in completion():
                sock.sendall(bytes([byte]))
                time.sleep(0.5)

    repeat(100, session)


def slow(port: int) -> None:
    """24 that read a long answer slowly but steadily."""

    def session(number: int) -> None:
        with connect(port, 4096) as sock:
            sock.sendall(completion(max_tokens=4096, n=4, logprobs=5, stream=number % 2 == 0))
            while sock.recv(1024):
                time.sleep(0.5)

    repeat(24, session)


def not_reading(port: int) -> None:
    """24 that send requests without end and read no answer."""

    def session(number: int) -> None:
        with connect(port, 4096) as sock:
            sock.settimeout(1.0)
            with contextlib.suppress(TimeoutError):
                while True:
                    sock.sendall(completion(max_tokens=200, logprobs=5))
            time.sleep(5)

    repeat(24, session)


def leaving(port: int) -> None:
    """50 that disconnect at a random moment, while queued or while answered."""
    rng = random.Random(0)

    def session(number: int) -> None:
        with connect(port) as sock:
            sock.sendall(completion(max_tokens=4096, n=1 + number % 3, stream=number % 4 > 0))
            time.sleep(rng.random() * 0.2)

    repeat(50, session)


def _text(size: int) -> str:
    return (_WORDS * (size // len(_WORDS) + 1))[:size]


def _large_texts(number: int) -> list[bytes]:
    text = _text(_MEGABYTE if number % 2 else _MEGABYTE // 4)
    body = {"model": MODEL, "prompt": text}
    return [
        post("/v1/completions", body),
        post("/api/next", {"text": text}),
        post("/api/attention", {"text": text}),
    ]


def _large_json(number: int) -> list[bytes]:
    ids = b'{"model": "odd", "prompt": [' + b",".join([b"1"] * 400_000) + b"]}"
    numbers = b'{"model": "odd", "stop": [' + b",".join([b"1.5e3"] * 150_000) + b"]}"
    fields = {f"field{n}": n for n in range(60_000)}
    objects = {"model": MODEL, "prompt": [[{"a": {}}] for _ in range(60_000)]}
    return [
        post("/v1/completions", content)
        for content in (ids, numbers, fields, objects, b"[" * 10**6)
    ]


# The clients by name.
CLIENTS: dict[str, Callable[[int], None]] = {
    "predictions": asking(
        90, lambda number: [post("/api/next", {"text": "the sea " * (number % 9)})]
    ),
    "large texts": asking(6, _large_texts),
    "large JSON": asking(6, _large_json),
    "large answers": asking(4, lambda _: [completion(n=16, max_tokens=2048, logprobs=5)]),
    "attention": asking(16, lambda _: [post("/api/attention", {"text": _text(2000)})]),
    "scored prompts": asking(
        16,
        lambda _: [completion(prompt=_text(8000), echo=True, logprobs=5, max_tokens=0)],
    ),
    "pipelined and gone": pipelining,
    "idle connections": idling,
    "dripping requests": dripping,
    "slow readers": slow,
    "clients that read nothing": not_reading,
    "leaving clients": leaving,
}


if __name__ == "__main__":
    CLIENTS[sys.argv[1]](int(sys.argv[2]))
