"""Keys and values of the tokens a model has read, so that decoding reads each token once.

Letters: B batch, T new tokens, P tokens in the cache, G key/value heads, D head size, N layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mygpt.core.config import GPTConfig, positions_for


@dataclass
class KVCache:
    """Buffers for keys and values of every layer, filled from the left; they grow.

        keys[layer]  (B, G, capacity, D)    | 0 ... P-1 | new: P ... P+T-1 | unused |

    Attributes:
        keys: N tensors (B, G, capacity, D), one a layer.
        values: likewise.
        length: P, the same in every layer and row.
    """

    keys: list[Tensor]
    values: list[Tensor]
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
        """A cache without tokens; `positions` is its first capacity; None: see `positions_for`."""
        first = positions_for(config.max_seq_len) if positions is None else positions
        first = max(1, min(first, config.max_seq_len))
        shape = (batch_size, config.kv_heads, first, config.head_size)
        keys, values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
            for _ in range(2)
        )
        return cls(keys, values)

    def positions(self, time: int) -> slice | Tensor:
        """The positions of the next `time` tokens, as an index."""
        return slice(self.length, self.length + time)

    def mask(self, time: int) -> Tensor | None:
        """(T, P + T), true where a new token attends: at all earlier tokens and at itself.

        None where no mask is needed: an empty cache leaves it to causal attention, and a single
        new token attends to everything.
        """
        if self.length == 0 or time == 1:
            return None
        shape, device = (time, self.length + time), self.keys[0].device
        return torch.ones(shape, dtype=torch.bool, device=device).tril(self.length)

    def reserve(self, count: int) -> None:
        """Grow to a capacity of at least `count` tokens, and at least twice the present one."""
        capacity = self.keys[0].shape[2]
        if count <= capacity:
            return
        more = max(count, 2 * capacity) - capacity
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = F.pad(tensor, (0, 0, 0, more))

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store those of T new tokens (B, G, T, D) in a layer; return all, (B, G, P + T, D).

        `length` changes only after the last layer: see `advance`.
        """
        end = self.length + keys.shape[2]
        self.reserve(end)
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, time: int) -> None:
        """Count `time` tokens as read, after every layer has stored them."""
        self.length += time
