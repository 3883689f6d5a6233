"""uvicorn's connection with the limits that it lacks: nobody holds one by doing little.

A request has to arrive whole within a time, what is written has to be read at a rate, and where
connections run out, those go first that have waited for a request longest. It reads on while it
answers, so that a client that goes is noticed whatever it has sent before.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mygpt.server.problems import ApiError, to_json
from mygpt.server.settings import ServerSettings

_MOST_OF_HEAD = 2**16  # bytes of a request beside its body
_CHECK_S = 1.0  # at most between two checks of what a client has read
_SLOWEST = 8192  # bytes a second that a client has to read, once it is behind
_LONGEST = 10  # times the limit: how long an answer may wait for its reader at any rate


class GuardedProtocol(H11Protocol):
    """One connection; `guarded` gives the class its limits."""

    settings: ServerSettings
    # Connections on which a request is awaited or has come in part, the oldest first.
    awaiting: dict[GuardedProtocol, None]

    _arriving: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _ahead = 0  # bytes of requests that wait while one is answered
    _since, _size = 0.0, 0  # since when the client is behind, and by how many bytes it was then
    _behind_s, _read = 0.0, 0  # how long it was before in this answer, and what it read meanwhile

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # what the system does not take is unread
        if len(self.connections) > self.settings.max_connections:
            if not self.awaiting:
                self._refuse(ApiError(503, "too many connections: try again", code="full"))
                return
            self.end_oldest(1)
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
        ahead = self._is_answering()
        super().data_received(data)
        self._look()
        if ahead:
            # Of the next request, which uvicorn would leave unread, and the client's end with it.
            self._ahead += len(data)
            if self._ahead > self.settings.max_body_bytes + _MOST_OF_HEAD:
                self.transport.abort()
            else:
                self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """An answer has been sent; the next request may have begun."""
        super().on_response_complete()
        self._behind_s, self._read = 0.0, 0
        self._ahead = len(self.conn.trailing_data[0])
        if self.transport.is_closing() or self._is_answering():
            return
        if self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]:
            self._await_request()
            self._look()
        else:
            self.awaiting[self] = None  # uvicorn ends it after the time for idleness

    def pause_writing(self) -> None:
        """The client has not read all that was written."""
        super().pause_writing()
        self._since, self._size = self.loop.time(), self.transport.get_write_buffer_size()
        self._watch()

    def resume_writing(self) -> None:
        """It has read it."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
            self._behind_s += self.loop.time() - self._since
            self._read += self._size

    def _watch(self) -> None:
        """Let a client go that reads too slowly."""
        behind_s = self._behind_s + self.loop.time() - self._since
        read = self._read + self._size - self.transport.get_write_buffer_size()
        limit = self.settings.write_limit_s
        if behind_s >= min(limit + read / _SLOWEST, _LONGEST * limit):
            self.transport.abort()
        else:
            self._unread = self.loop.call_later(min(_CHECK_S, limit), self._watch)

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

    @classmethod
    def end_oldest(cls, count: int) -> None:
        """End so many of the connections on which a request is awaited, the oldest first."""
        for connection in list(cls.awaiting)[:count]:
            connection._too_late()


def guarded(settings: ServerSettings) -> type[GuardedProtocol]:
    """The protocol under these limits, with connections of its own."""
    own: dict[str, Any] = {"settings": settings, "awaiting": {}}
    return type("Guarded", (GuardedProtocol,), own)
