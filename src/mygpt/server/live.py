"""Serve the page of a training in progress: files in memory, and updates as server-sent events.

The standard library's HTTP server suffices for a few readers on this machine, so no extra is
needed. Each connection has a daemon thread. A reader that is slow, or does not read, delays only
its own thread: it misses updates, and its connection is closed after a while.
"""

from __future__ import annotations

import os
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from mygpt.errors import InputError
from mygpt.server.guards import check_host, check_origin
from mygpt.server.problems import SAFE_HEADERS, ApiError, to_json
from mygpt.server.settings import ServerSettings

HOST = "127.0.0.1"
PORT = 8010  # any free port if another program uses it
_MOST_CONNECTIONS = 32
_STALLED_S = 10.0  # after which a connection is closed that neither sends nor reads
_ALIVE_S = 5.0  # between two writes to a reader, by which one that is gone is noticed
_RETRY_MS = 1000  # after which a browser connects again

Files = Mapping[str, tuple[str, bytes]]  # media type and content by path


class Updates:
    """The newest update, for any number of readers, each in its own thread.

    Args:
        on_reader: called in a reader's thread when it begins to read.
    """

    def __init__(self, on_reader: Callable[[], None]) -> None:
        self._changed = threading.Condition()
        self._on_reader = on_reader
        self._number, self._newest, self._ended = 0, b"", False
        self._readers = 0

    @property
    def readers(self) -> int:
        """How many read at present."""
        return self._readers

    def publish(self, data: bytes, *, last: bool = False) -> None:
        """Replace the newest update by `data`, JSON on one line; nothing follows the last one."""
        event = b"event: end\n" if last else b""
        with self._changed:
            self._number += 1
            self._newest, self._ended = event + b"data: " + data + b"\n\n", last
            self._changed.notify_all()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Be counted as a reader."""
        with self._changed:
            self._readers += 1
        try:
            self._on_reader()
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    def after(self, number: int, limit_s: float) -> tuple[int, bytes, bool]:
        """The number of the newest update, its event, and whether it is the last.

        Waits for an update after the one with this number (0: for any). The event is empty if
        there is none within the time.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._number > number, limit_s)
            event = self._newest if self._number > number else b""
            return self._number, event, self._ended

    def wait_for_readers(self, limit_s: float) -> None:
        """Wait until no reader is left, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: not self._readers, limit_s)


class LiveServer:
    """Serves files and updates at an address of this machine, in daemon threads.

    Args:
        files: the page's files; "/events" gives the updates.
        on_reader: called, in a thread of the server, when a reader of the updates comes.

    Raises:
        InputError: if it cannot listen at any port.
    """

    def __init__(self, files: Files, on_reader: Callable[[], None]) -> None:
        self.updates = Updates(on_reader)
        try:
            try:
                self._server = _Server(PORT, files, self.updates)
            except OSError:
                self._server = _Server(0, files, self.updates)
        except OSError as error:
            raise InputError(
                f"no page can be served at {HOST}: {error.strerror}: omit --open"
            ) from None
        self.url = f"http://{HOST}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self, limit_s: float) -> None:
        """Let readers receive the last update, for at most `limit_s`, and stop listening."""
        self.updates.wait_for_readers(limit_s)
        # Stopping waits for the server's loop, up to half a second: that is not waited for here.
        threading.Thread(target=self._stop, daemon=True).start()

    def _stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    """A limited number of connections, each in a daemon thread."""

    allow_reuse_address = os.name == "posix"  # elsewhere it allows two servers at one port
    daemon_threads, block_on_close = True, False

    def __init__(self, port: int, files: Files, updates: Updates) -> None:
        self.files, self.updates = files, updates
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        super().__init__((HOST, port), Handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether a connection is accepted; otherwise it is closed."""
        return self._free.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle a connection; called in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print an error, unless it is that of a connection."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    timeout = _STALLED_S  # of reading and of writing
    server: _Server

    def do_GET(self) -> None:
        """Answer with a file or with the updates, or with an error in the form of the API."""
        path = self.path.partition("?")[0]
        try:
            hosts = self.headers.get_all("host", [])
            check_host(hosts, _SETTINGS, "call it by its address")
            check_origin(self.headers.get_all("origin", []), hosts[0])
            if path != "/events" and path not in self.server.files:
                raise ApiError(404, f"there is no file {path:.80}", code="not_found")
        except ApiError as error:
            self._answer(error.status, "application/json", to_json(error.to_dict()))
            return
        if path == "/events":
            self._send_updates()
        else:
            self._answer(200, *self.server.files[path])

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is not valid, or not GET; the base class calls it."""
        error = ApiError(code, message or "the request is not valid: use GET")
        self._answer(error.status, "application/json", to_json(error.to_dict()))

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the terminal shows the training."""

    def _send_updates(self) -> None:
        updates, number, ended = self.server.updates, 0, False
        self._begin(200, {"Content-Type": "text/event-stream"})
        self.wfile.write(b"retry: %d\n\n" % _RETRY_MS)
        with updates.reading():
            while not ended:
                number, event, ended = updates.after(number, _ALIVE_S)
                self.wfile.write(event or b":\n\n")  # a comment

    def _answer(self, status: int, kind: str, content: bytes) -> None:
        self._begin(status, {"Content-Type": kind, "Content-Length": str(len(content))})
        self.wfile.write(content)

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response_only(status)
        fixed = {"Cache-Control": "no-store", "Connection": "close"}
        for name, value in {**SAFE_HEADERS, **fixed, **headers}.items():
            self.send_header(name, value)
        self.end_headers()


_SETTINGS = ServerSettings()  # only the loopback names
