"""What every decoding engine takes and gives: requests in, tokens out, NumPy at the edge.

An engine starts a `Decoding` for some requests. Each call of its `advance` draws tokens for
the rows that go on. A row depends on its own request alone, never on its neighbours.
Letters: B rows, T time, L window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mygpt.config import Overflow, SamplingConfig
from mygpt.errors import InputError
from mygpt.randomness import Stream


@dataclass(frozen=True)
class Request:
    """One text to continue.

    Attributes:
        prompt: (T,) int64 token ids, at least one; may be longer than the window.
        max_new_tokens: how many tokens to draw at the most.
        sampling: how to draw them.
        stream: this row's random numbers; token n takes `stream.uniform(n)`.
        overflow: what happens past the window (see `Window`).
        end: a token that ends the row once it is drawn (it is given out too); None for none.
    """

    prompt: NDArray[np.int64]
    max_new_tokens: int
    sampling: SamplingConfig
    stream: Stream
    overflow: Overflow = "crop"
    end: int | None = None

    def room(self, max_seq_len: int) -> int:
        """How many tokens can be drawn: "stop" ends at the window's end."""
        if self.overflow != "stop":
            return self.max_new_tokens
        return max(0, min(self.max_new_tokens, max_seq_len - len(self.prompt)))


class Decoding(Protocol):
    """Rows on their way, one per request."""

    def advance(self, most: int) -> list[list[int]]:
        """Draw up to `most` tokens for every row; each row's new ids, fewer where it ended.

        A call in which nothing is drawn for any row means that all have ended.

        Raises:
            InputError: when the model predicts no numbers, or the settings overflow.
        """
        ...

    def end(self, row: int) -> None:
        """Draw nothing more for this row."""
        ...

    def logits(self, row: int) -> NDArray[np.float32]:
        """(V,) the model's own prediction behind the row's last drawn token, before filters."""
        ...


class Engine(Protocol):
    """One way of running one model."""

    @property
    def name(self) -> str:
        """The name under which `--engine` knows it."""
        ...

    def start(self, requests: Sequence[Request]) -> Decoding:
        """Begin to decode; nothing is computed yet."""
        ...


class Window:
    """Where the part of a growing text that the model sees begins.

    "crop" shows the last L tokens, always. "refill" shows a fixed start until the window is
    full, then moves on so that the newer half stays. "stop" never gets past L tokens.
    """

    def __init__(self, max_seq_len: int, overflow: Overflow) -> None:
        self.max_seq_len = max_seq_len
        self.overflow = overflow
        self._start: int | None = None

    def start(self, length: int) -> int:
        """First visible position of a text of `length` tokens; lengths never shrink."""
        newest = max(0, length - self.max_seq_len)
        if self._start is None or self.overflow == "crop":
            self._start = newest
        elif length - self._start > self.max_seq_len:
            self._start = length - max(1, self.max_seq_len // 2)
        return self._start


def check_prompt_fits(length: int, max_seq_len: int, overflow: Overflow) -> None:
    """Raise `InputError` for a prompt longer than the window where nothing may be cropped."""
    if overflow == "stop" and length > max_seq_len:
        raise InputError(
            f"the prompt has {length} tokens and the window {max_seq_len}: shorten it, or choose "
            "overflow crop or refill"
        )
