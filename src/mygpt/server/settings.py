"""What a server allows: how much at once, how long, to whom."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mygpt.core.config import require_int, require_number
from mygpt.errors import InputError

_COUNTS = (
    "slots",
    "max_waiting",
    "max_tokens",
    "max_choices",
    "max_stops",
    "max_prompt_tokens",
    "max_body_bytes",
    "max_connections",
)
_TIMES = ("request_limit_s", "write_limit_s", "idle_limit_s", "shutdown_limit_s")


@dataclass(frozen=True)
class ServerSettings:
    """Limits and names; the defaults suit one machine and a handful of people.

    Attributes:
        name: the model's id, which requests name.
        checkpoint: what `--checkpoint` takes on this machine, for the command that the page
            shows; empty is the name.
        slots: rows that decode together, beside one for the playground's looks; each has room
            for a whole window.
        max_waiting: requests that may wait for a slot, and requests of the page that may wait for
            a slot or a thread; more are refused (429).
        max_tokens: the most that a request may ask for, for each choice.
        max_choices: the most choices of one request, all its prompts together.
        max_stops: the most stop strings of one request.
        max_prompt_tokens: the longest prompt.
        max_body_bytes: the largest body of a request.
        max_connections: open connections; past it those go that wait for a request longest.
        api_key: what requests must carry as `Authorization: Bearer`; None for no key.
        hosts: names by which the server may be called, beside this machine's own loopback.
        any_address: whether it may be called by any IP address too (not by any name).
        request_limit_s: from a request's first byte to its last.
        write_limit_s: how long a client may be behind with what was written to it, and the more
            the more it reads meanwhile.
        idle_limit_s: how long a connection is kept between two requests.
        shutdown_limit_s: how long answers on their way may take once the server is to end.
        log: takes one line for each request; None keeps no log.

    Raises:
        InputError: for a value outside its range.
    """

    name: str = "mygpt"
    checkpoint: str = ""
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
    request_limit_s: float = 9.5  # so that all have gone after ten
    write_limit_s: float = 30.0
    idle_limit_s: float = 5.0
    shutdown_limit_s: float = 30.0
    log: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            require_int(name, getattr(self, name), least=1)
        for name in _TIMES:
            require_number(name, getattr(self, name))
            if not 0.0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)} must be above 0 seconds")
        if not self.name:
            raise InputError("name is empty: a model needs an id, such as mygpt")
        key = self.api_key
        if key is not None and not key.strip():
            raise InputError("the API key is empty: give one of some characters, or none")
        if key is not None and (key != key.strip() or not key.isprintable()):
            raise InputError("the API key has a space at an end, or characters no header can carry")
