"""The server's settings: limits of sizes and times, names, and the API key."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from mygpt.errors import InputError, require_int, require_number


@dataclass(frozen=True)
class ServerSettings:
    """The server's settings; the defaults suit one machine and a handful of users.

    Attributes:
        name: the model's id, which requests must name.
        checkpoint: the value of `--checkpoint` in the command that the page shows; empty is `name`.
        tour: whether the page shows the guided tour of chapter 15.
        slots: how many rows decode together, in addition to one for the playground's predictions;
            each has a cache for a whole window.
        max_waiting: how many requests may wait for a slot; the same number of the page's requests
            may wait for a slot or a thread. Further ones get an error (429).
        max_tokens: the largest `max_tokens` of a request, per choice.
        max_choices: the largest number of choices of one request, for all its prompts.
        max_stops: the largest number of stop strings of one request.
        max_prompt_tokens: the length of the longest prompt, in tokens.
        max_body_bytes: the size of the largest request body.
        max_connections: open connections; above it, those that have waited longest for a request
            are closed.
        api_key: the key that requests must send as `Authorization: Bearer`; None for no key.
        hosts: names by which the server may be called, in addition to the loopback names.
        any_address: whether it may be called by any IP address (not by any name).
        request_limit_s: from a request's first byte to its last.
        write_limit_s: how long data sent to a client may remain unread; longer in proportion to
            what the client reads meanwhile.
        idle_limit_s: how long a connection is kept open between two requests.
        shutdown_limit_s: how long running requests may take after the server was asked to stop.
        log: called with one line for each request; None keeps no log.

    Raises:
        InputError: for a value outside its range.
    """

    name: str = "mygpt"
    checkpoint: str = ""
    tour: bool = False
    slots: int = 32
    max_waiting: int = 64
    max_tokens: int = 4096
    max_choices: int = 128
    max_stops: int = 64
    max_prompt_tokens: int = 16384
    max_body_bytes: int = 2**20
    max_connections: int = 640
    api_key: str | None = None
    hosts: tuple[str, ...] = ()
    any_address: bool = False
    request_limit_s: float = 9.5  # so that the connection is closed within ten seconds
    write_limit_s: float = 30.0
    idle_limit_s: float = 5.0
    shutdown_limit_s: float = 30.0
    log: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                require_int(field.name, value, least=1)
            elif field.type == "float":
                require_number(field.name, value)
                if not 0.0 < value < math.inf:
                    raise InputError(f"{field.name}={value} must be above 0 seconds")
        if not self.name:
            raise InputError("the model's name is empty: give an id such as mygpt")
        key = self.api_key
        if key is not None and not key.strip():
            raise InputError("the API key is empty: give a key, or None to require none")
        if key is not None and (key != key.strip() or not key.isprintable()):
            raise InputError(
                "the API key begins or ends with a space, or has characters that an HTTP header "
                "cannot have: give another key"
            )
