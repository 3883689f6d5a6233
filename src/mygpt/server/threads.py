"""Long work off the event loop: threads that parse, build and compute, and streams."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
import numpy as np
from starlette.background import BackgroundTask
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mygpt.server.problems import ApiError, busy, json_answer, to_json

Found = TypeVar("Found")

_SMALL = 4096  # bytes of a body that is parsed on the event loop: it takes a few ms at most
_SLICE = 256  # entries of a list per call of `json.dumps`, which holds the interpreter lock
_LARGE_BODY = 2**17  # bytes of a body after which free memory is returned to the system
_FREE_AFTER_S = 1.5


class ClientGone(Exception):
    """The client has disconnected before its response."""


async def while_connected(receive: Receive, work: Awaitable[Any]) -> Any:
    """Await `work` and return its result; if the client disconnects, cancel it.

    Raises:
        ClientGone: if the client disconnected first.
    """
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGone
        return doing.result()
    finally:
        for task in (doing, gone):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await doing


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Offload:
    """One thread that makes calls in the order in which they are submitted.

    Args:
        name: the thread's name.
        max_waiting: how many calls may wait; None is no limit.
    """

    def __init__(self, name: str, max_waiting: int | None = None) -> None:
        self._max_waiting, self._waiting = max_waiting, 0
        self._thread = ThreadPoolExecutor(1, name)
        self._cancelled = threading.Event()  # of the call that the thread is running

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` in the thread and return its result.

        A waiting call that is cancelled is dropped; a running one ends at `check_cancelled`.

        Raises:
            ApiError: 429 if too many calls wait.
        """
        if self._max_waiting is not None and self._waiting >= self._max_waiting:
            raise busy(self._waiting)
        cancelled = threading.Event()

        def call() -> Any:
            self._cancelled = cancelled
            return function(*args)

        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        finally:
            self._waiting -= 1
            cancelled.set()

    def check_cancelled(self) -> None:
        """End the running call if nobody waits for its result any more."""
        if self._cancelled.is_set():
            raise ApiError(499, "the client has disconnected")

    def close(self) -> None:
        """Drop waiting calls, and take no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class Threads:
    """The threads for request bodies, for large responses, and for full forward passes.

    Args:
        max_waiting: how many bodies, and how many forward passes, may wait.
    """

    def __init__(self, max_waiting: int) -> None:
        self._parsing = Offload("mygpt-bodies", max_waiting)
        self._building = Offload("mygpt-answers")
        self.forward = Offload("mygpt-read", max_waiting)
        self._free_memory_pending = False

    async def parse(self, request: HttpRequest, parse: Callable[[bytes], Found]) -> Found:
        """Read a request's body and return `parse(body)`.

        Raises:
            ApiError: if its content type is not JSON, too many wait, or `parse` raises it.
            ClientGone: if the client disconnects.
        """
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "the body must be JSON: send Content-Type: application/json")
        body = await request.body()
        if len(body) <= _SMALL:
            return parse(body)
        if len(body) > _LARGE_BODY:
            self.free_memory_soon()
        found: Found = await while_connected(request.receive, self._parsing.run(parse, body))
        return found

    async def answer(
        self, request: HttpRequest, make: Callable[[], Any], *, free: bool = True
    ) -> Response:
        """The response whose JSON content `make` gives.

        Args:
            request: what is responded to.
            make: called in a thread.
            free: whether to return its memory to the system, shortly after: with torch loaded, all
                threads wait for 0.15 s then.

        Raises:
            ClientGone: if the client disconnects.
        """
        work = self._building.run(lambda: b"".join(json_pieces(make())))
        response = json_answer(await while_connected(request.receive, work))

        async def free_soon() -> None:
            self.free_memory_soon()

        if free:
            response.background = BackgroundTask(free_soon)
        return response

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
        for thread in (self._parsing, self._building, self.forward):
            thread.close()


def free_memory() -> None:
    """Collect garbage, and return the C library's free memory to the system if it supports that."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def json_pieces(content: Any) -> Iterator[bytes]:
    """The bytes of `to_json(content)` in pieces, each of which is computed quickly.

    Arrays are lists of numbers, rounded to four digits after the point.
    """
    if isinstance(content, np.ndarray) and content.ndim <= 2 and np.isfinite(content).all():
        # Of an answer of POST /api/inside 90% are weights: `json` takes ten times as long.
        yield msgspec.json.encode(np.round(content.astype(np.float64), 4).tolist())
        return
    if isinstance(content, np.ndarray):
        content = list(content) if content.ndim > 2 else content.tolist()
    if isinstance(content, dict) and content:
        for number, (name, value) in enumerate(content.items()):
            yield (b"," if number else b"{") + to_json(name) + b":"
            yield from json_pieces(value)
        yield b"}"
    elif isinstance(content, list) and content:
        # A long list has many small items; a short one may have a few large ones.
        long = len(content) > _SLICE or not isinstance(content[0], (dict, list, np.ndarray))
        for start in range(0, len(content), _SLICE if long else 1):
            yield b"," if start else b"["
            if long:
                yield to_json(content[start : start + _SLICE])[1:-1]
            else:
                yield from json_pieces(content[start])
        yield b"]"
    else:
        yield to_json(content)


class EventStream(Response):
    """A response of server-sent events; an error before the first event is an error response.

    Args:
        events: lists of objects; the events of a list are sent together, each as JSON.
        finish: called at the end, also after an error.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[list[Any]], finish: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events, self._finish = events, finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            with contextlib.suppress(ClientGone, OSError):
                await while_connected(receive, self._send(scope, receive, send))
        finally:
            self._finish()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        try:
            async for group in self._events:
                if not begun:
                    start = {"type": "http.response.start", "status": 200}
                    await send(start | {"headers": self.raw_headers})
                    begun = True
                await _send_events(send, group)
        except ApiError as error:
            if not begun:
                await error.answer()(scope, receive, send)
                return
            await _send_events(send, [error.to_dict()])
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _send_events(send: Send, events: list[Any]) -> None:
    body = b"".join(b"data: " + to_json(event) + b"\n\n" for event in events)
    await send({"type": "http.response.body", "body": body, "more_body": True})
