"""The API's errors and JSON responses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.responses import Response

_LONGEST = 500  # characters of a message, which may quote a request

# The page loads only its own files, and no page may frame it. All responses have these headers.
SAFE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error response.

    Attributes:
        status: the HTTP status.
        message: the problem, and the remedy.
        param: the request's field that is not valid, if it is one.
        code: an identifier for programs.
        headers: additional headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if len(message) > _LONGEST:
            message = message[:_LONGEST] + " ..."
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def to_dict(self) -> dict[str, Any]:
        """The body of the response."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    def answer(self) -> Response:
        """The response."""
        return json_answer(self.to_dict(), self.status, self.headers | SAFE_HEADERS)


def busy(waiting: int) -> ApiError:
    """The error if too many requests wait."""
    message = f"{waiting} requests are waiting already: try again in a second"
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})


def closing() -> ApiError:
    """The error while the server shuts down."""
    message = "the server is shutting down: try again when it is restarted"
    return ApiError(503, message, code="shutting_down")


def restarted() -> ApiError:
    """The error for requests that were in a batch when it failed."""
    message = "decoding failed for this request or another one of its batch: try again"
    return ApiError(500, message, code="worker_died")


def broken() -> ApiError:
    """The error after decoding has failed and could not be restarted."""
    message = "decoding failed and could not be restarted: restart the server"
    return ApiError(500, message, code="worker_died")


def to_json(content: Any) -> bytes:
    """JSON in ASCII: a text may have lone surrogates, which UTF-8 cannot encode."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def json_answer(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON response; `content` may be encoded already, as bytes."""
    from starlette.responses import Response  # server/live.py works without it

    body = content if isinstance(content, bytes) else to_json(content)
    return Response(body, status, headers, media_type="application/json")
