"""A forward pass that returns the attention weights and every position's prediction.

The engines return neither, since decoding needs neither; the layers are those of the NumPy engine.
Letters: C embedding, T time, S the last positions that are shown, H heads, G key/value heads,
R = H / G query heads that share one, D head size, N layers, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mygpt.decode.numpy_network import Attention, Block, Floats, Network, future, rotate
from mygpt.errors import InputError

# Limits of a page: attention weights in all, and positions. 16 heads have 128 positions, 144 have
# 43.
_MOST_WEIGHTS, _MOST_POSITIONS = 270_000, 128


@dataclass(frozen=True)
class Reading:
    """The results of one pass over a text.

    Attributes:
        weights: (N, H, S, S) float32: the attention weight of position s at position t, of the last
            S positions. A row sums to one minus the weights of earlier positions.
        logits: (T, V) float32, each position's prediction of the next token.
    """

    weights: Floats
    logits: Floats


def positions_to_show(network: Network, time: int) -> int:
    """S: how many of a text's last positions a page shows."""
    heads = network.config.num_layers * network.config.num_heads
    return max(1, min(time, _MOST_POSITIONS, math.isqrt(_MOST_WEIGHTS // heads)))


def read(network: Network, ids: Sequence[int], shown: int | None = None) -> Reading:
    """Read a text that fits the window.

    Args:
        network: the model.
        ids: (T,), at least one, at most the window.
        shown: S; None is T.

    Raises:
        InputError: for no token, or more than fit into the window.
    """
    config, time = network.config, len(ids)
    if not 1 <= time <= config.max_seq_len:
        raise InputError(f"{time} tokens cannot be read at once: give 1 to {config.max_seq_len}")
    first = time - min(time, shown or time)
    x = _embed(network, ids)  # (T, C)
    weights = []
    for block in network.blocks:
        x, own = _read_block(block, x)
        weights.append(own[:, first:, first:].copy())  # all positions might not fit into memory
    logits: Floats = network.final_norm(x) @ network.head  # (T, V)
    return Reading(np.stack(weights), logits)


def _embed(network: Network, ids: Sequence[int]) -> Floats:
    """(T, C): the sum of token and position embeddings."""
    places = np.asarray(ids, dtype=np.int64)
    x: Floats = network.token_embedding[places]
    if network.position_embedding is not None:
        x = x + network.position_embedding[: len(places)]
    return x


def _read_block(block: Block, x: Floats) -> tuple[Floats, Floats]:
    """x + attention(norm(x)), then x + mlp(norm(x)): (T, C); and the attention, (H, T, T)."""
    attended, weights = _attend(block.attention, block.attention_norm(x))
    x = x + attended
    return x + block.mlp_output(block.activation(block.mlp_input(block.mlp_norm(x)))), weights


def _attend(attention: Attention, x: Floats) -> tuple[Floats, Floats]:
    """The result of attention for (T, C), and its weights, (H, T, T)."""
    time, groups, d = len(x), attention.groups, attention.d
    query = attention.query(x).reshape(time, -1, d)  # (T, H, D)
    key, value = attention.key_value(x).reshape(time, 2, groups, d).transpose(1, 0, 2, 3)
    if attention.norms is not None:
        query, key = attention.norms[0](query), attention.norms[1](key)
    if attention.rotary is not None:
        cos, sin = attention.rotary.rows(0, time)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    grouped = query.reshape(time, groups, -1, d).transpose(1, 2, 0, 3)  # (G, R, T, D)
    scores = grouped * attention.scale @ key.transpose(1, 2, 0)[:, None]  # (G, R, T, T)
    scores = scores + future(time)
    scores -= scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores)
    weights /= weights.sum(axis=-1, keepdims=True)
    attended = weights @ value.transpose(1, 0, 2)[:, None]  # (G, R, T, D)
    out = attention.output(attended.transpose(2, 0, 1, 3).reshape(time, -1))
    return out, weights.reshape(-1, time, time)
