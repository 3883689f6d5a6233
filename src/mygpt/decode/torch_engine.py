"""The torch engine: `core.generation`'s decoders on any device, a compiled step, and batches.

Letters: B batch, T time, L window, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.compat import mark_static_address
from mygpt.core.config import positions_for
from mygpt.core.generation import (
    CachedDecoder,
    Decoder,
    decode,
    torch_decoder,
    uses_standard_forward,
)
from mygpt.core.kv_cache import KVCache
from mygpt.core.model import GPT
from mygpt.core.window import Overflow
from mygpt.engine import Request, SeparateBatch

_RESERVED_TOKENS = 2**12  # new tokens for which a cache has capacity from the start
_log = logging.getLogger("mygpt")


class CompiledDecoder(CachedDecoder):
    """A cached decoder whose steps of one token are compiled by `torch.compile`.

    Args:
        compiled: the step, which several decoders may share.
        positions: rounded as `positions_for` rounds: a step is compiled for each capacity.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int,
        overflow: Overflow,
        compiled: TorchCompiledStep,
        positions: int,
    ) -> None:
        super().__init__(model, batch_size, overflow, positions_for(model.max_seq_len, positions))
        self.compiled = compiled

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """See `CachedDecoder`; more than one token, or a step that fails, runs uncompiled."""
        logits = self.compiled.read(ids, self.cache) if ids.shape[1] == 1 else None
        return super().read(ids) if logits is None else logits


@dataclass
class FixedShapes(KVCache):
    """A cache for a step of one token whose position is in a tensor: only numbers change.

    Every step has the same shapes and Python sees the same values, so that a step is compiled
    once and a CUDA graph of it can be replayed. The price is attention over all L positions, those
    not filled yet under a mask.

    Attributes:
        place: (1,) int64, the token's position, below L, in place of `length`.
    """

    place: torch.Tensor = field(kw_only=True)

    def positions(self, time: int) -> torch.Tensor:
        """See `KVCache.positions`; `time` is 1."""
        return self.place

    def mask(self, time: int) -> torch.Tensor:
        """(1, L), true up to the token's own position."""
        return (torch.arange(self.keys[0].shape[2], device=self.place.device) <= self.place)[None]

    def extend(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one position (B, G, 1, D) of a layer; return the whole buffers, (B, G, L, D)."""
        self.keys[layer].index_copy_(2, self.place, keys)
        self.values[layer].index_copy_(2, self.place, values)
        return self.keys[layer], self.values[layer]


def read_token(
    model: GPT,
    ids: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    place: torch.Tensor,
) -> torch.Tensor:
    """The step that is compiled: logits (B, V) after `ids` (B, 1) at position `place` (1,).

    `keys` and `values` are a `KVCache`'s; the token's are stored in them.
    """
    cache = FixedShapes(keys, values, place=place)
    logits, _ = model(ids, cache=cache, last_only=True)
    return logits[:, -1, :]


class TorchCompiledStep:
    """`read_token` compiled by torch.compile at its first use; not tried again after a failure.

    Args:
        model: the model; its weights may change, its shape may not.
    """

    def __init__(self, model: GPT) -> None:
        self.model = model
        self._run: Callable[..., torch.Tensor] | None = None
        self._failed = False

    def read(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor | None:
        """Logits (B, V) after one more token `ids` (B, 1), which is added to the cache.

        None, with the cache unchanged, if compiling fails: one warning gives the reason.
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
        if on_cuda:  # CUDA graphs write to the cache at a fixed address, which has to be declared
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            for tensor in [*cache.keys, *cache.values]:
                mark_static_address(tensor)
        place = torch.full((1,), cache.length, device=ids.device)
        # A copy of the ids, whose strides are its own and the same for every text; and of the
        # logits, which the next replay of a CUDA graph overwrites.
        ids = ids.clone(memory_format=torch.contiguous_format)
        return self._run(self.model, ids, cache.keys, cache.values, place).clone()


def _reason(error: Exception) -> str:
    """The first line of an error that gives a reason."""
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line for line in lines if line and not line.endswith("raised:")]
    return reasons[0] if reasons else type(error).__name__


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
        self._compiled = (
            TorchCompiledStep(model) if compile and uses_standard_forward(model) else None
        )
        if compile and self._compiled is None:
            _log.warning("only mygpt's own GPT has a step to compile: this model runs uncompiled")

    def start(self, requests: Sequence[Request]) -> TorchDecoding:
        """Begin to decode; see `mygpt.engine.Engine`."""
        return TorchDecoding(self.model, requests, self._compiled)

    def open(self, size: int) -> SeparateBatch:
        """A batch of separate rows; see `mygpt.engine.Engine`."""
        vocab_size = getattr(getattr(self.model, "config", None), "vocab_size", None)
        return SeparateBatch(self, size, vocab_size=vocab_size, max_seq_len=self.model.max_seq_len)


class TorchDecoding:
    """Requests that differ only in their prompts' tokens and seeds are decoded as one batch."""

    draws_in_blocks = False

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

    def advance(self, most: int, least: int | None = None) -> list[list[int]]:
        """Draw tokens for every row; see `Decoding`."""
        count = most if least is None else least
        new = {id(batch): batch.advance(count) for batch in self._batches}
        return [new[id(batch)][i] for _, (batch, i) in sorted(self._places.items())]

    def end(self, row: int) -> None:
        """End this row: it gets no further tokens."""
        batch, i = self._places[row]
        batch.ended[i] = True

    def logits(self, row: int) -> NDArray[np.float32]:
        """(V,) the logits of the row's last token; see `Decoding`."""
        batch, i = self._places[row]
        if i not in batch.logits:
            raise ValueError("no token was drawn yet")
        logits: NDArray[np.float32] = batch.logits[i].float().cpu().numpy()
        return logits

    def passes(self, row: int) -> None:
        """Each token is drawn in a pass of its own; see `Decoding`."""


class _Batch:
    """Rows of one length with the same settings, decoded until the last of them has ended."""

    def __init__(
        self, model: Any, requests: Sequence[Request], compiled: TorchCompiledStep | None
    ) -> None:
        first, rows = requests[0], len(requests)
        self.ends = [request.ends for request in requests]
        self.remaining = first.most_tokens(model.max_seq_len)  # steps
        self.ended = [False] * rows
        self.logits: dict[int, torch.Tensor] = {}  # (V,) of each row's last token
        device = next(model.parameters()).device
        prompts = torch.tensor(np.stack([request.prompt for request in requests]), device=device)
        positions = len(first.prompt) + min(self.remaining, _RESERVED_TOKENS)
        if compiled is not None:
            self.decoder: Decoder = CompiledDecoder(
                model, rows, first.overflow, compiled, positions
            )
        else:
            self.decoder = torch_decoder(model, rows, first.overflow, positions)
        streams = [request.stream for request in requests]
        self._steps = decode(self.decoder, prompts, self.remaining, first.sampling, streams)

    def advance(self, most: int) -> list[list[int]]:
        new: list[list[int]] = [[] for _ in self.ends]
        for _ in range(min(most, self.remaining)):
            if all(self.ended):
                break
            ids, logits = next(self._steps)
            self.remaining -= 1
            for row, token in enumerate(ids.tolist()):
                if not self.ended[row]:
                    new[row].append(token)
                    self.logits[row] = logits[row]
                    self.ended[row] = token in self.ends[row]
        return new
