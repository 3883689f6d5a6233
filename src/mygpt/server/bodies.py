"""Large bodies and large answers: read and made beside the event loop, sent in parts."""

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

from mygpt.server.offload import Offload
from mygpt.server.problems import to_json
from mygpt.server.requests import read_body
from mygpt.server.streaming import while_connected

Found = TypeVar("Found")

_SMALL = 4096  # bytes of a body that is parsed, and its text encoded, within a few ms
_SLICE = 256  # entries of a list that become JSON in one go, for Python stands still meanwhile
_PART = 2**16  # bytes sent at once
_TIDY, _TIDY_S = 2**17, 1.5  # bytes of a body after which memory is given back, and when


class Bodies:
    """Reads the bodies of requests and makes large answers, each in a thread of its own.

    Args:
        max_waiting: how many large bodies may wait to be read.
    """

    def __init__(self, max_waiting: int) -> None:
        self._readers = Offload("mygpt-bodies", max_waiting)
        self._makers = Offload("mygpt-answers")
        self._tidying = False

    async def read(self, request: HttpRequest, parse: Callable[[bytes], Found]) -> Found:
        """What `parse` makes of a request's body.

        Raises:
            ApiError: where it is no JSON by its type, too many wait, or `parse` raises it.
            ClientGone: once nobody waits for it.
        """
        body = await read_body(request)
        if len(body) <= _SMALL:
            return parse(body)
        if len(body) > _TIDY:
            self.tidy_soon()
        found: Found = await while_connected(request.receive, self._readers.run(parse, body))
        return found

    async def answer(self, request: HttpRequest, make: Callable[[], Iterable[bytes]]) -> Response:
        """The answer of JSON that `make` gives in pieces.

        Raises:
            ClientGone: once nobody waits for it.
        """
        parts = self._makers.run(lambda: list(grouped(make())))
        return Parts(await while_connected(request.receive, parts), self.tidy_soon)

    def tidy_soon(self) -> None:
        """Return memory in a moment: something large is not needed any more."""
        if not self._tidying:
            self._tidying = True
            asyncio.get_running_loop().call_later(_TIDY_S, self._tidy)

    def _tidy(self) -> None:
        self._tidying = False
        threading.Thread(target=free_memory, name="mygpt-tidy", daemon=True).start()

    def close(self) -> None:
        """Take nothing more."""
        self._readers.close()
        self._makers.close()


def free_memory() -> None:
    """Collect garbage; return free memory that the C library keeps to the system, where it can."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def json_pieces(content: Any) -> Iterator[bytes]:
    """The bytes of `to_json(content)` in pieces, none of which takes long to make."""
    if isinstance(content, dict) and content:
        for number, (name, value) in enumerate(content.items()):
            yield (b"," if number else b"{") + to_json(name) + b":"
            yield from json_pieces(value)
        yield b"}"
    elif isinstance(content, list) and content:
        # A long list holds many small things, a short one may hold a few large ones.
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
    """The pieces put together to parts that are worth sending."""
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
    """An answer of JSON that is sent in parts, so that others are served in between.

    Args:
        parts: of its body.
        finish: called at the end, however it comes.
    """

    media_type = "application/json"

    def __init__(self, parts: list[bytes], finish: Callable[[], None] = lambda: None) -> None:
        super().__init__(headers={"content-length": str(sum(map(len, parts)))})
        self._parts, self._finish = parts, finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            for part in self._parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
                await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._finish()
