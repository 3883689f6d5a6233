"""The tutorial's recipe in simple PyTorch.

Three projections, explicit softmax attention with a mask, windows stacked one by one, AdamW
with its defaults at a constant rate: 4 layers of width 64 with 4 heads, 16 windows of 64 per
step; 207,296 parameters with 65 characters.
Letters: B batch, T time, C embedding, H heads, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

C, HEADS, LAYERS, WINDOW, BATCH, RATE = 64, 4, 4, 64, 16, 1e-3


class Attention(nn.Module):
    """Query, key, value and output projections; scores, mask, softmax, sum."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (
            nn.Linear(C, C, bias=False) for _ in range(4)
        )
        self.register_buffer("mask", torch.tril(torch.ones(WINDOW, WINDOW)).bool())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, _ = x.shape

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.view(batch, time, HEADS, C // HEADS).transpose(1, 2)

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        scores = query @ key.transpose(-2, -1) / math.sqrt(C // HEADS)  # (B, H, T, T)
        scores = scores.masked_fill(~self.mask[:time, :time], float("-inf"))
        mixed = F.softmax(scores, dim=-1) @ value
        return self.output(mixed.transpose(1, 2).contiguous().view(batch, time, C))


class Block(nn.Module):
    """Pre-norm block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(C)
        self.attention = Attention()
        self.norm2 = nn.LayerNorm(C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainGPT(nn.Module):
    """The tutorial's model, drawn in the tutorial's order; `forward` gives logits (B, T, V)."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, C)
        self.positions = nn.Embedding(WINDOW, C)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(C)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.tokens.weight.T


class Recipe:
    """The model and its training on `data`, 1-D int64 ids; seeded as in the tutorial."""

    name = "tutorial"
    tokens_per_step = BATCH * WINDOW

    def __init__(self, data: torch.Tensor, vocab_size: int, *, seed: int = 0) -> None:
        self.data = data
        torch.manual_seed(seed)
        self.model = PlainGPT(vocab_size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE)
        torch.manual_seed(seed + 42)

    def step(self, done: float) -> torch.Tensor:
        """One step; returns its loss. The rate does not depend on the fraction `done`."""
        starts = torch.randint(0, len(self.data) - WINDOW - 1, (BATCH,))
        x = torch.stack([self.data[i : i + WINDOW] for i in starts])
        y = torch.stack([self.data[i + 1 : i + WINDOW + 1] for i in starts])
        logits = self.model(x)
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), y.reshape(-1))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss
