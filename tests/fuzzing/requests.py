"""What a client sends to `mygpt serve` and to the page of a training: HTTP heads and bodies.

The bytes of a connection go through the server's own protocol, middleware, routes and parsers; only
decoding is left out. The same bytes go to the handler of `mygpt train --open`.
"""

from __future__ import annotations

import asyncio
import io
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import uvicorn
from starlette.requests import Request as HttpRequest
from uvicorn.server import ServerState

from fuzzing import Mutate
from fuzzing.container import model
from mutations import mutated_json, replaced
from mygpt.checkpoint.model_file import Checkpoint
from mygpt.decode.writer import Writer
from mygpt.server import app as server_app
from mygpt.server.live import Handler, Updates
from mygpt.server.problems import ApiError
from mygpt.server.protocol import guarded
from mygpt.server.settings import ServerSettings
from mygpt.server.threads import Threads
from mygpt.tokenization import CharTokenizer

# Larger bodies would be parsed in a thread.
_SETTINGS = ServerSettings(max_tokens=50, max_prompt_tokens=40, max_body_bytes=2**12)
_PACKET = 1024  # bytes that arrive at once
_TURNS = 50  # of the event loop after each packet, enough for one request


class _ParsesOnly(Threads):
    """Responds with status 200 once a body is valid."""

    async def parse(self, request: HttpRequest, parse: Callable[[bytes], Any]) -> Any:
        await super().parse(request, parse)
        raise ApiError(200, "valid")


class _Transport(asyncio.Transport):
    """A connection whose client reads everything at once."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 9), "sockname": ("127.0.0.1", 8000)})
        self.sent: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        self.sent.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


@cache
def _server() -> tuple[uvicorn.Config, list[Exception]]:
    """The server's configuration, and the exceptions that its application raised."""
    tokenizer = CharTokenizer("ab \n")
    config, arrays = model(tokenizer, max_seq_len=8)
    checkpoint = Checkpoint(Path("a"), config, tokenizer, arrays, {})
    with mock.patch.object(server_app, "Threads", _ParsesOnly):
        app = server_app.make_app(Writer(checkpoint, tokenizer, engine="numpy"), _SETTINGS)
    raised: list[Exception] = []

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        except Exception as error:
            raised.append(error)
            raise

    made = uvicorn.Config(
        watched, http=guarded(_SETTINGS), ws="none", lifespan="off", log_config=None,
        log_level="critical", access_log=False, server_header=False, proxy_headers=False,
    )  # fmt: skip
    made.load()
    return made, raised


def accepts(data: bytes) -> bool:
    """Send the bytes to both servers; whether a request was answered with 200."""
    config, raised = _server()
    raised.clear()
    sent = asyncio.run(_connection(config, data))
    if raised:
        raise raised[0]
    assert not any(part.startswith(b"HTTP/1.1 5") for part in sent), sent
    sent.append(_of_the_page(data))
    return any(part.startswith(b"HTTP/1.1 200") for part in sent)


async def _connection(config: uvicorn.Config, data: bytes) -> list[bytes]:
    transport, state = _Transport(), ServerState()
    protocol: Any = config.http_protocol_class
    protocol = protocol(config=config, server_state=state, app_state={})
    protocol.connection_made(transport)
    for start in range(0, len(data), _PACKET):
        if not transport.closed:
            protocol.data_received(data[start : start + _PACKET])
        for _ in range(_TURNS):
            if not state.tasks:
                break
            await asyncio.sleep(0)
    tasks = list(state.tasks)
    protocol.connection_lost(None)
    await asyncio.gather(*tasks)
    return transport.sent


def _of_the_page(data: bytes) -> bytes:
    """What the handler of a page in progress answers."""
    sent = io.BytesIO()
    socket: Any = SimpleNamespace(
        settimeout=lambda seconds: None,
        makefile=lambda mode, size: io.BytesIO(data),
        sendall=sent.write,
    )
    updates = Updates(lambda: None)
    updates.publish(b"{}", last=True)
    server: Any = SimpleNamespace(files={"/": ("text/html", b"<p>")}, updates=updates)
    Handler(socket, ("127.0.0.1", 9), server)
    return sent.getvalue()


def _request(path: str, body: Any = None, *headers: str) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "Host: localhost:8000"]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + content


def seeds() -> dict[str, bytes]:
    """A request for every route that has a body, and some without one."""
    full = {
        "model": "mygpt", "prompt": ["ab", "b"], "n": 2, "best_of": 2, "max_tokens": 5,
        "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2,
        "seed": 7, "stop": ["a", "bb"], "logprobs": 2, "echo": True, "stream": True,
        "stream_options": {"include_usage": True}, "overflow": "refill", "unknown": "drop",
        "user": "u", "logit_bias": {}, "presence_penalty": 0,
    }  # fmt: skip
    chat = {"model": "mygpt", "messages": [{"role": "user", "content": "ab"}]}
    inside = {"ids": [0, 1, 2], "position": 1, "token": 2, "ablate": ["1.1", "mlp1"]}
    patch = {"ids": [0, 1], "patch": ["block1"], "other": "ba", "patch_position": 0}
    origin = "Origin: http://localhost:8000"
    return {
        "completion": _request("/v1/completions", {"model": "mygpt", "prompt": "ab"}),
        "completion-all": _request("/v1/completions", full, "Authorization: Bearer k", origin),
        "completion-ids": _request("/v1/completions", {"model": "mygpt", "prompt": [[0, 1], [2]]}),
        "chat": _request("/v1/chat/completions", chat) + _request("/health"),
        "next-text": _request("/api/next", {"text": "ab", "unknown": "drop"}),
        "next-ids": _request("/api/attention", {"ids": [0, 1, 3]}),
        "inside": _request("/api/inside", inside),
        "patch": _request("/api/inside", patch, "Connection: close"),
        "models": _request("/v1/models") + _request("/v1/models/mygpt"),
        "page": _request("/") + _request("/static/sampling.js", None, origin),
        "events": _request("/events?x=1"),
    }


def mutated(data: bytes, rng: random.Random, mutate: Mutate) -> bytes:
    """The head, or the body with a correct length."""
    head, between, body = data.partition(b"\r\n\r\n")
    way = rng.random()
    if way < 0.1 or not between:
        return mutate(data)
    if way < 0.4:
        return mutate(head) + between + body
    if way < 0.7:
        try:
            values: Any = json.loads(body)
        except (ValueError, RecursionError):
            return head + between + mutate(body)
        for _ in range(rng.randrange(1, 4)):
            values = rng.choice((mutated_json, replaced))(values, rng)
        body = json.dumps(values).encode()
    else:
        body = mutate(body)
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length:")]
    lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + between + body
