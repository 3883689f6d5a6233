"""uvicorn with our limits: listens, tells where, and ends without cutting answers off."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace

import uvicorn

from mygpt.errors import InputError
from mygpt.generation.writer import Writer
from mygpt.server.app import make_app
from mygpt.server.protocol import guarded
from mygpt.server.scheduler import Scheduler
from mygpt.server.settings import ServerSettings

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000

# The thread that decodes must not wait long for the one that answers to let go of Python.
_SWITCH_S = 0.001
_MOST_OF = 0.9  # of the time limit at the end: what is left is for telling


class Server(uvicorn.Server):
    """A server that tells when it listens, and refuses what has not begun once it is to end.

    Args:
        config: uvicorn's.
        scheduler: what decodes.
        tell: called once, when requests are taken.
        limit_s: how long answers on their way may take at the end.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        scheduler: Scheduler,
        tell: Callable[[], None],
        limit_s: float,
    ) -> None:
        super().__init__(config)
        self.scheduler, self._tell, self._limit_s = scheduler, tell, limit_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets=sockets)
        if not self.should_exit:
            self._tell()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what has begun; near the time limit the rest is told that it ends here."""
        self.scheduler.drain()
        stop = threading.Thread(target=self.scheduler.stop, daemon=True)
        timer = asyncio.get_running_loop().call_later(_MOST_OF * self._limit_s, stop.start)
        try:
            await super().shutdown(sockets=sockets)
        finally:
            timer.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to a host and port (0 picks a free one).

    Raises:
        InputError: for a port that is taken or a host that is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise InputError(
            f"host {host!r} is not known: give a name or address of this machine"
        ) from None
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(1024)
    except OSError as error:
        bound.close()
        raise InputError(_why_not(host, port, error)) from None
    bound.setblocking(False)
    return bound


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use: end what listens there, or choose another with --port"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} may not be listened on: choose one from 1024 with --port"
    return f"cannot listen at {host} port {port}: {error.strerror}"


def url_of(bound: socket.socket) -> str:
    """Where a browser on this machine finds the server."""
    host, port = bound.getsockname()[:2]
    shown = "127.0.0.1" if host == "0.0.0.0" else "::1" if host == "::" else host
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def make_server(
    writer: Writer,
    settings: ServerSettings,
    bound: socket.socket,
    tell: Callable[[str], None],
) -> Server:
    """The server for a bound socket; `tell` takes the line that says where it listens."""
    host = bound.getsockname()[0]
    everywhere = ipaddress.ip_address(host.split("%")[0]).is_unspecified
    settings = replace(
        settings,
        hosts=(*settings.hosts, host),
        any_address=settings.any_address or everywhere,
    )
    app = make_app(writer, settings)
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=guarded(settings),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=max(1, round(settings.idle_limit_s)),
        timeout_graceful_shutdown=max(1, round(settings.shutdown_limit_s)),
    )
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    line = f"serving {settings.name} at {url_of(bound)} (Ctrl-C ends)"
    return Server(config, app.state.scheduler, lambda: tell(line), settings.shutdown_limit_s)


def serve(
    writer: Writer,
    settings: ServerSettings,
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    tell: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM, which is raised anew when all has ended.

    Raises:
        InputError: for a host or port that cannot be listened on.
    """
    with listen(host, port) as bound:
        named = replace(settings, hosts=(*settings.hosts, host))
        server = make_server(writer, named, bound, tell)
        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        try:
            asyncio.run(server.serve(sockets=[bound]))
        finally:
            sys.setswitchinterval(before)
