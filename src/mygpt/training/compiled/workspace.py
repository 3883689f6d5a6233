"""How much room a thread needs for its part of a step, and what lies where in it.

Letters: B batch, T time, C embedding, R rows of a chunk (whole windows).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mygpt.core.config import GPTConfig
from mygpt.training.compiled import layout as at

_ROWS = 128  # of a chunk: few enough to stay in the cache, many enough for the tiles
_FLOAT = 4


@dataclass(frozen=True)
class Room:
    """A thread's room.

    Attributes:
        chunk: windows that go through the model together.
        starts: (WORKSPACE_FIELDS,) int64, where each field begins; a layer's are the first layer's.
        layer: floats of a layer's own.
        floats: of all of it.
    """

    chunk: int
    starts: NDArray[np.int64]
    layer: int
    floats: int


def room_for(config: GPTConfig, batch: int, time: int, threads: int) -> Room:
    """The room of each of `threads` for batches of B windows of T."""
    chunk = max(1, min(_ROWS // time, -(-batch // threads)))
    width, heads, rows = config.embed_dim, config.num_heads, chunk * time
    pairs = heads + config.kv_heads
    wide, stride = (pairs + config.kv_heads) * config.head_size, pairs * config.head_size
    mixed, hidden = heads * config.head_size, config.mlp_hidden
    inner = hidden * (2 if config.mlp == "swiglu" else 1)
    sizes = {
        at.X: width, at.MOMENTS: 2, at.NORMED: width, at.QKV: wide, at.PREPARED: stride,
        at.HEAD_FACTORS: pairs, at.LOG_SUMS: heads, at.ATTENDED: mixed, at.X_MIDDLE: width,
        at.MOMENTS_MIDDLE: 2, at.NORMED_MIDDLE: width, at.PRE_ACTIVATION: inner,
        at.ACTIVATED: hidden, at.X_LAST: width, at.MOMENTS_LAST: 2, at.NORMED_LAST: width,
        at.LOGITS: at.padded(config.vocab_size), at.D_X: width, at.D_NORMED: width,
        at.D_QKV: wide, at.D_PREPARED: stride, at.D_ATTENDED: mixed, at.D_ACTIVATED: hidden,
        at.PROJECTED: width,
    }  # fmt: skip
    floats = {field: at.padded(rows * size) for field, size in sizes.items()}
    floats[at.ATTENTION_SCRATCH] = 2 * (config.head_size + at.QUERIES) * at.padded(time)
    starts, layer = np.zeros(at.WORKSPACE_FIELDS, np.int64), 0
    for field in range(at.LAYER_FIELDS):
        starts[field] = layer
        layer += floats[field]
    end = config.num_layers * layer
    for field in range(at.LAYER_FIELDS, at.WORKSPACE_FIELDS):
        starts[field] = end
        end += floats[field]
    return Room(chunk, starts, layer, -(-end // 1024) * 1024)


def step_bytes(config: GPTConfig, batch: int, time: int, threads: int) -> int:
    """What a step takes beside weights, optimizer and gradients."""
    room = _FLOAT * threads * room_for(config, batch, time, threads).floats
    panels = 2 * _FLOAT * config.num_parameters()
    rows = batch * time * (16 + _FLOAT)  # two ids and a loss each
    return room + panels + rows
