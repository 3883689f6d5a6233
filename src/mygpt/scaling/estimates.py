"""What training costs: operations, and memory on each device, under DDP and FSDP.

Training states (weights, gradients, AdamW's moments) are counted as by Rajbhandari et al. 2020
(ZeRO), except that weights and gradients are float32 also where products are in bfloat16: 16 bytes
per parameter. Activations are counted as by Korthikanti et al. 2022, for the operations of
`core/model.py`; fused attention (Dao et al. 2022) keeps one number per query and no scores, so
nothing grows with T squared. Not counted: rotary tables, memory of the libraries themselves.
Letters: C embedding, D head size, G key/value heads, H heads, T time, V vocabulary.
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
# Fraction of the memory that training may take: the rest is for libraries, NCCL's buffers,
# fragmentation, other programs, and the estimate's error.
USABLE = 0.9
_SIZES: dict[str, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Flops:
    """Operations of a training step per token, forward and backward.

    Attributes:
        weights: 6 for each weight of a matrix product.
        attention: the products of queries with keys, and of attention weights with values.
    """

    weights: float
    attention: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.weights + self.attention


def flops_per_token(config: GPTConfig, seq_len: int) -> Flops:
    """Operations of a training step per token (Kaplan et al. 2020, section 2.1).

    Only products that are computed: of attention the causal half, and no embedding table, which
    is looked up.
    """
    c, d = config.embed_dim, config.head_size
    q, kv = config.num_heads * d, config.kv_heads * d
    inner = config.mlp_hidden * (3 if config.mlp == "swiglu" else 2)
    weights = config.num_layers * c * (2 * q + 2 * kv + inner) + c * config.vocab_size
    return Flops(6.0 * weights, 12 * config.num_layers * q * (seq_len + 1) / 2)


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device at the peak of a step.

    Attributes:
        weights: this device's shard, float32.
        gradients: this device's shard, float32.
        optimizer: this device's shard of AdamW's two moments and its step counts.
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


def device_memory(
    config: GPTConfig,
    *,
    sharding: Sharding,
    devices: int,
    micro_batch: int,
    dtype: Dtype = "float32",
    checkpointing: bool = False,
) -> DeviceMemory:
    """Peak memory of each device, for windows of the model's size.

    Args:
        config: the model.
        sharding: "ddp" keeps all states on each device (as training on one does); "fsdp" shards
            them (`fully_shard` of each block, and of the rest).
        devices: number of devices.
        micro_batch: windows per forward pass of a device.
        dtype: of matrix products; bfloat16 is autocast under DDP, and FSDP2's mixed precision.
        checkpointing: keep only each block's input, and recompute the rest.
    """
    parameters, tensors = config.num_parameters(), len(parameter_shapes(config))
    shards = devices if sharding == "fsdp" else 1
    tokens = micro_batch * config.max_seq_len
    # Autocast leaves the residual stream in float32; FSDP2 computes all in bfloat16.
    stream = FLOAT if sharding == "ddp" else _SIZES[dtype]
    kept = activations(config, dtype, stream=stream, checkpointing=checkpointing)
    return DeviceMemory(
        weights=math.ceil(FLOAT * parameters / shards),
        gradients=math.ceil(FLOAT * parameters / shards),
        optimizer=math.ceil(FLOAT * (2 * parameters + tensors) / shards),
        gathered=(_gathered_bytes if sharding == "fsdp" else _autocast_bytes)(config, dtype),
        activations=tokens * (kept.blocks + kept.head),
        working=tokens * max(kept.block_working, kept.head_working),
    )


@dataclass(frozen=True)
class Activations:
    """Bytes per token of one step's activations.

    Attributes:
        blocks: what the blocks keep for the backward pass.
        head: what the head keeps: the logarithms of the probabilities (float32), the targets.
        block_working: the gradients of a block's widest tensors.
        head_working: the logits, and two gradients in float32: of the log-probabilities and of
            the logits.
    """

    blocks: int
    head: int
    block_working: int
    head_working: int


def activations(
    config: GPTConfig,
    dtype: Dtype = "float32",
    *,
    stream: int = FLOAT,
    checkpointing: bool = False,
    scores: int = 0,
) -> Activations:
    """The activations of a step.

    Args:
        config: the model.
        dtype: of matrix products.
        stream: bytes of a number in the residual stream.
        checkpointing: whether blocks keep only their input.
        scores: T where attention with dropout stores its scores, as torch does on a CPU.
    """
    size, blocks, c = _SIZES[dtype], config.num_layers, config.embed_dim
    scores *= config.dropout > 0
    masks = stream * c if config.dropout else 0
    block = 2 * (_norm_bytes(config, size, stream) + masks) + _mlp_bytes(config, size)
    block += _attention_bytes(config, size, scores)
    kept = blocks * stream * c + block if checkpointing else blocks * block
    widest = max(_fused(config), config.mlp_hidden, config.num_heads * scores)
    return Activations(
        blocks=kept + masks + _norm_bytes(config, size, stream),
        head=FLOAT * config.vocab_size + 8,
        block_working=size * 2 * widest,
        head_working=(size + 2 * FLOAT) * config.vocab_size,
    )


def _attention_bytes(config: GPTConfig, size: int, scores: int) -> int:
    """Bytes per token that attention keeps, without the norm before it."""
    d, heads, groups = config.head_size, config.num_heads, config.kv_heads
    prepared = size * (heads + groups) * d
    kept = size * heads * d  # the result
    if config.qk_norm:
        kept += prepared + FLOAT * (heads + groups)
        kept += FLOAT * (heads + groups) * d if size < FLOAT else 0  # the norm is in float32
    if not scores:
        kept += size * _fused(config) + FLOAT * heads  # the fused kernel's logarithms of sums
        return kept + (prepared if config.qk_norm or config.position == "rotary" else 0)
    # Scaled queries and keys; probabilities, their mask, and the product; repeated values.
    kept += 2 * size * heads * d + 3 * FLOAT * heads * scores
    kept += size * heads * d if groups < heads else 0
    return kept + (size * _fused(config) if groups == heads or config.qk_norm else 0)


def _mlp_bytes(config: GPTConfig, size: int) -> int:
    return size * config.mlp_hidden * (4 if config.mlp == "swiglu" else 2)


def _norm_bytes(config: GPTConfig, size: int, stream: int) -> int:
    """Bytes per token of a norm's input, statistics and result (kept by the product after it)."""
    c = config.embed_dim
    if config.norm == "layer":
        return stream * c + 2 * FLOAT + size * c
    return FLOAT * c + FLOAT + stream * c + size * c


def _fused(config: GPTConfig) -> int:
    """Width of queries, keys and values together."""
    return (config.num_heads + 2 * config.kv_heads) * config.head_size


def _autocast_bytes(config: GPTConfig, dtype: Dtype) -> int:
    """The bfloat16 copies of the matrices, made once per forward pass and kept for the backward."""
    if dtype == "float32":
        return 0
    shapes = parameter_shapes(config)
    matrices = sum(math.prod(s) for n, s in shapes.items() if len(s) == 2 and "embedding" not in n)
    head = config.vocab_size * config.embed_dim if config.tied else 0
    return _SIZES[dtype] * (matrices + head)


def _gathered_bytes(config: GPTConfig, dtype: Dtype) -> int:
    """What FSDP has gathered at the peak: two blocks, what is outside the blocks, gradients.

    The next block is gathered while the current one is computed. Gradients are in the products'
    dtype, and once more in float32 where they are being reduced.
    """
    shapes = parameter_shapes(config)
    in_blocks = sum(math.prod(s) for name, s in shapes.items() if name.startswith("blocks."))
    block, rest = in_blocks // config.num_layers, config.num_parameters() - in_blocks
    return _SIZES[dtype] * (2 * rest + 3 * block) + FLOAT * max(block, rest)
