"""Checks before a request is handled: host name, origin, API key and body size; and the access log.

They are plain ASGI middleware, so that bodies are not copied. A page of another site in a browser
cannot use the server: its `Origin` differs from the server's, and a host name that it resolves to
this machine (DNS rebinding) is not one of the names that the server accepts.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Callable
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mygpt.server.problems import SAFE_HEADERS, ApiError
from mygpt.server.settings import ServerSettings

_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}


class Guards:
    """Middleware that rejects requests which fail a check."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the server's startup and shutdown."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            check_host(headers, self.settings)
            check_origin(headers)
            if not is_page(scope["path"]):
                check_key(headers, self.settings.api_key)
            check_length(headers, self.settings.max_body_bytes)
        except ApiError as error:
            await error.answer()(scope, receive, send)
            return
        try:
            await self.app(scope, limited(receive, self.settings.max_body_bytes), send)
        except (Exception, asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a Rust library's panic: it is reported as a bug
            raise RuntimeError(f"{type(error).__name__} in a request") from error


def is_page(path: str) -> bool:
    """Whether a path is the playground's page or one of its files, which need no API key."""
    return path == "/" or path.startswith("/static/")


def check_host(headers: Headers, settings: ServerSettings) -> None:
    """Raise `ApiError` unless the Host header has a name of this server."""
    given = headers.getlist("host")
    name = host_name(given[0]) if len(given) == 1 else ""
    if not name:
        raise ApiError(400, "the request needs one Host header that names this server")
    known = name in _LOOPBACK_NAMES or name in {host.lower() for host in settings.hosts}
    if not known and not (settings.any_address and _is_address(name)):
        raise ApiError(
            403,
            f"the host name {name!r} is not one of this server's: start it with --allow-host NAME, "
            "or call it by its address",
            code="unknown_host",
        )


def host_name(host: str) -> str:
    """The name in a Host header, without its port; empty if the header is not valid."""
    try:
        parts = urlsplit(f"//{host}")
        if parts.netloc != host or parts.username is not None or parts.password is not None:
            return ""
        _ = parts.port  # raises ValueError if the port is not valid
        return (parts.hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def check_origin(headers: Headers) -> None:
    """Raise `ApiError` for a request that a browser sends for a page of another site."""
    for origin in headers.getlist("origin"):
        scheme, _, host = origin.partition("://")
        if scheme.lower() not in ("http", "https") or host.lower() != headers["host"].lower():
            raise ApiError(
                403,
                f"pages of {origin!r:.80} may not use this server: open this server's own page",
                code="cross_site",
            )


def check_key(headers: Headers, key: str | None) -> None:
    """Raise `ApiError` unless the request has the key; the comparison takes constant time."""
    if key is None:
        return
    scheme, _, given = headers.get("authorization", "").partition(" ")
    wanted, sent = key.encode("utf-8"), given.strip().encode("latin-1")
    if scheme.lower() != "bearer" or not hmac.compare_digest(sent, wanted):
        raise ApiError(
            401,
            "the API key is missing or wrong: send Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def too_large(most: int) -> ApiError:
    """The error for a body over the limit; the connection is closed, since its rest is unread."""
    return ApiError(
        413,
        f"the body is larger than {most:,} bytes: send less at once",
        code="body_too_large",
        headers={"Connection": "close"},
    )


def check_length(headers: Headers, most: int) -> None:
    """Raise `ApiError` if Content-Length is over the limit."""
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise ApiError(400, f"Content-Length={length!r:.40} must be an integer")
    if len(length) > 18 or int(length) > most:
        raise too_large(most)


def limited(receive: Receive, most: int) -> Receive:
    """A `receive` that raises `ApiError` once more than `most` bytes have been received."""
    received = 0

    async def receive_some() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > most:
            raise too_large(most)
        return message

    return receive_some


class RequestLog:
    """Middleware that adds security headers to every response, and logs each request in one line.

    The line has no part of prompts or generated text.
    """

    def __init__(self, app: ASGIApp, log: Callable[[str], None] | None) -> None:
        self.app, self.log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the server's startup and shutdown."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        status = 0

        async def send_safely(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(SAFE_HEADERS)
            await send(message)

        try:
            await self.app(scope, receive, send_safely)
        finally:
            if self.log is not None:
                path = quote(scope["path"])[:200]
                took = time.monotonic() - began
                self.log(f"{scope['method']} {path} {status or 'gone'} {took:.3f} s")
