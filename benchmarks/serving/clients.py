"""Streaming clients of /v1/completions, all in one thread, with as little work as possible.

Received data is stored with its time and parsed afterwards, since the clients run on the same
machine as the servers.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from dataclasses import dataclass, field

_DONE = b"[DONE]"


@dataclass
class _Stream:
    """One client and the answer that it is reading."""

    sock: socket.socket
    parts: list[tuple[float, bytes]] = field(default_factory=list)
    tail: bytes = b""


@dataclass
class Load:
    """What the clients received.

    Attributes:
        tokens: number of characters; a token is one character here.
        seconds: duration.
        gaps_s: seconds from one piece of an answer's text to the next.
        answers: number of complete answers.
    """

    tokens: int = 0
    seconds: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    answers: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second, all clients together."""
        return self.tokens / self.seconds

    @property
    def p99_ms(self) -> float:
        """The 99th percentile of the gaps in milliseconds."""
        ranked = sorted(self.gaps_s)
        return 1000 * ranked[int(0.99 * (len(ranked) - 1))] if ranked else 0.0


def body(model: str, prompt: str, tokens: int) -> bytes:
    """A request for a streamed greedy completion of `tokens` tokens."""
    content = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
    }
    text = json.dumps(content).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    )
    return head.encode() + text


def load(port: int, requests: list[bytes], clients: int, seconds: float) -> Load:
    """Run `clients` clients, each with one request after the other, for `seconds`."""
    chooser = selectors.DefaultSelector()
    answers: list[list[tuple[float, bytes]]] = []
    number = 0

    def begin() -> None:
        nonlocal number
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(requests[number % len(requests)])
        number += 1
        chooser.register(sock, selectors.EVENT_READ, _Stream(sock))

    began = time.perf_counter()
    for _ in range(clients):
        begin()
    ends = began + seconds
    while time.perf_counter() < ends:
        for key, _ in chooser.select(timeout=0.1):
            stream: _Stream = key.data
            data = stream.sock.recv(65536)
            stream.parts.append((time.perf_counter(), data))
            if data and _DONE not in stream.tail + data:
                stream.tail = data[-len(_DONE) :]
                continue
            chooser.unregister(stream.sock)
            stream.sock.close()
            answers.append(stream.parts)
            begin()
    took = time.perf_counter() - began
    unfinished = [key.data for key in list(chooser.get_map().values())]
    for stream in unfinished:
        stream.sock.close()
    found = Load(seconds=took, answers=len(answers))
    for parts in [*answers, *(stream.parts for stream in unfinished)]:
        _count(parts, found)
    return found


def _count(parts: list[tuple[float, bytes]], found: Load) -> None:
    """Add the characters of an answer, and the times between its pieces of text."""
    text, last = b"", None
    if parts and parts[0][1]:
        assert parts[0][1].startswith(b"HTTP/1.1 200"), parts[0][1][:500]
    for moment, data in parts:
        text += data
        *lines, text = text.split(b"\n")
        characters = 0
        for line in lines:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:]).get("choices") or [{}]
                characters += len(choices[0].get("text") or "")
        if characters:
            if last is not None:
                found.gaps_s.append(moment - last)
            last = moment
            found.tokens += characters
