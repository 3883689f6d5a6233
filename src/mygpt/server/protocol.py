"""uvicorn's connection with the time limits that it lacks: nobody holds one by doing nothing.

A request has to arrive whole within a time, what is written has to be read within a time, and
where connections run out, those go first that have waited for a request longest.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mygpt.server.problems import ApiError, to_json
from mygpt.server.settings import ServerSettings


class GuardedProtocol(H11Protocol):
    """One connection; `guarded` gives the class its limits."""

    settings: ServerSettings
    # Connections on which a request is awaited or has come in part, the oldest first.
    awaiting: dict[GuardedProtocol, None]

    _arriving: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            if not self.awaiting:
                self._refuse(ApiError(503, "too many connections: try again", code="full"))
                return
            next(iter(self.awaiting))._too_late()
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone, or was sent away."""
        self._request_is_here()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes of a request."""
        if self._arriving is None and not self._is_answering():
            self._await_request()
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """An answer has been sent; the next request may have begun."""
        super().on_response_complete()
        if self.transport.is_closing() or self._is_answering():
            return
        if self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]:
            self._await_request()
            self._look()
        else:
            self.awaiting[self] = None  # uvicorn ends it after the time for idleness

    def pause_writing(self) -> None:
        """The client does not read what was written."""
        super().pause_writing()
        if self._unread is None:
            limit = self.settings.write_limit_s
            self._unread = self.loop.call_later(limit, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is told so in the API's form, as all errors are."""
        self._refuse(ApiError(400, msg))

    def _is_answering(self) -> bool:
        """Whether a whole request is here and its answer on its way."""
        return self.conn.their_state is not h11.IDLE and self.conn.their_state is not h11.SEND_BODY

    def _look(self) -> None:
        if self._is_answering():
            self._request_is_here()

    def _await_request(self) -> None:
        """Begin, or go on, to wait for a whole request."""
        self.awaiting[self] = None
        if self._arriving is None:
            limit = self.settings.request_limit_s
            self._arriving = self.loop.call_later(limit, self._too_late)

    def _request_is_here(self) -> None:
        self.awaiting.pop(self, None)
        if self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None

    def _too_late(self) -> None:
        self._request_is_here()
        if not self.transport.is_closing():
            limit = self.settings.request_limit_s
            self._refuse(ApiError(408, f"the request did not arrive within {limit:g} s"))

    def _refuse(self, error: ApiError) -> None:
        """Say why where nothing was answered yet, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = to_json(error.to_dict())
        reason = {400: "Bad Request", 408: "Request Timeout"}.get(error.status, "Refused")
        head = (
            f"HTTP/1.1 {error.status} {reason}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()


def guarded(settings: ServerSettings) -> type[asyncio.Protocol]:
    """The protocol under these limits, with connections of its own."""
    own: dict[str, Any] = {"settings": settings, "awaiting": {}}
    return cast("type[asyncio.Protocol]", type("Guarded", (GuardedProtocol,), own))
