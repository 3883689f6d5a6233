"""Memory that training takes on each device, under DDP and FSDP, from the model's shape.

Training states (weights, gradients, AdamW's moments) are counted as by Rajbhandari et al. 2020
(ZeRO), except that weights and gradients are float32 also where products are in bfloat16: 16 bytes
per parameter. Activations are counted as by Korthikanti et al. 2022, for the operations of
`core/model.py`; fused attention (Dao et al. 2022) keeps one number per query and no scores, so
nothing grows with T squared.
Not counted: dropout masks, rotary tables, memory of the libraries themselves.
Letters: C embedding, D head size, G key/value heads, H heads, M MLP width, T time, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.core.config import GPTConfig

Sharding = Literal["ddp", "fsdp"]
Dtype = Literal["float32", "bfloat16"]

FLOAT = 4  # bytes of a float32
_SIZES: dict[str, int] = {"float32": 4, "bfloat16": 2}
# Fraction of a device's memory: the rest is for libraries, NCCL's buffers and fragmentation.
USABLE = 0.9


@dataclass(frozen=True)
class States:
    """Bytes of one unsharded replica that are kept for the whole run.

    Attributes:
        weights: float32.
        gradients: float32.
        optimizer: AdamW's two moments and its step count.
    """

    weights: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device at the peak of a step.

    Attributes:
        weights: this device's shard.
        gradients: this device's shard.
        optimizer: this device's shard.
        gathered: under FSDP, the layers that are gathered at one time and their gradients; under
            autocast, bfloat16 copies of the matrices.
        activations: what the forward pass keeps for the backward pass.
        working: the logits and their gradients, or a block's temporaries where these are larger.
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
    """Bytes of the training states: exactly the sizes of the tensors."""
    parameters = config.num_parameters()
    optimizer = 0
    for shape in parameter_shapes(config).values():
        optimizer += 2 * FLOAT * math.prod(shape) + FLOAT
    return States(FLOAT * parameters, FLOAT * parameters, optimizer)


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
    """Peak memory of each device.

    Args:
        config: the model.
        sharding: "ddp" keeps all states on each device (as training on one does); "fsdp" shards
            them (`fully_shard` of each block, and of the rest).
        devices: number of devices.
        micro_batch: windows per forward pass of a device.
        seq_len: T.
        dtype: of matrix products; bfloat16 is autocast under DDP, and FSDP2's mixed precision.
        checkpointing: keep only each block's input, and recompute the rest.
    """
    replica = states(config)
    shards = devices if sharding == "fsdp" else 1
    gathered = (_gathered_bytes if sharding == "fsdp" else _autocast_bytes)(config, dtype)
    tokens = micro_batch * seq_len
    # Autocast leaves the residual stream in float32; FSDP2 computes all in bfloat16.
    stream = FLOAT if sharding == "ddp" else _SIZES[dtype]
    kept, working = activation_bytes(config, dtype, stream=stream, checkpointing=checkpointing)
    return DeviceMemory(
        weights=math.ceil(replica.weights / shards),
        gradients=math.ceil(replica.gradients / shards),
        optimizer=math.ceil(replica.optimizer / shards),
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
    """The smallest number of devices of this memory (with FSDP where it is more than one).

    None where no number up to `most` suffices: what is not sharded is too large for one device, or
    a step has fewer windows than devices would be needed.
    """

    def need(sharding: Sharding, devices: int) -> DeviceMemory:
        return device_memory(
            config, sharding=sharding, devices=devices, micro_batch=micro_batch, seq_len=seq_len,
            dtype=dtype, checkpointing=checkpointing,
        )  # fmt: skip

    if fits(need("ddp", 1), memory_bytes):
        return 1
    one = need("fsdp", 1)
    sharded = one.weights + one.gradients + one.optimizer
    left = USABLE * memory_bytes - (one.total - sharded)
    if left <= 0:
        return None
    devices = max(2, math.ceil(sharded / left))
    while devices <= most and not fits(need("fsdp", devices), memory_bytes):  # shards round up
        devices += 1
    return devices if devices <= most else None


def fits(need: DeviceMemory, memory_bytes: int) -> bool:
    """Whether it leaves a tenth of the device free."""
    return need.total <= USABLE * memory_bytes


def activation_bytes(
    config: GPTConfig, dtype: Dtype, *, stream: int, checkpointing: bool = False
) -> tuple[int, int]:
    """Bytes per token that are kept for the backward pass, and bytes of temporaries at the peak.

    Args:
        config: the model.
        dtype: of matrix products.
        stream: bytes of a number in the residual stream.
        checkpointing: whether blocks keep only their input.
    """
    size, blocks = _SIZES[dtype], config.num_layers
    block = _block_bytes(config, size, stream)
    kept = blocks * stream * config.embed_dim + block if checkpointing else blocks * block
    # The final norm, log-probabilities (float32), and the targets (int64).
    kept += _norm_bytes(config, size, stream) + FLOAT * config.vocab_size + 8
    # The logits, and two gradients in float32: of the log-probabilities and of the logits.
    head = (size + 2 * FLOAT) * config.vocab_size
    inner = config.mlp_hidden * (2 if config.mlp == "swiglu" else 1)
    return kept, max(head, 2 * size * max(inner, _fused(config)))


def _block_bytes(config: GPTConfig, size: int, stream: int) -> int:
    """Bytes per token that one block keeps for the backward pass."""
    d, heads = config.head_size, config.num_heads
    queries_keys = (heads + config.kv_heads) * d
    attention = size * (_fused(config) + heads * d) + FLOAT * heads
    if config.qk_norm:
        attention += size * queries_keys + FLOAT * (heads + config.kv_heads)
        attention += FLOAT * queries_keys if size < FLOAT else 0  # the norm is in float32
    if config.qk_norm or config.position == "rotary":
        attention += size * queries_keys
    mlp = size * config.mlp_hidden * (4 if config.mlp == "swiglu" else 2)
    return 2 * _norm_bytes(config, size, stream) + attention + mlp


def _norm_bytes(config: GPTConfig, size: int, stream: int) -> int:
    """Bytes per token of a norm's input, statistics and result (kept by the product after it)."""
    c = config.embed_dim
    if config.norm == "layer":
        return stream * c + 2 * FLOAT + size * c
    return FLOAT * c + FLOAT + stream * c + size * c


def _fused(config: GPTConfig) -> int:
    """Width of queries, keys and values together."""
    return (config.num_heads + 2 * config.kv_heads) * config.head_size


def _parameter_counts(config: GPTConfig) -> tuple[int, int]:
    """Parameters of one block, and of everything outside the blocks."""
    shapes = parameter_shapes(config)
    in_blocks = sum(math.prod(s) for name, s in shapes.items() if name.startswith("blocks."))
    return in_blocks // config.num_layers, config.num_parameters() - in_blocks


def _autocast_bytes(config: GPTConfig, dtype: Dtype) -> int:
    """The bfloat16 copies of the matrices, made once per forward pass and kept for the backward."""
    if dtype == "float32":
        return 0
    shapes = parameter_shapes(config)
    matrices = sum(math.prod(s) for n, s in shapes.items() if len(s) == 2 and "embedding" not in n)
    head = config.vocab_size * config.embed_dim if config.tied else 0
    return 2 * (matrices + head)


def _gathered_bytes(config: GPTConfig, dtype: Dtype) -> int:
    """What FSDP has gathered at the peak: two blocks, what is outside the blocks, gradients.

    The next block is gathered while the current one is computed. Gradients are in the products'
    dtype, and once more in float32 where they are being reduced.
    """
    block, rest = _parameter_counts(config)
    size = _SIZES[dtype]
    reduced = FLOAT * max(block, rest)
    return size * (rest + 2 * block) + size * (rest + block) + reduced


def step_traffic(
    config: GPTConfig, *, sharding: Sharding, devices: int, dtype: Dtype, pieces: int = 1
) -> int:
    """Bytes that each device sends per step, with ring collectives (Patarasuk & Yuan 2009).

    DDP all-reduces the float32 gradients once per step: 2(n-1)/n of their size. FSDP all-gathers
    each block's weights in the forward and again in the backward pass, what is outside the blocks
    once, and reduce-scatters the gradients: (n-1)/n of each size, for every micro-batch.
    """
    parameters = config.num_parameters()
    fraction = (devices - 1) / devices
    if sharding == "ddp":
        return round(2 * fraction * FLOAT * parameters)
    rest = _parameter_counts(config)[1]
    gathered = _SIZES[dtype] * (2 * parameters - rest)
    return round(pieces * fraction * (gathered + FLOAT * parameters))
