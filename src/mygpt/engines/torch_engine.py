"""Decoding with torch, on any device: with a KV cache for our GPT, or the plain loop.

An engine is called with all text so far, one token longer at each call, and returns the
logits after it. What it remembers between calls is its own business; the answer depends on
the text alone (and, for "refill", on where the text began).
Letters: B batch, T time, L window, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from mygpt.config import Overflow
from mygpt.kv_cache import KVCache
from mygpt.model import GPT


class Engine(Protocol):
    """The contract of all engines."""

    def next_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of the token after `ids` (B, T), int64; T grows by one a call."""
        ...


class PlainEngine:
    """Any module whose forward returns (logits, anything) and that has `max_seq_len`.

    Reads the window anew for every token: the chapter's loop, and the cached engine's twin.
    """

    def __init__(self, model: Any, overflow: Overflow = "crop") -> None:
        self.model = model
        self.window = Window(model.max_seq_len, overflow)

    def next_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Read all of the window; see `Engine`."""
        visible = ids[:, self.window.start(ids.shape[1]) :]
        logits, _ = self.model(visible.contiguous())  # a foreign model may want to view it
        return logits[:, -1, :]


class CachedEngine:
    """Our GPT with a KV cache: inside the window, one token is read per step."""

    def __init__(self, model: GPT, batch_size: int, overflow: Overflow = "crop") -> None:
        self.model = model
        weight = model.token_embedding.weight
        self.cache = KVCache.empty(
            model.config, batch_size, device=weight.device, dtype=weight.dtype
        )
        self.window = Window(model.max_seq_len, overflow)
        self._start = 0

    def next_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Read what the cache does not hold; see `Engine`."""
        start = self.window.start(ids.shape[1])
        if start != self._start:
            self._start = start
            self.cache.length = 0
        unread = ids[:, start + self.cache.length :]
        logits, _ = self.model(unread, cache=self.cache, last_only=True)
        return logits[:, -1, :]


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
