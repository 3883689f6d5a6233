"""Decoding with torch, on any device: with a KV cache for our GPT, or the plain loop.

A reader is called with all text so far, one token longer at each call, and returns the logits
after it. What it remembers between calls is its own business; the answer depends on the text
alone (and, for "refill", on where the text began).
Letters: B batch, T time, L window, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.core.config import Overflow, positions_for
from mygpt.core.kv_cache import FixedShapes, KVCache
from mygpt.core.model import GPT, evaluating
from mygpt.core.sampling import next_ids
from mygpt.engines.batch import SeparateBatch
from mygpt.engines.contract import Request, Window

_MOST_RESERVED = 2**12  # new tokens that a cache has room for from the start
_log = logging.getLogger("mygpt")


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
    """Our GPT with a KV cache: inside the window, one token is read per step.

    The cache's filled part is read, which is the least work; with a `compiled` step, single
    tokens go through that.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int,
        overflow: Overflow = "crop",
        compiled: TorchCompiledStep | None = None,
        positions: int | None = None,
    ) -> None:
        self.model = model
        self.compiled = compiled
        weight = model.token_embedding.weight
        if positions is not None and compiled is not None:  # a step is compiled for each room
            positions = positions_for(model.max_seq_len, positions)
        self.cache = KVCache.empty(
            model.config,
            batch_size,
            device=weight.device,
            dtype=weight.dtype,
            positions=positions,
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
        if self.compiled is not None and unread.shape[1] == 1:
            stepped = self.compiled.read(unread, self.cache)
            if stepped is not None:
                return stepped
        logits, _ = self.model(unread, cache=self.cache, last_only=True)
        return logits[:, -1, :]


def choose_reader(
    model: Any,
    batch_size: int,
    overflow: Overflow,
    compiled: TorchCompiledStep | None = None,
    positions: int | None = None,
) -> Reader:
    """Cached for our own forward, else the plain loop; for texts of so many tokens."""
    if has_own_forward(model):
        return CachedReader(model, batch_size, overflow, compiled, positions)
    return PlainReader(model, overflow)


def has_own_forward(model: Any) -> bool:
    """Whether this is our GPT with the forward we gave it."""
    return (
        isinstance(model, GPT)
        and type(model).forward is GPT.forward
        and "forward" not in vars(model)
    )


def read_token(
    model: GPT,
    ids: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    place: torch.Tensor,
) -> torch.Tensor:
    """The step that is compiled: logits (B, V) after `ids` (B, 1) at position `place` (1,).

    `keys` and `values` are a `KVCache`'s; they take in the token's.
    """
    cache = FixedShapes(keys, values, place=place)
    logits, _ = model(ids, cache=cache, last_only=True)
    return logits[:, -1, :]


class TorchCompiledStep:
    """`read_token` by torch.compile, when first used; after any failure of it, nothing more.

    Args:
        model: what reads; its weights may change, its shape may not.
    """

    def __init__(self, model: GPT) -> None:
        self.model = model
        self._run: Callable[..., torch.Tensor] | None = None
        self._failed = False

    def read(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor | None:
        """Logits (B, V) after one more token `ids` (B, 1), which the cache takes in.

        None, and the cache as it was, where compiling fails: a warning tells why, once.
        """
        if self._failed:
            return None
        try:
            logits = self._step(ids, cache)
        except Exception as error:  # whatever torch, its backends or their compilers raise
            self._failed = True
            _log.warning("torch.compile failed, so steps run uncompiled: %s", _reason(error))
            return None
        cache.advance(1)
        return logits

    def _step(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        on_cuda = ids.device.type == "cuda"
        cache.reserve(cache.length + 1)
        self.model.reserve_positions(cache.keys[0].shape[2])
        if self._run is None:
            mode = "reduce-overhead" if on_cuda else None
            self._run = torch.compile(read_token, fullgraph=True, mode=mode)
        if on_cuda:  # its graphs write to the cache where it lies, which has to be told
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            for tensor in [*cache.keys, *cache.values]:
                torch._dynamo.mark_static_address(tensor, guard=False)
        place = torch.full((1,), cache.length, device=ids.device)
        # A copy of the ids, whose strides are its own and the same for every text; and of the
        # logits, which the next replay of a CUDA graph overwrites.
        ids = ids.clone(memory_format=torch.contiguous_format)
        return self._run(self.model, ids, cache.keys, cache.values, place).clone()


def _reason(error: Exception) -> str:
    """The first line of an error that tells something."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.endswith("raised:")]
    return telling[0] if telling else type(error).__name__


class TorchEngine:
    """Any model, on any device torch has.

    Args:
        model: a `GPT`, or a module as `PlainReader` takes; in eval mode while it reads.
        compile: compile the step that reads one token, when it is first needed: it takes up to
            a minute, and then long texts are written faster. Only a `GPT` has such a step, and
            past the window "crop" reads all of it again instead.
    """

    name = "torch"

    def __init__(self, model: Any, compile: bool = False) -> None:
        self.model = model
        self._compiled = TorchCompiledStep(model) if compile and has_own_forward(model) else None
        if compile and self._compiled is None:
            _log.warning("only mygpt's own GPT has a step to compile: this model runs uncompiled")

    def start(self, requests: Sequence[Request]) -> TorchDecoding:
        """Begin to decode; see `mygpt.engines.contract.Engine`."""
        return TorchDecoding(self.model, requests, self._compiled)

    def open(self, size: int) -> SeparateBatch:
        """A batch of rows of their own; see `mygpt.engines.contract.Engine`."""
        vocab_size = getattr(getattr(self.model, "config", None), "vocab_size", None)
        return SeparateBatch(self, size, vocab_size=vocab_size, max_seq_len=self.model.max_seq_len)


class TorchDecoding:
    """Requests that are alike but for their prompts' tokens and seeds go in one batch."""

    def __init__(
        self, model: Any, requests: Sequence[Request], compiled: TorchCompiledStep | None = None
    ) -> None:
        alike: dict[Any, list[int]] = {}
        for row, request in enumerate(requests):
            key = (len(request.prompt), request.sampling, request.overflow, request.max_new_tokens)
            alike.setdefault(key, []).append(row)
        self._places: dict[int, tuple[_Batch, int]] = {}
        self._batches = []
        for rows in alike.values():
            batch = _Batch(model, [requests[row] for row in rows], compiled)
            self._batches.append(batch)
            self._places |= {row: (batch, i) for i, row in enumerate(rows)}

    def advance(self, most: int) -> list[list[int]]:
        """Draw up to `most` tokens for every row; see `Decoding`."""
        new = {id(batch): batch.advance(most) for batch in self._batches}
        return [new[id(batch)][i] for _, (batch, i) in sorted(self._places.items())]

    def end(self, row: int) -> None:
        """Draw nothing more for this row."""
        batch, i = self._places[row]
        batch.end(i)

    def logits(self, row: int) -> NDArray[np.float32]:
        """(V,) the prediction behind the row's last token; see `Decoding`."""
        batch, i = self._places[row]
        logits: NDArray[np.float32] = batch.logits(i).float().cpu().numpy()
        return logits


class _Batch:
    """Rows of one length and one way of drawing, decoded together until the last has ended."""

    def __init__(
        self, model: Any, requests: Sequence[Request], compiled: TorchCompiledStep | None
    ) -> None:
        self.model, self.requests = model, requests
        self.ends = [request.ends for request in requests]
        first = requests[0]
        self.length = len(first.prompt)
        self.room = first.room(model.max_seq_len)
        self.drawn = 0
        self.ended = [self.room == 0] * len(requests)
        self._newest: torch.Tensor | None = None  # (B, V), the last step's logits
        self._final: dict[int, torch.Tensor] = {}  # (V,) logits of rows that ended before others
        positions = self.length + min(self.room, _MOST_RESERVED)
        self.reader = choose_reader(model, len(requests), first.overflow, compiled, positions)
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
                    if token in self.ends[row]:
                        self.end(row)
        if self.drawn == self.room:
            self.ended = [True] * len(self.ended)
        return new

    def end(self, row: int) -> None:
        if not self.ended[row] and self._newest is not None:
            self._final[row] = self._newest[row]  # the others' steps go on to change it
        self.ended[row] = True

    def logits(self, row: int) -> torch.Tensor:
        if self._newest is None:
            raise ValueError("no token was drawn yet")
        return self._final.get(row, self._newest[row])

    def _step(self) -> list[int]:
        so_far = self.text[:, : self.length + self.drawn]
        with evaluating(self.model):
            self._newest = self.reader.next_logits(so_far)
            streams = [request.stream for request in self.requests]
            sampling = self.requests[0].sampling
            ids = next_ids(self._newest, sampling, so_far, streams, self.drawn)
        self.text[:, self.length + self.drawn] = ids
        self.drawn += 1
        tokens: list[int] = ids.tolist()
        return tokens
