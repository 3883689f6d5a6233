"""JSON bodies of requests and their fields: each is checked, and an error names the field."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from starlette.requests import Request as HttpRequest

from mygpt.server.problems import ApiError


def invalid(param: str | None, message: str) -> ApiError:
    """The error for a field, or for the whole body if `param` is None."""
    return ApiError(400, message, param=param, code="invalid_value")


async def read_body(request: HttpRequest) -> bytes:
    """A request's body; `ApiError` if its content type is not JSON."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON: send Content-Type: application/json")
    return await request.body()


def parse_json(body_bytes: bytes) -> dict[str, Any]:
    """The JSON object of a body; `ApiError` for anything else."""
    try:
        text = body_bytes.decode("utf-8")
        body = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        why = str(error).partition("; use sys")[0]  # Python's advice about very long numbers
        raise invalid(None, f"the body is not JSON: {why}") from None
    if not isinstance(body, dict):
        raise invalid(None, "the body must be a JSON object")
    return body


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r:.80} occurs twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


class Fields:
    """A JSON object's fields, read by type; null is the same as missing."""

    def __init__(self, body: dict[str, Any], known: frozenset[str]) -> None:
        unknown = min(set(body) - known, default=None)
        if unknown is not None:
            raise ApiError(
                400,
                f"unknown field {unknown!r:.80}: the fields are {', '.join(sorted(known))}",
                param=ascii(unknown)[1:81].rstrip("'"),
                code="unknown_field",
            )
        self.values = {name: value for name, value in body.items() if value is not None}

    def integer(self, name: str, default: int | None, least: int, most: int) -> int | None:
        """An integer from `least` to `most`; `default` (or None) if the field is missing."""
        value = self.values.get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # in JSON 1.0 is 1
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise invalid(name, f"{name}={shown(value)} must be an integer from {least} to {most}")
        return value

    def flag(self, name: str) -> bool:
        """A boolean; False if the field is missing."""
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            raise invalid(name, f"{name}={shown(value)} must be true or false")
        return value

    def text(self, name: str) -> str | None:
        """A string; None if the field is missing."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise invalid(name, f"{name}={shown(value)} must be a string")
        return value


def shown(value: Any) -> str:
    """A value as JSON, shortened to one line for messages."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # a number with thousands of digits, say
        text = type(value).__name__
    return text if len(text) <= 60 else text[:60] + " ..."


def equal(value: Any, accepted: Any) -> bool:
    """Whether two values are equal in JSON: 1 equals 1.0, and does not equal true."""
    return isinstance(value, bool) == isinstance(accepted, bool) and bool(value == accepted)
