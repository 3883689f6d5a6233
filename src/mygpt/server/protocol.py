"""uvicorn's HTTP connection with additional limits, so that slow clients cannot exhaust the server.

A request must arrive completely within a time limit, and a response must be read at a minimal
rate. If there are too many connections, those that have waited longest for a request are closed.
Reading continues while a response is written, so that a disconnect is noticed also if the client
has already sent its next request.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mygpt.server.problems import ApiError, to_json
from mygpt.server.settings import ServerSettings

_MOST_OF_HEAD = 2**16  # bytes of a request in addition to its body
_CHECK_S = 1.0  # at most, between two checks of how much a client has read
_SLOWEST = 8192  # bytes per second that a client must read if unread data remains
_LONGEST = 10  # times `write_limit_s`: the longest time that a response may have unread data


class GuardedProtocol(H11Protocol):
    """One connection; `guarded` gives the class its limits."""

    settings: ServerSettings
    # Connections that wait for a request, or for the rest of one; the oldest first.
    awaiting: dict[GuardedProtocol, None]

    _arriving: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _ahead = 0  # bytes of further requests received while one is being answered
    # Since when data has been unread (by the event loop's clock), and how many bytes it was then.
    _since, _size = 0.0, 0
    # The earlier seconds with unread data in this response, and the bytes read in them.
    _behind_s, _read = 0.0, 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Handle a new connection."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # data counts as unread if the system's buffer is full
        if len(self.connections) > self.settings.max_connections:
            if not self.awaiting:
                most = self.settings.max_connections
                problem = f"there are {most} connections, the limit: try again later"
                self._refuse(ApiError(503, problem, code="full"))
                return
            self.end_oldest(1)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle the end of the connection, by the client or by this server."""
        self._request_is_here()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Handle bytes of a request."""
        if self._arriving is None and not self._is_answering():
            self._await_request()
        ahead = self._is_answering()
        super().data_received(data)
        self._check_arrival()
        if ahead:
            # Bytes of the next request: uvicorn would stop reading, and not notice a disconnect.
            self._ahead += len(data)
            if self._ahead > self.settings.max_body_bytes + _MOST_OF_HEAD:
                self.transport.abort()
            else:
                self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """Handle the end of a response; the next request may have arrived in part."""
        super().on_response_complete()
        self._behind_s, self._read = 0.0, 0
        self._ahead = len(self.conn.trailing_data[0])
        if self.transport.is_closing() or self._is_answering():
            return
        if self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]:
            self._await_request()
            self._check_arrival()
        else:
            self.awaiting[self] = None  # uvicorn closes it after `idle_limit_s`

    def pause_writing(self) -> None:
        """Start to watch a client that has not read all data."""
        super().pause_writing()
        self._since, self._size = self.loop.time(), self.transport.get_write_buffer_size()
        self._watch()

    def resume_writing(self) -> None:
        """Stop to watch: the client has read all data."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
            self._behind_s += self.loop.time() - self._since
            self._read += self._size

    def _watch(self) -> None:
        """Close the connection if the client reads too slowly."""
        behind_s = self._behind_s + self.loop.time() - self._since
        read = self._read + self._size - self.transport.get_write_buffer_size()
        limit = self.settings.write_limit_s
        if behind_s >= min(limit + read / _SLOWEST, _LONGEST * limit):
            self.transport.abort()
        else:
            self._unread = self.loop.call_later(min(_CHECK_S, limit), self._watch)

    def send_400_response(self, msg: str) -> None:
        """Respond to bytes that are not HTTP with an error in the API's form."""
        self._refuse(ApiError(400, msg))

    def _is_answering(self) -> bool:
        """Whether a complete request has arrived and its response is not finished."""
        return self.conn.their_state is not h11.IDLE and self.conn.their_state is not h11.SEND_BODY

    def _check_arrival(self) -> None:
        if self._is_answering():
            self._request_is_here()

    def _await_request(self) -> None:
        """Start, or continue, to wait for a complete request."""
        self.awaiting[self] = None
        if self._arriving is None:
            limit = self.settings.request_limit_s
            self._arriving = self.loop.call_later(limit, self._time_out)

    def _request_is_here(self) -> None:
        self.awaiting.pop(self, None)
        if self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None

    def _time_out(self) -> None:
        self._request_is_here()
        if not self.transport.is_closing():
            limit = self.settings.request_limit_s
            self._refuse(
                ApiError(408, f"the request did not arrive within {limit:g} s: send it again")
            )

    def _refuse(self, error: ApiError) -> None:
        """Send an error, if no response has begun, and close the connection."""
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
        """Close up to `count` connections that wait for a request, the oldest first."""
        for connection in list(cls.awaiting)[:count]:
            connection._time_out()


def guarded(settings: ServerSettings) -> type[GuardedProtocol]:
    """A protocol class with these limits and a set of connections of its own."""
    own: dict[str, Any] = {"settings": settings, "awaiting": {}}
    return type("Guarded", (GuardedProtocol,), own)
