"""The interface of all decoding engines: requests in, tokens out, as NumPy arrays.

An engine starts a `Decoding` for some requests, or opens a `Batch` that requests join and leave.
Each call of `advance` draws tokens for the rows that have not ended. A row's tokens depend only on
its own request, not on other rows.
Letters: B rows, T time, L window, V vocabulary.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mygpt.core.config import GPTConfig, SamplingConfig
from mygpt.core.random import Stream
from mygpt.core.window import Overflow
from mygpt.errors import InputError

# What NumPy and the machine code implement, of decoding and of training.
_EVERY_VALUE = frozenset({
    "vocab_size", "embed_dim", "num_heads", "num_layers", "max_seq_len", "dropout", "num_kv_heads",
    "head_dim", "mlp_dim", "norm_eps", "rope_base", "attention_bias", "mlp_bias", "qk_norm", "tied",
})  # fmt: skip
_VALUES = {
    "norm": ("layer", "rms"),
    "position": ("learned", "rotary"),
    "mlp": ("gelu", "gelu_tanh", "swiglu"),
}


@functools.cache
def only_in_torch(config: GPTConfig) -> str | None:
    """The first option of a model, as "position=alibi", that only `core` implements; None for none.

    Such a model is decoded and trained by torch alone. An option that is not listed here may have
    its default only, with which the block is the tutorial's.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        known = _VALUES.get(field.name, (field.default,))
        if field.name not in _EVERY_VALUE and value not in known:
            return f"{field.name}={value}"
    return None


@dataclass(frozen=True)
class Request:
    """One text to continue.

    Attributes:
        prompt: (T,) int64 token ids, at least one; may be longer than the window.
        max_new_tokens: the largest number of tokens to draw.
        sampling: how to draw them.
        stream: this row's random numbers; token n takes `stream.uniform(n)`.
        overflow: what happens past the window (see `Window`).
        end: a token, or several, that end the row once one is drawn (it is returned too); None
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

    def most_tokens(self, max_seq_len: int) -> int:
        """The largest number of tokens that can be drawn: "stop" ends at the window's end."""
        if self.overflow != "stop":
            return self.max_new_tokens
        return max(0, min(self.max_new_tokens, max_seq_len - len(self.prompt)))


class Decoding(Protocol):
    """Rows that are being decoded, one for each request.

    Attributes:
        draws_in_blocks: whether a call of `advance` should draw many tokens, because a step takes
            less time than a call.
    """

    draws_in_blocks: bool

    def advance(self, most: int, least: int | None = None) -> list[list[int]]:
        """Draw up to `most` tokens for every row; each row's new ids, fewer where it ended.

        If nothing is drawn for any row, all have ended.

        Args:
            most: tokens of a row.
            least: an engine may draw fewer than `most`, but so many; None is `most`.

        Raises:
            InputError: if logits are not finite, or the sampling settings make them overflow.
        """
        ...

    def end(self, row: int) -> None:
        """End this row: it gets no further tokens."""
        ...

    def logits(self, row: int) -> NDArray[np.float32]:
        """(V,) the logits that the row's last token was drawn from, before penalty and filters."""
        ...

    def passes(self, row: int) -> int | None:
        """In how many passes of the model the row's tokens were drawn; None for one each."""
        ...


class Batch(Protocol):
    """Rows that join and leave between tokens, each in a slot; for one thread at a time."""

    @property
    def size(self) -> int:
        """The number of slots."""
        ...

    @property
    def active(self) -> int:
        """The number of rows that have not ended."""
        ...

    def join(self, request: Request) -> int:
        """Take a free slot and return its number; nothing is computed yet.

        The caller has to make sure that a slot is free.

        Raises:
            InputError: for a prompt that is empty, does not fit, or has an id outside the
                vocabulary; the slot then stays free.
        """
        ...

    def advance(self, most: int, least: int | None = None) -> dict[int, list[int]]:
        """Draw up to `most` tokens for every row; each joined slot's new ids.

        `least` is as for `Decoding.advance`. They are fewer if the row ended, and [] if it had
        ended before. Slots whose prompts are still being read, in pieces so that the others need
        not wait, are not in the result.
        """
        ...

    def failures(self) -> dict[int, InputError]:
        """The slots that failed in the last `advance`, each with its error.

        Their logits were not finite, or their settings made them overflow. Such a row ends; the
        tokens drawn before were returned, and other rows are not affected.
        """
        ...

    def end(self, slot: int) -> None:
        """Free a slot, whether its row had ended or not."""
        ...

    def logits(self, slot: int) -> NDArray[np.float32]:
        """(V,) the logits of the row's last drawn token (see `Decoding`), until `end`."""
        ...


class Engine(Protocol):
    """One way of running one model."""

    @property
    def name(self) -> str:
        """Its name for `--engine`."""
        ...

    def start(self, requests: Sequence[Request]) -> Decoding:
        """Begin to decode; nothing is computed yet."""
        ...

    def open(self, size: int) -> Batch:
        """A batch of `size` free slots."""
        ...


@dataclass
class _Row:
    """The decoding of one row, and how many more tokens it may draw."""

    decoding: Decoding
    left: int
    ends: frozenset[int]


class SeparateBatch:
    """See `mygpt.engine.Batch`; rows share no computation.

    Args:
        engine: starts the decodings.
        size: the number of slots.
        vocab_size: V of its model; None if it is not known: then ids are not checked.
        max_seq_len: the model's window.
    """

    def __init__(
        self, engine: Engine, size: int, *, vocab_size: int | None, max_seq_len: int
    ) -> None:
        self._engine, self._vocab_size, self._max_seq_len = engine, vocab_size, max_seq_len
        self._rows: dict[int, _Row] = {}  # by slot
        self._size = size
        self._free = deque(range(size))
        self._failures: dict[int, InputError] = {}

    @property
    def size(self) -> int:
        """The number of slots."""
        return self._size

    @property
    def active(self) -> int:
        """The number of rows that have not ended."""
        return sum(row.left > 0 for row in self._rows.values())

    def join(self, request: Request) -> int:
        """Take a free slot; see `Batch`."""
        assert self._free, "no slot is free: the caller has to count them"
        check_prompt_fits(len(request.prompt), self._max_seq_len, request.overflow)
        if self._vocab_size is not None:
            check_prompt_ids(request.prompt, self._vocab_size)
        row = _Row(
            self._engine.start([request]), request.most_tokens(self._max_seq_len), request.ends
        )
        slot = self._free.popleft()
        self._rows[slot] = row
        return slot

    def advance(self, most: int, least: int | None = None) -> dict[int, list[int]]:
        """Draw tokens for every row; see `Batch`."""
        most = most if least is None else least
        self._failures = {}
        new: dict[int, list[int]] = {slot: [] for slot in self._rows}
        for slot, row in self._rows.items():
            try:
                # One by one: tokens drawn before a failure are returned.
                while row.left > 0 and len(new[slot]) < most:
                    (ids,) = row.decoding.advance(1)
                    new[slot] += ids
                    row.left = row.left - 1 if row.ends.isdisjoint(ids) else 0
            except InputError as error:
                self._failures[slot], row.left = error, 0
        return new

    def failures(self) -> dict[int, InputError]:
        """The slots that failed in the last `advance`; see `Batch`."""
        return dict(self._failures)

    def end(self, slot: int) -> None:
        """Free a slot and its row's cache; see `Batch`."""
        del self._rows[slot]
        self._free.append(slot)

    def logits(self, slot: int) -> NDArray[np.float32]:
        """(V,) the logits of the row's last token; see `Batch`."""
        return self._rows[slot].decoding.logits(0)


def check_prompt_ids(prompt: NDArray[np.int64], vocab_size: int) -> None:
    """Raise `InputError` for a prompt without tokens, or with ids outside the vocabulary."""
    if not len(prompt):
        raise InputError("the prompt has no tokens: give at least one")
    outside = (prompt < 0) | (prompt >= vocab_size)
    if outside.any():
        raise InputError(
            f"prompt holds id {prompt[outside][0]}: this model's ids are 0 to {vocab_size - 1}"
        )


def check_prompt_fits(length: int, max_seq_len: int, overflow: Overflow) -> None:
    """Raise `InputError` for a prompt longer than the window under "stop", which never crops."""
    if overflow == "stop" and length > max_seq_len:
        raise InputError(
            f"the prompt has {length} tokens and the window {max_seq_len}: shorten it, or choose "
            "overflow crop or refill"
        )


def rotary_angles(
    config: GPTConfig, positions: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines of the first positions' angles, each (L, D), as the model has them."""
    # Pair i of D / 2 rotates by position * base**(-2i / D) (Su et al., 2021); both elements of a
    # pair, i and i + D / 2, have the same angle, so each row contains the angles twice.
    half = config.head_size // 2
    powers = -np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.power(np.float32(config.rope_base), powers)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies
    angles = np.concatenate([angles, angles], axis=1)
    return np.cos(angles), np.sin(angles)


def fresh_seed() -> int:
    """A random seed from the operating system, of 32 bits."""
    import secrets

    return secrets.randbits(32)
