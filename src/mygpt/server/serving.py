"""uvicorn with our limits: listens, tells where, and ends without cutting answers off."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import FrameType
from typing import Any, cast

import uvicorn

from mygpt import signals
from mygpt.errors import InputError, MygptError
from mygpt.generation.writer import Writer
from mygpt.server.app import make_app
from mygpt.server.log import Sparing
from mygpt.server.problems import broken
from mygpt.server.protocol import GuardedProtocol, guarded
from mygpt.server.scheduler import Scheduler
from mygpt.server.settings import ServerSettings

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000

# The thread that decodes must not wait long for the one that answers to let go of Python.
_SWITCH_S = 0.001
# A full collection of garbage visits all objects while no other thread runs: large answers have a
# million, and /health took 180 ms. The model's are left out; the rest is collected after answers.
_RARELY = 1000
_MOST_OF = 0.9  # of the time limit at the end: what is left is for telling
_DEAD_S = 1.0  # for which /health says that decoding has ended for good
_BACKLOG = 1024  # connections that the system keeps until they are accepted
_AT_ONCE = 32  # accepted in a turn of the event loop; it has closed one too many after four turns
_RESERVE = 160  # open files for all that is no connection, or has just been accepted


class ServerDied(MygptError):
    """A server that has ended because it could not decode any more (exit code 1)."""


class Server(uvicorn.Server):
    """A server that tells when it listens, and refuses what has not begun once it is to end.

    Args:
        config: uvicorn's.
        scheduler: what decodes.
        tell: takes lines for whoever runs the server.
        settings: its time limits.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        scheduler: Scheduler,
        tell: Callable[[str], None],
        settings: ServerSettings,
    ) -> None:
        super().__init__(config)
        self.scheduler, self.tell, self._limit_s = scheduler, tell, settings.shutdown_limit_s
        self._name = settings.name
        self._dead_since: float | None = None

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """uvicorn's handlers, unless a command's are there."""
        with super().capture_signals() if signals.watch() is None else nullcontext():
            yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        asyncio.get_running_loop().set_exception_handler(self._on_error)
        await super().startup(sockets=sockets)
        for bound in sockets or ():
            bound.listen(_BACKLOG)
            if not self.should_exit:
                self.tell(f"serving {self._name} at {url_of(bound)} (Ctrl-C ends)")

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: also some time after decoding has ended for good."""
        if self.scheduler.dead and self._dead_since is None:
            self._dead_since = time.monotonic()
        if self._dead_since is not None and time.monotonic() - self._dead_since > _DEAD_S:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what has begun; near the time limit the rest is told that it ends here."""
        self.scheduler.drain()
        if self.scheduler.running:
            self.tell(f"answers on their way have {self._limit_s:g} s (Ctrl-C ends them now)")
        stop = threading.Thread(target=self.scheduler.stop, daemon=True)
        timer = asyncio.get_running_loop().call_later(_MOST_OF * self._limit_s, stop.start)
        try:
            await super().shutdown(sockets=sockets)
        finally:
            timer.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End, and at a second signal at once."""
        if not self._captured_signals:
            super().handle_exit(sig, frame)
        elif sig == signal.SIGINT:
            os._exit(128 + sig)
        else:
            signal.signal(sig, signal.SIG_DFL)
            os.kill(os.getpid(), sig)

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What a callback raised: where no file can be opened any more, make room."""
        if getattr(context.get("exception"), "errno", None) in (errno.EMFILE, errno.ENFILE):
            cast("type[GuardedProtocol]", self.config.http_protocol_class).end_oldest(_AT_ONCE)
        loop.default_exception_handler(context)


def connections_within(wanted: int) -> int:
    """How many connections the system's limit of open files allows, `wanted` at the most.

    The limit is raised as far as that takes, and this process may.

    Raises:
        InputError: where it allows none.
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
            f"the limit of {soft} open files leaves none for connections: raise it (ulimit -n)"
        )
    return min(wanted, left)


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
        bound.listen(_BACKLOG)
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
    """The server for a bound socket; `tell` takes lines for whoever runs it.

    Raises:
        InputError: for an engine that cannot be had, or where no connection is possible.
    """
    host = bound.getsockname()[0]
    allowed = connections_within(settings.max_connections)
    if allowed < settings.max_connections:
        tell(
            f"note: no more than {allowed} connections at a time, by this system's limit of open "
            "files (ulimit -n)"
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
        if not any(isinstance(kept, Sparing) for kept in logger.filters):
            logger.addFilter(Sparing())
    return Server(config, app.state.scheduler, tell, settings)


def serve(
    writer: Writer,
    settings: ServerSettings,
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    tell: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM, which is raised anew when all has ended.

    As a command that `mygpt.signals` watches, until the first signal; a second one ends the
    process at once.

    Raises:
        InputError: for a host or port that cannot be listened on.
        ServerDied: when decoding has failed for good.
    """
    with listen(host, port) as bound:
        named = replace(settings, hosts=(*settings.hosts, host))
        server = make_server(writer, named, bound, tell)
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


@contextmanager
def _until_signalled(server: Server) -> Iterator[None]:
    """Inside, a command's first signal has the server finish, and is raised after that."""
    watch = signals.watch()
    if watch is None:  # uvicorn heeds signals itself
        yield
        return

    def finish(name: str) -> None:
        server.should_exit = True

    unwinds, watch.unwinds = watch.unwinds, False  # a second one: uvicorn would report it at length
    try:
        with signals.DeferredSignals(finish) as first:
            yield
    finally:
        watch.unwinds = unwinds
    first.end()
