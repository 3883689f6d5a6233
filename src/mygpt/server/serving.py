"""Running the server: uvicorn with additional limits, and a shutdown that finishes responses."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ipaddress
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any, cast

import uvicorn

from mygpt import signals
from mygpt.decode.writer import Writer
from mygpt.errors import InputError, MygptError
from mygpt.server.app import make_app
from mygpt.server.log import RateLimit
from mygpt.server.problems import broken
from mygpt.server.protocol import GuardedProtocol, guarded
from mygpt.server.scheduler import Scheduler
from mygpt.server.settings import ServerSettings

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000

# The interpreter's switch interval: the decoding thread must not wait long for the event loop's
# thread to release the interpreter lock.
_SWITCH_S = 0.001
# A full garbage collection visits all objects while no other thread runs. A large response has a
# million objects, and /health took 180 ms. So full collections are made rare; the model's objects
# are frozen, and the rest is collected after large responses.
_RARELY = 1000
_STOP_AT = 0.9  # fraction of the shutdown limit after which running requests get an error
_DEAD_TICKS = 10  # of 0.1 s: how long /health reports a failure of decoding before the end
_BACKLOG = 1024  # connections that the system queues until they are accepted
_AT_ONCE = 32  # connections accepted per turn of the event loop; a surplus closes within 4 turns
_RESERVE = 160  # open files for other things than connections, and for those just accepted


class ServerDied(MygptError):
    """The server ended because decoding failed and could not be restarted (exit code 1)."""


class Server(uvicorn.Server):
    """uvicorn's server, which also reports its address and drains the scheduler at shutdown.

    `notify` is called with lines for the user who runs the server, `on_start` with its URL.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        scheduler: Scheduler,
        notify: Callable[[str], None],
        settings: ServerSettings,
        on_start: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(config)
        self._on_start = on_start
        self.scheduler, self.notify, self._limit_s = scheduler, notify, settings.shutdown_limit_s
        self._name, self._dead_ticks = settings.name, 0

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to `serve`."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, and report the address."""
        asyncio.get_running_loop().set_exception_handler(self._on_error)
        await super().startup(sockets=sockets)
        for bound in sockets or ():
            bound.listen(_BACKLOG)
            if not self.should_exit:
                self.notify(f"serving {self._name} at {url_of(bound)} (Ctrl-C ends)")
                if self._on_start is not None:
                    self._on_start(url_of(bound))

    async def on_tick(self, counter: int) -> bool:
        """Whether to shut down; also a second after decoding has failed."""
        self._dead_ticks += self.scheduler.dead
        self.should_exit |= self._dead_ticks > _DEAD_TICKS
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running requests finish; those that run near the time limit get an error."""
        self.scheduler.drain()
        if self.scheduler.running:
            self.notify(f"running requests have {self._limit_s:g} s to finish (Ctrl-C ends now)")
        stop = threading.Thread(target=self.scheduler.stop, daemon=True)
        timer = asyncio.get_running_loop().call_later(_STOP_AT * self._limit_s, stop.start)
        try:
            await super().shutdown(sockets=sockets)
        finally:
            timer.cancel()

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handle an exception of a callback; if no file can be opened, close old connections."""
        if getattr(context.get("exception"), "errno", None) in (errno.EMFILE, errno.ENFILE):
            cast("type[GuardedProtocol]", self.config.http_protocol_class).end_oldest(_AT_ONCE)
        loop.default_exception_handler(context)


def connections_within(wanted: int) -> int:
    """How many connections, up to `wanted`, the system's limit of open files allows.

    The limit is raised as far as needed and permitted.

    Raises:
        InputError: if it allows none.
    """
    try:
        import resource
    except ImportError:  # no such limit here
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    used = len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else _RESERVE
    needed = wanted + used + _RESERVE
    if soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    left = soft - used - min(_RESERVE, soft // 4)
    if left < 1:
        raise InputError(
            f"the limit of {soft} open files is too low for any connection: raise it (ulimit -n)"
        )
    return min(wanted, left)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket for a host and port; port 0 is any free port.

    Raises:
        InputError: if the port is in use, or the host is not an address of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise InputError(
            f"host {host!r} cannot be resolved: give a name or address of this machine"
        ) from None
    family, _, _, _, address = found[0]
    try:
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        bound = socket.create_server(address, family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        problem = f"cannot listen at {host} port {port}: {os.strerror(error.errno or 0)}"
        if error.errno == errno.EADDRINUSE:
            problem = f"port {port} is in use: stop the program that uses it"
        raise InputError(f"{problem}, or choose another --host or --port") from None
    bound.setblocking(False)
    return bound


def url_of(bound: socket.socket) -> str:
    """The server's URL for a browser on this machine."""
    host, port = bound.getsockname()[:2]
    shown = "127.0.0.1" if host == "0.0.0.0" else "::1" if host == "::" else host
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def make_server(
    writer: Writer,
    settings: ServerSettings,
    bound: socket.socket,
    notify: Callable[[str], None],
    on_start: Callable[[str], None] | None = None,
) -> Server:
    """The server for a bound socket; `notify` and `on_start` as for `serve`.

    Raises:
        InputError: if the engine is not available, or the limit of open files is too low.
    """
    host = bound.getsockname()[0]
    allowed = connections_within(settings.max_connections)
    if allowed < settings.max_connections:
        notify(
            f"note: at most {allowed} connections at a time, because of this system's limit of "
            "open files (ulimit -n)"
        )
    everywhere = ipaddress.ip_address(host.split("%")[0]).is_unspecified
    settings = replace(
        settings,
        hosts=(*settings.hosts, host),
        any_address=settings.any_address or everywhere,
        max_connections=allowed,
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
        backlog=max(1, min(_AT_ONCE, allowed // 12)),
    )
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    for name in ("uvicorn.error", "asyncio", "mygpt.server"):
        logger = logging.getLogger(name)
        if not any(isinstance(kept, RateLimit) for kept in logger.filters):
            logger.addFilter(RateLimit())
    return Server(config, app.state.scheduler, notify, settings, on_start)


def serve(
    writer: Writer,
    settings: ServerSettings,
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    notify: Callable[[str], None],
    on_start: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, which is raised again after the shutdown.

    Args:
        writer: the model and its tokenizer.
        settings: the server's settings.
        host: the address to listen at.
        port: the port; 0 is any free port.
        notify: called with lines for the user who runs the server.
        on_start: called with the server's URL once it accepts connections.

    Raises:
        InputError: if it cannot listen at this host and port.
        ServerDied: if decoding failed and could not be restarted.
    """
    with listen(host, port) as bound:
        named = replace(settings, hosts=(*settings.hosts, host))
        server = make_server(writer, named, bound, notify, on_start)
        before, thresholds = sys.getswitchinterval(), gc.get_threshold()
        sys.setswitchinterval(_SWITCH_S)
        gc.collect()
        gc.freeze()
        gc.set_threshold(*thresholds[:2], _RARELY)
        try:
            with _until_signalled(server):
                asyncio.run(server.serve(sockets=[bound]))
        finally:
            sys.setswitchinterval(before)
            gc.set_threshold(*thresholds)
            gc.unfreeze()
        if server.scheduler.dead:
            raise ServerDied(broken().message)


@contextlib.contextmanager
def _until_signalled(server: Server) -> Iterator[None]:
    """Within the context, the first signal starts the shutdown; it is raised again at the end.

    A second one ends the process at once.
    """

    def finish(name: str) -> None:
        server.should_exit = True

    watch = signals.watch()
    unwinds = watch is not None and watch.unwinds
    if watch is not None:
        watch.unwinds = False  # uvicorn would print the exception's traceback
    try:
        with signals.DeferredSignals(finish) as first:
            yield
    finally:
        if watch is not None:
            watch.unwinds = unwinds
    first.end()
