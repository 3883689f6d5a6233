"""nanoGPT's recipes for Tiny Shakespeare by characters, with their published hyperparameters.

`CPU` is that of its README for a computer without a GPU (4 layers of width 128, 12 windows of 64,
2,000 iterations), `GPU` the shape of its `train_shakespeare_char` (6 layers of width 384, 64
windows of 256). The code is written for this benchmark: one query-key-value matrix, fused
attention, exact GELU, LayerNorm without bias, a tied head, no torch.compile.
Letters: B batch, T time, C embedding, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

RATE, LEAST_RATE, WARMUP = 1e-3, 1e-4, 100
ITERATIONS = 2000  # of the recipe for a CPU
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.99), 0.1, 1.0


@dataclass(frozen=True)
class Shape:
    """A model and its batches."""

    layers: int
    heads: int
    width: int
    window: int
    batch: int
    dropout: float


CPU = Shape(layers=4, heads=4, width=128, window=64, batch=12, dropout=0.0)
GPU = Shape(layers=6, heads=6, width=384, window=256, batch=64, dropout=0.2)


class Attention(nn.Module):
    """Causal self-attention, with dropout on its weights and its output."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.dropout = shape.heads, shape.dropout
        self.query_key_value = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.output = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        parts = self.query_key_value(x).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        mixed = self.output(mixed.transpose(1, 2).reshape(batch, time, width))
        return F.dropout(mixed, self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm block without biases."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        c = shape.width
        self.norm1, self.norm2 = (nn.LayerNorm(c, bias=False) for _ in range(2))
        self.attention = Attention(shape)
        self.widen = nn.Linear(c, 4 * c, bias=False)
        self.output = nn.Linear(4 * c, c, bias=False)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.dropout(self.output(F.gelu(self.widen(self.norm2(x)))))


class PlainGPT(nn.Module):
    """GPT-2's block (Radford et al., 2019) without biases; `forward` gives logits (B, T, V)."""

    def __init__(self, vocab_size: int, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, shape.width)
        self.positions = nn.Embedding(shape.window, shape.width)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList([Block(shape) for _ in range(shape.layers)])
        self.norm = nn.LayerNorm(shape.width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # projections into the residual stream are smaller
                small = math.sqrt(2 * shape.layers) if "output" in name else 1.0
                nn.init.normal_(parameter, std=0.02 / small)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)

    def num_parameters(self) -> int:
        """Parameters without the position embedding, as nanoGPT counts."""
        return sum(p.numel() for p in self.parameters()) - self.positions.weight.numel()


class Recipe:
    """The model and its training on `data`, 1-D int64 ids.

    Args:
        data: the training text.
        vocab_size: V.
        shape: `CPU`, `GPU`, or another.
        iterations: length of the cosine schedule; None lets it end with the budget, as if the
            number of iterations in the budget were known.
        seed: added to nanoGPT's seed, 1337.
    """

    name = "nanogpt"

    def __init__(
        self,
        data: torch.Tensor,
        vocab_size: int,
        *,
        shape: Shape = CPU,
        iterations: int | None = None,
        seed: int = 0,
    ) -> None:
        self.data, self.shape, self.iterations = data, shape, iterations
        self.tokens_per_step = shape.batch * shape.window
        torch.manual_seed(1337 + seed)
        self.model = PlainGPT(vocab_size, shape)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        norms = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms}],
            lr=RATE,
            betas=BETAS,
            weight_decay=0.0,
        )
        self.iteration = 0
        self._warm_at = 0.0  # the fraction of the budget at the end of the warm-up

    def rate(self, done: float) -> float:
        """The learning rate of the next step: warm-up by iterations, then a cosine schedule."""
        if self.iteration < WARMUP:
            self._warm_at = done
            return RATE * (self.iteration + 1) / (WARMUP + 1)
        fallen = (done - self._warm_at) / max(1e-9, 1.0 - self._warm_at)
        if self.iterations is not None:
            fallen = (self.iteration - WARMUP) / max(1, self.iterations - WARMUP)
        fallen = min(1.0, max(0.0, fallen))
        return LEAST_RATE + (RATE - LEAST_RATE) * 0.5 * (1.0 + math.cos(math.pi * fallen))

    def step(self, done: float) -> torch.Tensor:
        """One step, where the fraction `done` of the budget is spent; returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(done)
        window = self.shape.window
        starts = torch.randint(len(self.data) - window, (self.shape.batch,))
        x = torch.stack([self.data[i : i + window] for i in starts])
        y = torch.stack([self.data[i + 1 : i + 1 + window] for i in starts])
        logits = self.model(x)
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.iteration += 1
        return loss
