"""The GPT: a decoder-only transformer with pre-norm blocks, small parts first.

Vaswani et al., 2017 (arXiv:1706.03762); Radford et al., 2019 (GPT-2).
Letters: B batch, T time, C embedding, H heads, G key/value heads, D head size, M MLP width,
L window, V vocabulary, P positions in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mygpt.core.config import GPTConfig, positions_for
from mygpt.errors import InputError

if TYPE_CHECKING:
    from mygpt.core.kv_cache import KVCache

Rotary = tuple[Tensor, Tensor]  # cosines and sines, both (T, D)
Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # see `KVCache.extend`, of one layer


class RMSNorm(nn.Module):
    """Divide by the root of the mean square, in float32, and scale (Zhang & Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def make_norm(config: GPTConfig, size: int) -> nn.Module:
    """The configuration's norm over a last dimension of `size`."""
    if config.norm == "rms":
        return RMSNorm(size, config.eps)
    return nn.LayerNorm(size, eps=config.eps)


def rotary_table(config: GPTConfig, positions: int | None = None) -> Rotary:
    """Cosines and sines of the positions' angles, each (L, D), float32 (Su et al., 2021).

    They are made on the CPU, so that they are the same everywhere; `positions` makes fewer than L.
    """
    half = config.head_size // 2
    steps = torch.arange(half, dtype=torch.float32, device="cpu")
    places = torch.arange(positions or config.max_seq_len, dtype=torch.float32, device="cpu")
    angles = places[:, None] * config.rope_base ** (-steps / half)
    angles = torch.cat([angles, angles], dim=-1)  # (L, D): both halves turn alike
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) of x (B, H, T, D) by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention; groups of query heads may share keys and values."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        heads, groups, d = config.num_heads, config.kv_heads, config.head_size
        bias = config.attention_bias
        # One matrix for query, key and value. nn.Linear draws row by row, so that it has the
        # values that the tutorial's three matrices have.
        self.query_key_value = nn.Linear(config.embed_dim, (heads + 2 * groups) * d, bias=bias)
        self.output = nn.Linear(heads * d, config.embed_dim, bias=bias)
        if config.qk_norm:
            self.query_norm = RMSNorm(d, config.eps)
            self.key_norm = RMSNorm(d, config.eps)

    def forward(
        self, x: Tensor, rotary: Rotary | None, mask: Tensor | None, extend: Extend | None
    ) -> Tensor:
        batch, time, _ = x.shape
        heads, groups, d = self.config.num_heads, self.config.kv_heads, self.config.head_size
        query, key, value = (
            part.view(batch, time, -1, d).transpose(1, 2)
            for part in self.query_key_value(x).split([heads * d, groups * d, groups * d], dim=-1)
        )  # (B, H, T, D), (B, G, T, D), (B, G, T, D)
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if extend is not None:
            key, value = extend(key, value)  # (B, G, P + T, D)
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.config.dropout if self.training else 0.0,
            is_causal=mask is None and time > 1,
            enable_gqa=groups != heads,
        )  # (B, H, T, D)
        return self.output(mixed.transpose(1, 2).reshape(batch, time, heads * d))


class MLP(nn.Module):
    """Two layers with GELU between them, or SwiGLU, whose gate and value are one layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        inner = config.mlp_hidden * (2 if config.mlp == "swiglu" else 1)
        self.input = nn.Linear(config.embed_dim, inner, bias=config.mlp_bias)
        self.output = nn.Linear(config.mlp_hidden, config.embed_dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.input(x)  # (B, T, M), or (B, T, 2M): gate and value
        if self.kind == "swiglu":
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(hidden, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        return self.output(hidden)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, config.embed_dim)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config, config.embed_dim)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rotary: Rotary | None, mask: Tensor | None, extend: Extend | None
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, mask, extend))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """The tutorial's GPT; `GPT.from_config` builds every other.

    Args:
        vocab_size: V.
        embed_dim: C.
        num_heads: H.
        num_layers: number of blocks.
        max_seq_len: L, the context window.
        dropout: probability of dropping an activation in training.

    Parameters are drawn from torch's global generator with PyTorch's own defaults, in the
    tutorial's order, so that `set_seed(0)` before gives its printed numbers.

    Raises:
        InputError: for an impossible shape (a ValueError).
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        num_heads: int,
        num_layers: int,
        max_seq_len: int = 64,
        dropout: float = 0.0,
    ) -> None:
        self.build(GPTConfig(vocab_size, embed_dim, num_heads, num_layers, max_seq_len, dropout))

    @classmethod
    def from_config(cls, config: GPTConfig) -> GPT:
        """A GPT of any shape, with fresh parameters from torch's global generator.

        The tutorial's block keeps PyTorch's default draws; every other block is drawn as
        GPT-2 was (Radford et al., 2019): N(0, 0.02), output projections smaller by the root
        of twice the number of blocks, biases zero.
        """
        model = cls.__new__(cls)
        model.build(config)
        if not config.is_tutorial_block:
            model._draw_as_gpt2()
        return model

    rotary_cos: Tensor
    rotary_sin: Tensor

    def build(self, config: GPTConfig) -> None:
        """Create the modules of a shape, in the tutorial's order."""
        nn.Module.__init__(self)
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.max_seq_len, config.embed_dim)
        self.register_rotary()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.final_norm = make_norm(config, config.embed_dim)
        if not config.tied:
            self.head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)

    def register_rotary(self) -> None:
        """Compute the rotary tables, of a long window the first positions only."""
        if self.config.position == "rotary":
            cos, sin = rotary_table(self.config, positions_for(self.max_seq_len))
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)

    def reserve_positions(self, count: int) -> None:
        """Extend the rotary tables to at least `count` positions."""
        if self.config.position == "rotary" and count > len(self.rotary_cos):
            tables = rotary_table(self.config, positions_for(self.max_seq_len, count))
            self.rotary_cos, self.rotary_sin = (table.to(self.rotary_cos) for table in tables)

    def _draw_as_gpt2(self) -> None:
        smaller = 0.02 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=smaller if "output" in name else 0.02)

    @property
    def max_seq_len(self) -> int:
        """L, the context window in tokens."""
        return self.config.max_seq_len

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the token after each position.

        Args:
            ids: (B, T) int64 token ids; with a cache, the T tokens after those in it.
            targets: (B, T) int64 next tokens, or None.
            cache: keys and values of earlier tokens; those of `ids` are appended.
            last_only: compute logits of the last position alone, which decoding needs.

        Returns:
            logits (B, T, V), or (B, 1, V) for `last_only`, and the mean cross-entropy in nats
            per token (a scalar; None without targets).

        Raises:
            InputError: when the positions do not fit the window (a ValueError).
        """
        time = ids.shape[1]
        at = slice(0, time) if cache is None else cache.positions(time)
        if isinstance(at, slice) and at.stop > self.max_seq_len:
            raise InputError(f"input length T={at.stop} exceeds max_seq_len={self.max_seq_len}")
        x = self.token_embedding(ids)  # (B, T, C)
        rotary = None
        if self.config.position == "learned":
            x = x + self.position_embedding.weight[at]
        else:
            if isinstance(at, slice):
                self.reserve_positions(at.stop)
            rotary = self.rotary_cos[at].to(x.dtype), self.rotary_sin[at].to(x.dtype)
        x = self.dropout(x)
        mask = None if cache is None else cache.mask(time)  # (T, P + T)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, mask, None if cache is None else partial(cache.extend, layer))
        if cache is not None:
            cache.advance(time)
        x = self.final_norm(x[:, -1:] if last_only else x)
        head = self.token_embedding if self.config.tied else self.head
        logits = F.linear(x, head.weight)  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout and gradients; afterwards every module has its mode of before."""
    in_training, queue = [], [model]
    while queue:  # `model.modules()` takes five times as long, and this runs at each step
        module = queue.pop()
        if module is not None:
            queue += module._modules.values()
            if module.training:
                in_training.append(module)
    if in_training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in in_training:
            module.training = True
