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
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mygpt.server.problems import SAFE_HEADERS, ApiError
from mygpt.server.settings import ServerSettings

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
    _check_host(headers, settings)
    _check_origin(headers)
    if path != "/" and not path.startswith("/static/"):  # the page's files need no key
        _check_key(headers, settings.api_key)
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise ApiError(400, f"Content-Length={length!r:.40} must be an integer")
    if len(length) > 18 or int(length) > settings.max_body_bytes:
        raise _too_large(settings.max_body_bytes)


def _check_host(headers: Headers, settings: ServerSettings) -> None:
    given = headers.getlist("host")
    name = host_name(given[0]) if len(given) == 1 else ""
    if not name:
        raise ApiError(400, "the request needs one Host header that names this server")
    known = name in {*_LOOPBACK_NAMES, *(host.lower() for host in settings.hosts)}
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


def _check_origin(headers: Headers) -> None:
    for origin in headers.getlist("origin"):
        scheme, _, host = origin.partition("://")
        if scheme.lower() not in ("http", "https") or host.lower() != headers["host"].lower():
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
