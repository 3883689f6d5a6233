"""The forward pass with a call at each activation, which may read or replace it.

Letters: B batch, T time, C embedding, N blocks, H heads, G key/value heads, D head size,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
# Takes the index of a block, its queries (B, H, T, D), and its keys and values (B, G, T, D).
AttentionRecord = Callable[[int, Tensor, Tensor, Tensor], None]

# With fewer parameters torch uses one thread: two wait for each other at every operation. While
# other programs used two cores, an ablation of 10.65 million parameters took 5 s with two threads
# and 1 s with one; of the tutorial's model, 1 s and 0.1 s.
_WORTH_THREADS = 30_000_000


@contextmanager
def suitable_threads(num_parameters: int) -> Iterator[None]:
    """Let torch use one thread for a small model, and afterwards as many as before."""
    threads = torch.get_num_threads()
    if num_parameters < _WORTH_THREADS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def require_standard_forward(model: GPT) -> None:
    """Raise `InputError` for a model whose forward was replaced."""
    if not uses_standard_forward(model):
        raise InputError(
            f"{type(model).__name__} has its own forward, whose activations are not known: use "
            "mygpt.GPT's"
        )


def run_blocks(
    model: GPT,
    ids: Tensor,
    at: At,
    record_attention: AttentionRecord | None = None,
    resume: tuple[int, Tensor] | None = None,
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
        record_attention: takes what each block's attention is computed from.
        resume: the index of the first block that is run, and its input (B, T, C); None runs all.
    """
    time = ids.shape[1]
    rotary = None
    if model.config.position == "rotary":
        model.reserve_positions(time)
        dtype = model.token_embedding.weight.dtype
        rotary = model.rotary_cos[:time].to(dtype), model.rotary_sin[:time].to(dtype)
    if resume is None:
        resume = 0, at("residual", 0, _embedded(model, ids))
    first, x = resume
    blocks: Any = model.blocks
    for n, block in enumerate(blocks[first:], first):
        query, key, value, heads = _attend(block.attention, block.attention_norm(x), rotary)
        if record_attention is not None:
            record_attention(n, query, key, value)
        heads = at("heads", n, heads)  # (B, T, H, D)
        x = at("residual", 2 * n + 1, x + block.attention.output(heads.flatten(2)))
        x = at("residual", 2 * n + 2, x + at("mlp", n, block.mlp(block.mlp_norm(x))))
    return x


def _embedded(model: GPT, ids: Tensor) -> Tensor:
    """The residual stream before the first block, (B, T, C)."""
    x = model.token_embedding(ids)
    if model.config.position == "learned":
        x = x + model.position_embedding.weight[: ids.shape[1]]
    return x


def _attend(
    attention: Attention, x: Tensor, rotary: Rotary | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries (B, H, T, D), keys and values (B, G, T, D), and results (B, T, H, D), as those of
    `Attention.forward`.
    """
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
    return query, key, value, mixed.transpose(1, 2)


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
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
