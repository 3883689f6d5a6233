"""Large request bodies and responses: parsed and built in threads, sent in parts."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mygpt.server.fields import read_body
from mygpt.server.offload import Offload
from mygpt.server.problems import to_json
from mygpt.server.streaming import while_connected

Found = TypeVar("Found")

_SMALL = 4096  # bytes of a body that is parsed on the event loop: it takes a few ms at most
_SLICE = 256  # entries of a list per call of `json.dumps`, which holds the interpreter lock
_PART = 2**16  # bytes sent at once
_LARGE_BODY = 2**17  # bytes of a body after which free memory is returned to the system
_FREE_AFTER_S = 1.5


class Bodies:
    """Parses request bodies and builds large responses, each in a thread of its own.

    Args:
        max_waiting: how many large bodies may wait to be parsed.
    """

    def __init__(self, max_waiting: int) -> None:
        self._readers = Offload("mygpt-bodies", max_waiting)
        self._makers = Offload("mygpt-answers")
        self._free_memory_pending = False

    async def read(self, request: HttpRequest, parse: Callable[[bytes], Found]) -> Found:
        """Read a request's body and return `parse(body)`.

        Raises:
            ApiError: if its content type is not JSON, too many wait, or `parse` raises it.
            ClientGone: if the client disconnects.
        """
        body = await read_body(request)
        if len(body) <= _SMALL:
            return parse(body)
        if len(body) > _LARGE_BODY:
            self.free_memory_soon()
        found: Found = await while_connected(request.receive, self._readers.run(parse, body))
        return found

    async def answer(self, request: HttpRequest, make: Callable[[], Iterable[bytes]]) -> Response:
        """The response whose JSON body `make` gives in pieces.

        Raises:
            ClientGone: if the client disconnects.
        """
        parts = self._makers.run(lambda: list(grouped(make())))
        return Parts(await while_connected(request.receive, parts), self.free_memory_soon)

    def free_memory_soon(self) -> None:
        """Return free memory to the system shortly, after something large was released."""
        if not self._free_memory_pending:
            self._free_memory_pending = True
            asyncio.get_running_loop().call_later(_FREE_AFTER_S, self._free_memory)

    def _free_memory(self) -> None:
        self._free_memory_pending = False
        threading.Thread(target=free_memory, name="mygpt-free-memory", daemon=True).start()

    def close(self) -> None:
        """Start no more work."""
        self._readers.close()
        self._makers.close()


def free_memory() -> None:
    """Collect garbage, and return the C library's free memory to the system if it supports that."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def json_pieces(content: Any) -> Iterator[bytes]:
    """The bytes of `to_json(content)` in pieces, each of which is computed quickly."""
    if isinstance(content, dict) and content:
        for number, (name, value) in enumerate(content.items()):
            yield (b"," if number else b"{") + to_json(name) + b":"
            yield from json_pieces(value)
        yield b"}"
    elif isinstance(content, list) and content:
        # A long list has many small items; a short one may have a few large ones.
        long = len(content) > _SLICE or not isinstance(content[0], (dict, list))
        for start in range(0, len(content), _SLICE if long else 1):
            yield b"," if start else b"["
            if long:
                yield to_json(content[start : start + _SLICE])[1:-1]
            else:
                yield from json_pieces(content[start])
        yield b"]"
    else:
        yield to_json(content)


def grouped(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Join pieces to parts of about 64 KiB."""
    waiting: list[bytes] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= _PART:
            yield b"".join(waiting)
            waiting, size = [], 0
    yield b"".join(waiting)


class Parts(Response):
    """A JSON response sent in parts, so that other requests are served in between.

    Args:
        parts: of its body.
        finish: called at the end, also after an error.
    """

    media_type = "application/json"

    def __init__(self, parts: list[bytes], finish: Callable[[], None] = lambda: None) -> None:
        super().__init__(headers={"content-length": str(sum(map(len, parts)))})
        self._parts, self._finish = parts, finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            for part in self._parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
                await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._finish()
