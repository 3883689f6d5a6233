"""Keys and values of the positions a model has read, so that a step reads one token only.

Letters: B batch, T time, H key/value heads, D head size, L window, N layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mygpt.config import GPTConfig


@dataclass
class KVCache:
    """Room for L positions of every layer, filled from the left.

    Attributes:
        keys: (N, B, H, L, D).
        values: (N, B, H, L, D).
        length: positions filled so far, the same in every layer and row.
    """

    keys: torch.Tensor
    values: torch.Tensor
    length: int = 0

    @classmethod
    def empty(
        cls, config: GPTConfig, batch_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> KVCache:
        """A cache with nothing in it, for `batch_size` rows."""
        shape = (
            config.num_layers,
            batch_size,
            config.kv_heads,
            config.max_seq_len,
            config.head_size,
        )
        keys = torch.zeros(shape, device=device, dtype=dtype)
        return cls(keys, torch.zeros_like(keys))

    @property
    def batch_size(self) -> int:
        """B, rows this cache holds."""
        return self.keys.shape[1]

    def extend(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store T new positions (B, H, T, D) of a layer; return all so far, (B, H, length+T, D).

        `length` itself moves on once every layer has stored its positions: see `advance`.
        """
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, steps: int) -> None:
        """Count `steps` positions as read, after the last layer stored them."""
        self.length += steps
