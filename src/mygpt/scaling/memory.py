"""Bytes that training takes on each device, under DDP and FSDP, from the shape alone.

States (weights, gradients, AdamW's means) as Rajbhandari et al. 2020 (ZeRO) count them, but
weights and gradients are float32 here also where products are in bfloat16: 16 bytes a parameter.
Activations in the manner of Korthikanti et al. 2022, for the operations of `core/model.py`; fused
attention (Dao et al. 2022) keeps one number a query and no scores, so nothing grows with T squared.
Not counted: masks of dropout, tables of rotary positions, what the libraries take for themselves.
Letters: C embedding, D head size, G key/value heads, H heads, M MLP width, T time, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mygpt.core.config import GPTConfig

Sharding = Literal["ddp", "fsdp"]
Dtype = Literal["float32", "bfloat16"]

FLOAT = 4  # bytes of a float32
_SIZES: dict[str, int] = {"float32": 4, "bfloat16": 2}
# Of a device's memory: the rest is for its libraries, NCCL's buffers, and holes in the heap.
USABLE = 0.9


@dataclass(frozen=True)
class States:
    """Bytes that live through the whole run, of one whole copy.

    Attributes:
        weights: float32.
        gradients: float32.
        optimizer: AdamW's two means and its count of steps.
    """

    weights: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device at the moment when a step needs most.

    Attributes:
        weights: this device's part.
        gradients: the same.
        optimizer: the same.
        gathered: under FSDP, layers that are whole for a moment and their gradients; under
            autocast, bfloat16 copies of the matrices.
        activations: what the forward pass keeps for the way back.
        working: the logits and their gradients, or a block's where these are larger.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """All of it."""
        states = self.weights + self.gradients + self.optimizer
        return states + self.gathered + self.activations + self.working


def states(config: GPTConfig) -> States:
    """What one copy of a model in training takes: the sizes of its real tensors, exactly."""
    numbers = config.num_parameters()
    optimizer = 0
    for shape in config.parameter_shapes().values():
        optimizer += 2 * FLOAT * math.prod(shape) + FLOAT
    return States(FLOAT * numbers, FLOAT * numbers, optimizer)


def device_memory(
    config: GPTConfig,
    *,
    sharding: Sharding,
    devices: int,
    micro_batch: int,
    seq_len: int,
    dtype: Dtype = "float32",
    checkpointing: bool = False,
) -> DeviceMemory:
    """Bytes on each device.

    Args:
        config: the model.
        sharding: "ddp" keeps everything on each device (as training on one does); "fsdp" shares
            the states between them (`fully_shard` of each block, and of the rest).
        devices: how many.
        micro_batch: windows that go through the model at once on a device.
        seq_len: T.
        dtype: of products; bfloat16 is autocast under DDP, and FSDP2's mixed precision.
        checkpointing: keep each block's input alone, and compute the rest again.
    """
    whole = states(config)
    parts = devices if sharding == "fsdp" else 1
    gathered = _whole_layers(config, dtype) if sharding == "fsdp" else _copies(config, dtype)
    tokens = micro_batch * seq_len
    # Autocast leaves the stream between blocks in float32; FSDP2 computes all in bfloat16.
    stream = FLOAT if sharding == "ddp" else _SIZES[dtype]
    kept, working = activation_bytes(config, dtype, stream=stream, checkpointing=checkpointing)
    return DeviceMemory(
        weights=math.ceil(whole.weights / parts),
        gradients=math.ceil(whole.gradients / parts),
        optimizer=math.ceil(whole.optimizer / parts),
        gathered=gathered,
        activations=tokens * kept,
        working=tokens * working,
    )


def smallest_devices(
    config: GPTConfig,
    memory_bytes: int,
    *,
    micro_batch: int,
    seq_len: int,
    dtype: Dtype,
    checkpointing: bool,
    most: int = 2**20,
) -> int | None:
    """How many devices of this memory it takes at least (more than one: with FSDP).

    None where no number up to `most` is enough: what is not shared is too large already, or a step
    has no window for so many.
    """

    def need(sharding: Sharding, devices: int) -> DeviceMemory:
        return device_memory(
            config, sharding=sharding, devices=devices, micro_batch=micro_batch, seq_len=seq_len,
            dtype=dtype, checkpointing=checkpointing,
        )  # fmt: skip

    if fits(need("ddp", 1), memory_bytes):
        return 1
    one = need("fsdp", 1)
    shared = one.weights + one.gradients + one.optimizer
    left = USABLE * memory_bytes - (one.total - shared)
    if left <= 0:
        return None
    devices = max(2, math.ceil(shared / left))
    while devices <= most and not fits(need("fsdp", devices), memory_bytes):  # parts are rounded up
        devices += 1
    return devices if devices <= most else None


def fits(need: DeviceMemory, memory_bytes: int) -> bool:
    """Whether it fits with a tenth of the device left over."""
    return need.total <= USABLE * memory_bytes


def activation_bytes(
    config: GPTConfig, dtype: Dtype, *, stream: int, checkpointing: bool = False
) -> tuple[int, int]:
    """Bytes a token that are kept for the way back, and that live for a moment only.

    Args:
        config: the model.
        dtype: of products.
        stream: bytes of a number in the stream between the blocks.
        checkpointing: whether blocks keep their input alone.
    """
    size, blocks = _SIZES[dtype], config.num_layers
    block = _block_bytes(config, size, stream)
    kept = blocks * stream * config.embed_dim + block if checkpointing else blocks * block
    # The final norm, logarithms of probabilities (float32), and the targets (int64).
    kept += _norm_bytes(config, size, stream) + FLOAT * config.vocab_size + 8
    # The logits, and two gradients in float32: of the logarithms and of the logits.
    head = (size + 2 * FLOAT) * config.vocab_size
    inner = config.mlp_hidden * (2 if config.mlp == "swiglu" else 1)
    return kept, max(head, 2 * size * max(inner, _fused(config)))


def _block_bytes(config: GPTConfig, size: int, stream: int) -> int:
    """What one block keeps of a token."""
    d, heads = config.head_size, config.num_heads
    turned = (heads + config.kv_heads) * d  # queries and keys
    attention = size * (_fused(config) + heads * d) + FLOAT * heads
    if config.qk_norm:
        attention += size * turned + FLOAT * (heads + config.kv_heads)
        attention += FLOAT * turned if size < FLOAT else 0  # the norm is in float32
    if config.qk_norm or config.position == "rotary":
        attention += size * turned
    mlp = size * config.mlp_hidden * (4 if config.mlp == "swiglu" else 2)
    return 2 * _norm_bytes(config, size, stream) + attention + mlp


def _norm_bytes(config: GPTConfig, size: int, stream: int) -> int:
    """A norm's input, statistics and result, which the product after it keeps."""
    c = config.embed_dim
    if config.norm == "layer":
        return stream * c + 2 * FLOAT + size * c
    return FLOAT * c + FLOAT + stream * c + size * c


def _fused(config: GPTConfig) -> int:
    """Queries, keys and values of a token."""
    return (config.num_heads + 2 * config.kv_heads) * config.head_size


def _numbers(config: GPTConfig) -> tuple[int, int]:
    """Parameters of one block, and of all that is no block."""
    shapes = config.parameter_shapes()
    in_blocks = sum(math.prod(s) for name, s in shapes.items() if name.startswith("blocks."))
    return in_blocks // config.num_layers, config.num_parameters() - in_blocks


def _copies(config: GPTConfig, dtype: Dtype) -> int:
    """The matrices in bfloat16, which autocast makes once a pass and the way back needs."""
    if dtype == "float32":
        return 0
    shapes = config.parameter_shapes()
    matrices = sum(math.prod(s) for n, s in shapes.items() if len(s) == 2 and "embedding" not in n)
    head = config.vocab_size * config.embed_dim if config.tied else 0
    return 2 * (matrices + head)


def _whole_layers(config: GPTConfig, dtype: Dtype) -> int:
    """What FSDP has whole at its worst moment: the rest of the model, two blocks, gradients.

    The next block is gathered while one is computed with; gradients are as the products are, and
    once more in float32 on their way to the others.
    """
    block, rest = _numbers(config)
    size = _SIZES[dtype]
    sent = FLOAT * max(block, rest)
    return size * (rest + 2 * block) + size * (rest + block) + sent


def step_traffic(
    config: GPTConfig, *, sharding: Sharding, devices: int, dtype: Dtype, pieces: int = 1
) -> int:
    """Bytes that each device sends in a step, in rings (Patarasuk & Yuan 2009).

    DDP adds up float32 gradients, 2(n-1)/n of their size, once a step. FSDP gathers each block's
    weights for the way there and again for the way back, the rest once, and scatters the sum of
    the gradients, (n-1)/n of their sizes each, for every piece of the batch.
    """
    numbers = config.num_parameters()
    share = (devices - 1) / devices
    if sharding == "ddp":
        return round(2 * share * FLOAT * numbers)
    rest = _numbers(config)[1]
    gathered = _SIZES[dtype] * (2 * numbers - rest)
    return round(pieces * share * (gathered + FLOAT * numbers))
