"""Long responses: cancelled if the client disconnects, or streamed as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mygpt.server.problems import ApiError, to_json


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
                    await self._begin(send)
                    begun = True
                body = b"".join(b"data: " + to_json(event) + b"\n\n" for event in group)
                await send({"type": "http.response.body", "body": body, "more_body": True})
        except ApiError as error:
            if not begun:
                await error.answer()(scope, receive, send)
                return
            body = b"data: " + to_json(error.to_dict()) + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _begin(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
