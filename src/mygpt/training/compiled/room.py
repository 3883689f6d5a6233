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
        starts: (ROOM_FIELDS,) int64, where each field begins; a layer's are the first layer's.
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
        at.X: width, at.MOMENTS: 2, at.NORMED: width, at.COMBINED: wide, at.TURNED: stride,
        at.FACTORS: pairs, at.SUMS: heads, at.MIXED: mixed, at.X_BETWEEN: width,
        at.MOMENTS_BETWEEN: 2, at.NORMED_BETWEEN: width, at.INNER: inner,
        at.HIDDEN_ROWS: hidden, at.X_LAST: width, at.MOMENTS_LAST: 2, at.NORMED_LAST: width,
        at.LOGITS: at.padded(config.vocab_size), at.D_X: width, at.D_NORMED: width,
        at.D_COMBINED: wide, at.D_TURNED: stride, at.D_MIXED: mixed, at.D_HIDDEN: hidden,
        at.PROJECTED: width,
    }  # fmt: skip
    floats = {field: at.padded(rows * size) for field, size in sizes.items()}
    floats[at.ATTENTION] = 2 * (config.head_size + at.QUERIES) * at.padded(time)
    starts, layer = np.zeros(at.ROOM_FIELDS, np.int64), 0
    for field in range(at.LAYER_FIELDS):
        starts[field] = layer
        layer += floats[field]
    end = config.num_layers * layer
    for field in range(at.LAYER_FIELDS, at.ROOM_FIELDS):
        starts[field] = end
        end += floats[field]
    return Room(chunk, starts, layer, -(-end // 1024) * 1024)


def step_bytes(config: GPTConfig, batch: int, time: int, threads: int) -> int:
    """What a step takes beside weights, optimizer and gradients."""
    room = _FLOAT * threads * room_for(config, batch, time, threads).floats
    panels = 2 * _FLOAT * config.num_parameters()
    rows = batch * time * (16 + _FLOAT)  # two ids and a loss each
    return room + panels + rows
