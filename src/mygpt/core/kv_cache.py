"""Keys and values of the positions a model has read, so that a step reads one token only.

A cache tells the model where the new tokens stand, what they may look at, and keeps their keys
and values. `KVCache` hands out the part that is filled, which grows; `FixedShapes` always hands
out all of it, and so serves compiled steps.
Letters: B batch, T time, G key/value heads, D head size, L window, N layers, P positions read
before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mygpt.core.config import GPTConfig, positions_for


@dataclass
class KVCache:
    """Room for positions of every layer, filled from the left; it grows where they do not fit.

    Attributes:
        keys: N tensors (B, G, L, D), one a layer; L is the room there is.
        values: N tensors (B, G, L, D).
        length: positions filled so far (P), the same in every layer and row.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    length: int = 0

    @classmethod
    def empty(
        cls,
        config: GPTConfig,
        batch_size: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        positions: int | None = None,
    ) -> KVCache:
        """A cache with nothing in it, for `batch_size` rows.

        Args:
            config: the model's.
            batch_size: B.
            device: where its tensors are.
            dtype: the numbers' type.
            positions: how many it has room for at first; None is all of a usual window's.
        """
        first = positions_for(config.max_seq_len) if positions is None else positions
        first = max(1, min(first, config.max_seq_len))
        shape = (batch_size, config.kv_heads, first, config.head_size)
        keys, values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
            for _ in range(2)
        )
        return cls(keys, values)

    @property
    def batch_size(self) -> int:
        """B, rows this cache holds."""
        return self.keys[0].shape[0]

    def positions(self, time: int) -> slice | torch.Tensor:
        """Where the next `time` tokens stand: an index into a table of positions."""
        return slice(self.length, self.length + time)

    def mask(self, time: int) -> torch.Tensor | None:
        """What the next `time` tokens may look at: (T, P + T), true at the past and at itself.

        None where no mask is needed: without a past the order alone decides, and a single
        token may look at everything.
        """
        if self.length == 0 or time == 1:
            return None
        shape, device = (time, self.length + time), self.keys[0].device
        return torch.ones(shape, dtype=torch.bool, device=device).tril(self.length)

    def reserve(self, count: int) -> None:
        """Have room for `count` positions: twice as many as before, or more."""
        room = self.keys[0].shape[2]
        if count <= room:
            return
        more = max(count, 2 * room) - room
        for tensors in (self.keys, self.values):
            for layer, held in enumerate(tensors):
                tensors[layer] = F.pad(held, (0, 0, 0, more))

    def extend(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store T new positions (B, G, T, D) of a layer; return all so far, (B, G, P + T, D).

        `length` itself moves on once every layer has stored its positions: see `advance`.
        """
        end = self.length + keys.shape[2]
        self.reserve(end)
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, steps: int) -> None:
        """Count `steps` positions as read, after the last layer stored them."""
        self.length += steps
