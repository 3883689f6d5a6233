"""Size and layout of a thread's workspace: the activations of one chunk of its sequences.

Letters: B batch, T time, C embedding, R rows of a chunk (whole windows).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mygpt.core.config import GPTConfig
from mygpt.cpu.train import layout as at

# Rows of a chunk at most, or one window where that is longer. Few enough that the activations stay
# in the cache, many enough for tiles that are full (128 rows are 22 tiles of 6) and for each weight
# that is read to be used often. docs/lab-notes.md has the step with chunks of 128 rows: 67% to 87%
# of the speed of plain products. No other number of rows is recorded there.
_ROWS = 128
_FLOAT_BYTES = 4

# The workspaces of all threads follow each other; each consists of
#
#     | layer 0: X | MOMENTS | ... | ACTIVATED | layer 1: X | ... | X_LAST | ... | LOGITS | ... |
#      <-- `layer` floats ------------------->                    ^ num_layers * layer
#      <-- `floats`, rounded up to 1,024 (4 KiB, a page) ------------------------------------->


@dataclass(frozen=True)
class Workspace:
    """The layout of a thread's workspace.

    Attributes:
        chunk: windows that go through the model at once.
        starts: (WORKSPACE_FIELDS,) int64, where each field begins; a layer's field: in layer 0.
        layer: floats of one layer's fields.
        floats: floats of the whole workspace.
    """

    chunk: int
    starts: NDArray[np.int64]
    layer: int
    floats: int


def workspace_for(config: GPTConfig, batch: int, time: int, threads: int) -> Workspace:
    """The workspace of each of `threads` for batches of B windows of T."""
    chunk = max(1, min(_ROWS // time, -(-batch // threads)))
    width, heads, rows = config.embed_dim, config.num_heads, chunk * time
    prepared_heads = heads + config.kv_heads
    qkv = (prepared_heads + config.kv_heads) * config.head_size
    prepared = prepared_heads * config.head_size
    attended, hidden = heads * config.head_size, config.mlp_hidden
    inner = hidden * (2 if config.mlp == "swiglu" else 1)
    sizes = {
        at.X: width, at.MOMENTS: 2, at.NORMED: width, at.QKV: qkv, at.PREPARED: prepared,
        at.HEAD_FACTORS: prepared_heads, at.LOG_SUMS: heads, at.ATTENDED: attended,
        at.X_MIDDLE: width, at.MOMENTS_MIDDLE: 2, at.NORMED_MIDDLE: width, at.PRE_ACTIVATION: inner,
        at.ACTIVATED: hidden, at.X_LAST: width, at.MOMENTS_LAST: 2, at.NORMED_LAST: width,
        at.LOGITS: at.padded(config.vocab_size), at.D_X: width, at.D_NORMED: width,
        at.D_QKV: qkv, at.D_PREPARED: prepared, at.D_ATTENDED: attended, at.D_ACTIVATED: hidden,
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
    return Workspace(chunk, starts, layer, -(-end // 1024) * 1024)


def step_bytes(config: GPTConfig, batch: int, time: int, threads: int) -> int:
    """Bytes that a step takes in addition to weights, optimizer state and gradients."""
    workspaces = _FLOAT_BYTES * threads * workspace_for(config, batch, time, threads).floats
    panels = 2 * _FLOAT_BYTES * config.num_parameters()
    rows = batch * time * (16 + _FLOAT_BYTES)  # two ids and a loss each
    return workspaces + panels + rows
