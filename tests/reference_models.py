"""The models of the tutorial and of nanoGPT, written from their descriptions.

No code is shared with mygpt. Letters: B batch, H heads, T time, D head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

# --- the tutorial ----------------------------------------------------------------------------


class Rms(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight


class Embedding(nn.Module):
    def __init__(self, vocab_size, width):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)


class Mha(nn.Module):
    def __init__(self, width, heads, kv_heads, window, rope):
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.W_Q = nn.Linear(width, width, bias=False)
        self.W_K = nn.Linear(width, kv_heads * self.size, bias=False)
        self.W_V = nn.Linear(width, kv_heads * self.size, bias=False)
        self.W_O = nn.Linear(width, width, bias=False)
        mask = torch.full((window, window), -math.inf).triu(1)
        self.register_buffer("causal_mask", mask)
        self.rope = rope
        if rope:
            frequencies = 10_000.0 ** (-torch.arange(0, self.size, 2) / self.size)
            angles = torch.arange(window)[:, None] * frequencies
            self.register_buffer("rope_cos", angles.cos())
            self.register_buffer("rope_sin", angles.sin())

    def turn(self, x):  # each pair of neighbours is a complex number, turned by its angle
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        turns = torch.complex(self.rope_cos, self.rope_sin)[: x.shape[2]]
        return torch.view_as_real(pairs * turns).flatten(-2)

    def forward(self, x):
        time = x.shape[1]
        q, k, v = (
            w(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for w in (self.W_Q, self.W_K, self.W_V)
        )
        if self.rope:
            q, k = self.turn(q), self.turn(k)
        group = self.heads // self.kv_heads
        mixed = []
        for head in range(self.heads):
            scores = q[:, head] @ k[:, head // group].transpose(1, 2) / math.sqrt(self.size)
            weights = (scores + self.causal_mask[:time, :time]).softmax(-1)
            mixed.append(weights @ v[:, head // group])
        return self.W_O(torch.cat(mixed, dim=-1))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))


class Block(nn.Module):
    def __init__(self, width, heads, kv_heads, window, norm, rope):
        super().__init__()
        self.ln1, self.ln2 = norm(width), norm(width)
        self.mha = Mha(width, heads, kv_heads, window, rope)
        self.mlp = Mlp(width)

    def forward(self, x):
        x = x + self.mha(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class TutorialGPT(nn.Module):
    def __init__(
        self, v=7, c=24, h=4, n=2, window=10, kv=None, norm="layer", position="learned", tied=True
    ):
        super().__init__()
        kind = nn.LayerNorm if norm == "layer" else Rms
        rope = position == "rope"
        self.token_embedding = Embedding(v, c)
        if not rope:
            self.position_embedding = nn.Embedding(window, c)
        self.blocks = nn.Sequential(*[Block(c, h, kv or h, window, kind, rope) for _ in range(n)])
        self.ln_f = kind(c)
        if not tied:
            self.head = nn.Linear(c, v, bias=False)
        self.tied = tied
        self.config = {
            "vocab_size": v,
            "embed_dim": c,
            "num_heads": h,
            "num_layers": n,
            "max_seq_len": window,
        }
        self.later = {"num_kv_heads": kv or h, "norm_type": norm, "position_type": position}

    def forward(self, ids):
        x = self.token_embedding.embedding(ids)
        if hasattr(self, "position_embedding"):
            x = x + self.position_embedding.weight[: ids.shape[1]]
        x = self.ln_f(self.blocks(x))
        return x @ (self.token_embedding.embedding if self.tied else self.head).weight.T


# --- nanoGPT ---------------------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, width, heads, bias):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x):
        batch, time, width = x.shape
        parts = self.c_attn(x).reshape(batch, time, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        scores = torch.einsum("bhtd,bhsd->bhts", q, k) * (width // self.heads) ** -0.5
        later = torch.ones(time, time, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        return self.c_proj(torch.einsum("bhts,bhsd->bthd", weights, v).reshape(x.shape))


class Feed(nn.Module):
    def __init__(self, width, bias, tanh):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.gelu = nn.GELU("tanh" if tanh else "none")
        self.c_proj = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class Layer(nn.Module):
    def __init__(self, width, heads, bias, tanh):
        super().__init__()
        self.ln_1, self.attn = Norm(width, bias), Attention(width, heads, bias)
        self.ln_2, self.mlp = Norm(width, bias), Feed(width, bias, tanh)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self, n_layer, n_head, n_embd, block_size, vocab_size, bias, tanh=False):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList([Layer(n_embd, n_head, bias, tanh) for _ in range(n_layer)]),
                "ln_f": Norm(n_embd, bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, ids):
        parts = self.transformer
        x = parts["wte"](ids) + parts["wpe"].weight[: ids.shape[1]]
        for layer in parts["h"]:
            x = layer(x)
        return self.lm_head(parts["ln_f"](x))
