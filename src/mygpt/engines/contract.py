"""What every decoding engine takes and gives: requests in, tokens out, NumPy at the edge.

An engine starts a `Decoding` for some requests, or opens a `Batch` that requests join and leave.
Each call of `advance` draws tokens for the rows that go on. A row depends on its own request
alone, never on its neighbours.
Letters: B rows, T time, L window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mygpt.core.config import SamplingConfig
from mygpt.core.random import Stream
from mygpt.core.window import Overflow
from mygpt.errors import InputError


@dataclass(frozen=True)
class Request:
    """One text to continue.

    Attributes:
        prompt: (T,) int64 token ids, at least one; may be longer than the window.
        max_new_tokens: how many tokens to draw at the most.
        sampling: how to draw them.
        stream: this row's random numbers; token n takes `stream.uniform(n)`.
        overflow: what happens past the window (see `Window`).
        end: a token, or several, that end the row once one is drawn (it is given out too); None
            for none.
    """

    prompt: NDArray[np.int64]
    max_new_tokens: int
    sampling: SamplingConfig
    stream: Stream
    overflow: Overflow = "crop"
    end: int | tuple[int, ...] | None = None

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end the row."""
        if self.end is None:
            return frozenset()
        return frozenset({self.end} if isinstance(self.end, int) else self.end)

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


class Batch(Protocol):
    """Rows that come and go between tokens, each in a slot; for one thread at a time."""

    @property
    def size(self) -> int:
        """How many slots there are."""
        ...

    @property
    def active(self) -> int:
        """How many rows still draw."""
        ...

    def join(self, request: Request) -> int:
        """Take a free slot and return its number; nothing is computed yet.

        The caller counts: there must be one that is free.

        Raises:
            InputError: for a prompt that is empty, does not fit, or holds an id that the model
                does not know; the slot then stays free.
        """
        ...

    def advance(self, most: int) -> dict[int, list[int]]:
        """Draw up to `most` tokens for every row; each joined slot's new ids.

        They are fewer than `most` where the row ended, [] where it has nothing more. A slot
        whose prompt is still being read, in pieces so that the others need not wait, is
        not among them.
        """
        ...

    def failures(self) -> dict[int, InputError]:
        """The slots that failed in the last `advance`, each with its error.

        The model predicted no numbers, or the row's settings overflow. Such a row draws nothing
        more; what it drew before was given out, and the other rows lose nothing.
        """
        ...

    def end(self, slot: int) -> None:
        """Free a slot, whether its row had ended or not."""
        ...

    def logits(self, slot: int) -> NDArray[np.float32]:
        """(V,) the prediction behind the row's last drawn token (see `Decoding`), until `end`."""
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

    def open(self, size: int) -> Batch:
        """A batch of `size` slots, none of them taken."""
        ...


def check_prompt_ids(prompt: NDArray[np.int64], vocab_size: int) -> None:
    """Raise `InputError` for a prompt without tokens, or with ids that the model does not know."""
    if not len(prompt):
        raise InputError("the prompt has no tokens: give at least one")
    outside = (prompt < 0) | (prompt >= vocab_size)
    if outside.any():
        raise InputError(
            f"prompt holds id {prompt[outside][0]}: this model's ids run from 0 to {vocab_size - 1}"
        )


def fresh_seed() -> int:
    """A seed from the operating system, short enough to be read aloud (32 bits)."""
    import secrets

    return secrets.randbits(32)
