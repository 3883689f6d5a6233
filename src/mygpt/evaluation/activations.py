"""The forward pass with a call at each activation, which may read or replace it.

Letters: B batch, T time, C embedding, N blocks, H heads, G key/value heads, D head size,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mygpt.core.generation import uses_standard_forward
from mygpt.core.model import GPT, Attention, Rotary, rotate
from mygpt.errors import InputError

Floats = NDArray[np.float32]
# Called with a name, the index of a block and an activation; returns what the pass continues with.
At = Callable[[str, int, Tensor], Tensor]
AttentionRecord = Callable[[int, Tensor], None]  # takes a block's attention weights (B, H, T, T)


def require_standard_forward(model: GPT) -> None:
    """Raise `InputError` for a model whose forward was replaced."""
    if not uses_standard_forward(model):
        raise InputError(
            f"{type(model).__name__} has its own forward, whose activations are not known: use "
            "mygpt.GPT's"
        )


def run_blocks(
    model: GPT, ids: Tensor, at: At, record_attention: AttentionRecord | None = None
) -> Tensor:
    """The residual stream after the last block, (B, T, C), without dropout.

    It is `GPT.forward` stated again, with a call at each activation, and is tested against it.
    Forward hooks on the model would also act in other threads that run it, and no engine packs a
    model that has hooks.

    Args:
        model: a model with the standard forward.
        ids: (B, T) int64, T at most the window.
        at: called with ("residual", k, (B, T, C)) after the embedding (k = 0), and after the
            attention and the MLP of each block; ("heads", n, (B, T, H, D)) before the output
            projection of block n; ("mlp", n, (B, T, C)).
        record_attention: takes each block's attention weights, which are computed for it alone.
    """
    time = ids.shape[1]
    x = model.token_embedding(ids)  # (B, T, C)
    rotary = None
    if model.config.position == "learned":
        x = x + model.position_embedding.weight[:time]
    else:
        model.reserve_positions(time)
        rotary = model.rotary_cos[:time].to(x.dtype), model.rotary_sin[:time].to(x.dtype)
    x = at("residual", 0, x)
    blocks: Any = model.blocks
    for n, block in enumerate(blocks):
        query, key, heads = _attend(block.attention, block.attention_norm(x), rotary)
        if record_attention is not None:
            record_attention(n, _weights(query, key))
        heads = at("heads", n, heads)  # (B, T, H, D)
        x = at("residual", 2 * n + 1, x + block.attention.output(heads.flatten(2)))
        x = at("residual", 2 * n + 2, x + at("mlp", n, block.mlp(block.mlp_norm(x))))
    return x


def _attend(
    attention: Attention, x: Tensor, rotary: Rotary | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, T, D), keys (B, G, T, D), results (B, T, H, D), as `Attention.forward`."""
    batch, time, _ = x.shape
    config = attention.config
    heads, groups, d = config.num_heads, config.kv_heads, config.head_size
    query, key, value = (
        part.view(batch, time, -1, d).transpose(1, 2)
        for part in attention.query_key_value(x).split([heads * d, groups * d, groups * d], dim=-1)
    )
    if config.qk_norm:
        query, key = attention.query_norm(query), attention.key_norm(key)
    if rotary is not None:
        query, key = rotate(query, *rotary), rotate(key, *rotary)
    mixed = F.scaled_dot_product_attention(
        query, key, value, is_causal=time > 1, enable_gqa=groups != heads
    )  # (B, H, T, D)
    return query, key, mixed.transpose(1, 2)


def _weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax(query key / sqrt(D)) over earlier positions, (B, H, T, T), which torch's
    `scaled_dot_product_attention` does not return.
    """
    heads, time, d = query.shape[1:]
    key = key.repeat_interleave(heads // key.shape[1], dim=1)  # a group's heads are neighbours
    scores = (query @ key.transpose(-1, -2)).float() / math.sqrt(d)
    future = torch.ones(time, time, dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1)


@torch.no_grad()
def logits_of(model: GPT, x: Tensor) -> Floats:
    """A residual stream (..., C) through the final norm and the head, (..., V)."""
    weight = head_of(model)
    return to_array(F.linear(model.final_norm(x.to(weight)), weight))


def head_of(model: GPT) -> Tensor:
    """The head's matrix, (V, C)."""
    return model.token_embedding.weight if model.config.tied else model.head.weight


def to_array(x: Tensor) -> Floats:
    """A tensor as a float32 array."""
    return x.float().cpu().numpy()
