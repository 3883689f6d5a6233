"""Errors and answers as the API has them: JSON, in one form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

_LONGEST = 500  # characters of a message, which may quote what was sent

# The page loads its own files alone and nothing frames it; answers that are no page obey too.
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
    """A request that is not done, and why.

    Attributes:
        status: the HTTP status.
        message: what is wrong, and the remedy.
        param: the request's field at fault, if one is.
        code: a word for programs.
        headers: more headers of the answer.
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
        """The body of the answer."""
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
        """The answer itself."""
        return json_answer(self.to_dict(), self.status, self.headers | SAFE_HEADERS)


def busy(waiting: int) -> ApiError:
    """What is answered where too many wait."""
    return ApiError(
        429,
        f"{waiting} requests wait already: try again in a second",
        code="queue_full",
        headers={"Retry-After": "1"},
    )


def closing() -> ApiError:
    """What is answered while the server ends."""
    return ApiError(503, "the server is shutting down: ask another one", code="shutting_down")


def restarted() -> ApiError:
    """What is answered to requests that were in a batch when it failed."""
    return ApiError(
        500,
        "decoding failed for this request or for one beside it, and begins anew: try again",
        code="worker_died",
    )


def broken() -> ApiError:
    """What is answered once decoding has ended for good."""
    return ApiError(
        500, "decoding has failed for good: the server has to be started anew", code="worker_died"
    )


def row_failed(error: BaseException) -> ApiError:
    """What is answered where decoding this request raised something of the server's own."""
    if isinstance(error, MemoryError):
        return ApiError(500, "there is no memory left for this request", code="out_of_memory")
    return ApiError(500, "this request failed: the server's log says more", code="bug")


def to_json(content: Any) -> bytes:
    """JSON in ASCII: a text may hold what UTF-8 cannot."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def json_answer(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer in JSON; `content` may be JSON already, as bytes."""
    body = content if isinstance(content, bytes) else to_json(content)
    return Response(body, status, headers, media_type="application/json")
