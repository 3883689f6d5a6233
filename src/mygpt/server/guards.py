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
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from mygpt.server.problems import SAFE_HEADERS, ApiError
from mygpt.server.settings import ServerSettings

if TYPE_CHECKING:  # server/live.py uses the checks, and works without the extra `serve`
    from starlette.datastructures import Headers
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}


class Guards:
    """Middleware that rejects requests which fail a check, and logs each request in one line.

    The line has no part of prompts or generated text. Every response gets security headers.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the server's startup and shutdown."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        from starlette.datastructures import MutableHeaders

        began, status = time.monotonic(), 0

        async def send_safely(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(SAFE_HEADERS)
            await send(message)

        try:
            await self._handle(scope, receive, send_safely)
        finally:
            if self.settings.log is not None:
                path, took = quote(scope["path"])[:200], time.monotonic() - began
                self.settings.log(f"{scope['method']} {path} {status or 'gone'} {took:.3f} s")

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import Headers

        try:
            check(Headers(scope=scope), scope["path"], self.settings)
        except ApiError as error:
            await error.answer()(scope, receive, send)
            return
        try:
            await self.app(scope, limited(receive, self.settings.max_body_bytes), send)
        except (Exception, asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a Rust library's panic: it is reported as a bug
            raise RuntimeError(f"{type(error).__name__} in a request") from error


def check(headers: Headers, path: str, settings: ServerSettings) -> None:
    """Raise `ApiError` for a request that may not use the server, or whose body is too large."""
    check_host(headers.getlist("host"), settings)
    check_origin(headers.getlist("origin"), headers["host"])
    if path not in ("/", "/write") and not path.startswith("/static/"):  # pages need no key
        _check_key(headers, settings.api_key)
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise ApiError(400, f"Content-Length={length!r:.40} must be an integer")
    if len(length) > 18 or int(length) > settings.max_body_bytes:
        raise _too_large(settings.max_body_bytes)


def check_host(
    given: Sequence[str],
    settings: ServerSettings,
    remedy: str = "start it with --allow-host NAME, or call it by its address",
) -> None:
    """Raise `ApiError` unless a request has one Host header, which names this server.

    Args:
        given: the request's Host headers.
        settings: the names of the server.
        remedy: what the error says to do.
    """
    name = host_name(given[0]) if len(given) == 1 else ""
    if not name:
        raise ApiError(400, "the request needs one Host header that names this server")
    known = name in {*_LOOPBACK_NAMES, *(host.lower() for host in settings.hosts)}
    if not known and not (settings.any_address and _is_address(name)):
        raise ApiError(
            403,
            f"the host name {name!r} is not one of this server's: {remedy}",
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


def check_origin(origins: Sequence[str], host: str) -> None:
    """Raise `ApiError` for a request of another site's page: Origin and Host headers differ."""
    for origin in origins:
        scheme, _, name = origin.partition("://")
        if scheme.lower() not in ("http", "https") or name.lower() != host.lower():
            raise ApiError(
                403,
                f"pages of {origin!r:.80} may not use this server: open this server's own page",
                code="cross_site",
            )


def _check_key(headers: Headers, key: str | None) -> None:
    """Compare the key in constant time."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    sent = given.strip().encode("latin-1")
    if key is not None and (
        scheme.lower() != "bearer" or not hmac.compare_digest(sent, key.encode("utf-8"))
    ):
        raise ApiError(
            401,
            "the API key is missing or wrong: send Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _too_large(most: int) -> ApiError:
    """The error for a body over the limit; the connection is closed, since its rest is unread."""
    return ApiError(
        413,
        f"the body is larger than {most:,} bytes: send less at once",
        code="body_too_large",
        headers={"Connection": "close"},
    )


def limited(receive: Receive, most: int) -> Receive:
    """A `receive` that raises `ApiError` once more than `most` bytes have been received."""
    received = 0

    async def receive_some() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > most:
            raise _too_large(most)
        return message

    return receive_some
