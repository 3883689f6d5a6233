"""Decoding with torch, on any device: with a KV cache for our GPT, or the plain loop.

A reader is called with all text so far, one token longer at each call, and returns the logits
after it. What it remembers between calls is its own business; the answer depends on the text
alone (and, for "refill", on where the text began).
Letters: B batch, T time, L window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.config import Overflow
from mygpt.engines.contract import Request, Window
from mygpt.kv_cache import KVCache
from mygpt.model import GPT
from mygpt.sampling import next_ids


class Reader(Protocol):
    """What turns text into the next token's logits."""

    def next_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of the token after `ids` (B, T), int64; T grows by one a call."""
        ...


class PlainReader:
    """Any module whose forward returns (logits, anything) and that has `max_seq_len`.

    Reads the window anew for every token: the chapter's loop, and the cached reader's twin.
    """

    def __init__(self, model: Any, overflow: Overflow = "crop") -> None:
        self.model = model
        self.window = Window(model.max_seq_len, overflow)

    def next_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Read all of the window; see `Reader`."""
        visible = ids[:, self.window.start(ids.shape[1]) :]
        logits, _ = self.model(visible.contiguous())  # a foreign model may want to view it
        return logits[:, -1, :]


class CachedReader:
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
        """Read what the cache does not hold; see `Reader`."""
        start = self.window.start(ids.shape[1])
        if start != self._start:
            self._start = start
            self.cache.length = 0
        unread = ids[:, start + self.cache.length :]
        logits, _ = self.model(unread, cache=self.cache, last_only=True)
        return logits[:, -1, :]


def choose_reader(model: Any, batch_size: int, overflow: Overflow) -> Reader:
    """Cached for our own forward, else the plain loop."""
    if has_own_forward(model):
        return CachedReader(model, batch_size, overflow)
    return PlainReader(model, overflow)


def has_own_forward(model: Any) -> bool:
    """Whether this is our GPT with the forward we gave it."""
    return (
        isinstance(model, GPT)
        and type(model).forward is GPT.forward
        and "forward" not in vars(model)
    )


class TorchEngine:
    """Any model, on any device torch has.

    Args:
        model: a `GPT`, or a module as `PlainReader` takes; set to eval mode.
    """

    name = "torch"

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    def start(self, requests: Sequence[Request]) -> TorchDecoding:
        """Begin to decode; see `mygpt.engines.contract.Engine`."""
        return TorchDecoding(self.model, requests)


class TorchDecoding:
    """Requests that are alike but for their prompts' tokens and seeds go in one batch."""

    def __init__(self, model: Any, requests: Sequence[Request]) -> None:
        alike: dict[Any, list[int]] = {}
        for row, request in enumerate(requests):
            key = (len(request.prompt), request.sampling, request.overflow, request.max_new_tokens)
            alike.setdefault(key, []).append(row)
        self._places: dict[int, tuple[_Batch, int]] = {}
        self._batches = []
        for rows in alike.values():
            batch = _Batch(model, [requests[row] for row in rows])
            self._batches.append(batch)
            self._places |= {row: (batch, i) for i, row in enumerate(rows)}

    def advance(self, most: int) -> list[list[int]]:
        """Draw up to `most` tokens for every row; see `Decoding`."""
        new = {id(batch): batch.advance(most) for batch in self._batches}
        return [new[id(batch)][i] for _, (batch, i) in sorted(self._places.items())]

    def end(self, row: int) -> None:
        """Draw nothing more for this row."""
        batch, i = self._places[row]
        batch.ended[i] = True

    def logits(self, row: int) -> NDArray[np.float32]:
        """(V,) the prediction behind the row's last token; see `Decoding`."""
        batch, i = self._places[row]
        logits: NDArray[np.float32] = batch.last_logits[i].float().cpu().numpy()
        return logits


class _Batch:
    """Rows of one length and one way of drawing, decoded together."""

    last_logits: torch.Tensor

    def __init__(self, model: Any, requests: Sequence[Request]) -> None:
        self.requests = requests
        first = requests[0]
        self.length = len(first.prompt)
        self.room = first.room(model.max_seq_len)
        self.drawn = 0
        self.ended = [self.room == 0] * len(requests)
        self.reader = choose_reader(model, len(requests), first.overflow)
        device = next(model.parameters()).device
        prompts = torch.tensor(np.stack([request.prompt for request in requests]), device=device)
        self.text = prompts.new_empty(len(requests), self.length + self.room)  # (B, T)
        self.text[:, : self.length] = prompts

    def advance(self, most: int) -> list[list[int]]:
        new: list[list[int]] = [[] for _ in self.requests]
        for _ in range(min(most, self.room - self.drawn)):
            if all(self.ended):
                break
            for row, token in enumerate(self._step()):
                if not self.ended[row]:
                    new[row].append(token)
                    self.ended[row] = token == self.requests[row].end
        if self.drawn == self.room:
            self.ended = [True] * len(self.ended)
        return new

    def _step(self) -> list[int]:
        so_far = self.text[:, : self.length + self.drawn]
        with torch.no_grad():
            self.last_logits = self.reader.next_logits(so_far)
            streams = [request.stream for request in self.requests]
            sampling = self.requests[0].sampling
            ids = next_ids(self.last_logits, sampling, so_far, streams, self.drawn)
        self.text[:, self.length + self.drawn] = ids
        self.drawn += 1
        tokens: list[int] = ids.tolist()
        return tokens
