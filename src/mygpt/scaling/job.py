"""A training run to be estimated (`Job`), and its cost (`Estimate`).

Letters: N parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mygpt.core.config import GPTConfig
from mygpt.errors import InputError, require_int, require_number
from mygpt.scaling.compute import Flops, chinchilla_ratio, palm_flops_per_token
from mygpt.scaling.memory import (
    DeviceMemory,
    Dtype,
    Sharding,
    device_memory,
    fits,
    smallest_devices,
    states,
    step_traffic,
)

_PIECE_TOKENS = 4096  # tokens of a device's micro-batch where `micro_batch` is not given


@dataclass(frozen=True)
class Job:
    """What is to be trained, and on which devices.

    Attributes:
        config: the model.
        tokens: training tokens.
        batch_size: windows per step, over all devices.
        devices: number of devices, over all machines.
        micro_batch: windows per forward pass of a device; None is about 4,096 tokens.
        device_memory: bytes of memory of each device; None where it is not known.
        link_gbps: gigabits per second that each device can send; None where it is not known.

    Raises:
        InputError: for a value outside its range.
    """

    config: GPTConfig
    tokens: int
    batch_size: int
    devices: int = 1
    micro_batch: int | None = None
    device_memory: int | None = None
    link_gbps: float | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "devices"):
            require_int(name, getattr(self, name), least=1)
        if self.devices > self.batch_size:
            raise InputError(
                f"devices={self.devices} cannot share batch_size={self.batch_size}: each needs a "
                f"window of {self.config.max_seq_len} a step, so choose --batch-size "
                f"{self.devices} or more"
            )
        if self.micro_batch is not None:
            require_int("micro_batch", self.micro_batch, least=1)
        if self.link_gbps is not None:
            require_number("link_gbps", self.link_gbps)
            if not 0 < self.link_gbps < math.inf:
                raise InputError(f"link_gbps={self.link_gbps} must be a finite number above 0")

    @property
    def batch_tokens(self) -> int:
        """Tokens per step."""
        return self.batch_size * self.config.max_seq_len

    @property
    def steps(self) -> int:
        """Number of steps."""
        return math.ceil(self.tokens / self.batch_tokens)

    @property
    def windows(self) -> int:
        """Windows per step of the device with the most."""
        return math.ceil(self.batch_size / self.devices)

    @property
    def piece(self) -> int:
        """Windows per forward pass of a device."""
        default = max(1, _PIECE_TOKENS // self.config.max_seq_len)
        return min(self.windows, self.micro_batch or default)

    @property
    def pieces(self) -> int:
        """Forward passes of a device per step."""
        return math.ceil(self.windows / self.piece)

    @property
    def flops(self) -> Flops:
        """Operations of the whole training run."""
        return palm_flops_per_token(self.config, self.config.max_seq_len).times(self.tokens)


@dataclass(frozen=True)
class Placement:
    """One way to train, and the memory that it needs on each device.

    Attributes:
        sharding: "ddp" or "fsdp"; on one device "ddp" is plain training.
        dtype: of matrix products.
        checkpointing: whether activations are recomputed in the backward pass.
        memory: bytes by purpose.
        total: their sum.
        fits: whether it leaves a tenth of the device free; None where its memory is not known.
    """

    sharding: Sharding
    dtype: Dtype
    checkpointing: bool
    memory: DeviceMemory
    total: int
    fits: bool | None


@dataclass(frozen=True)
class Fewest:
    """The smallest number of devices for one way to train; None where no number suffices."""

    dtype: Dtype
    checkpointing: bool
    devices: int | None


@dataclass(frozen=True)
class Traffic:
    """Bytes that each device sends per step, and the least seconds for it (None: no link given)."""

    sharding: Sharding
    dtype: Dtype
    bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Time:
    """How long the whole training run takes at a measured or given rate.

    Attributes:
        basis: "measured" on this machine, or "given" as an efficiency and a peak rate.
        flops_per_s: of one device.
        one_device_s: seconds on one device.
        all_devices_s: seconds on all devices, at this rate and without communication time.
    """

    basis: Literal["measured", "given"]
    flops_per_s: float
    one_device_s: float
    all_devices_s: float


@dataclass(frozen=True)
class Estimate:
    """Cost of a job, computed from formulas.

    Attributes:
        parameters: N.
        weights_bytes: size of the weights in float32, as in the model's file.
        weights_16bit_bytes: size of the weights in 16 bits, as in an export.
        state_bytes: size of the file that resuming needs: weights and AdamW's moments.
        run_bytes: size of a run's folder: two models and two states.
        steps: number of steps.
        flops: 6ND and the attention products.
        tokens_a_parameter: D / N.
        times_chinchilla: D / 20N.
        placements: memory of each way to train.
        fewest: the smallest number of devices for each; empty where a device's memory is not
            known.
        traffic: bytes sent per step; empty on one device.
    """

    parameters: int
    weights_bytes: int
    weights_16bit_bytes: int
    state_bytes: int
    run_bytes: int
    steps: int
    flops: Flops
    tokens_a_parameter: float
    times_chinchilla: float
    placements: tuple[Placement, ...]
    fewest: tuple[Fewest, ...]
    traffic: tuple[Traffic, ...]


def estimate(
    job: Job, *, dtypes: tuple[Dtype, ...], checkpointings: tuple[bool, ...] = (False, True)
) -> Estimate:
    """The cost of a job, for each dtype of products, with and without checkpointing."""
    replica, parameters = states(job.config), job.config.num_parameters()
    state_bytes = replica.weights + replica.optimizer
    shardings: tuple[Sharding, ...] = ("ddp", "fsdp") if job.devices > 1 else ("ddp",)
    ways = [(dtype, checkpointing) for dtype in dtypes for checkpointing in checkpointings]
    return Estimate(
        parameters=parameters,
        weights_bytes=replica.weights,
        weights_16bit_bytes=2 * parameters,
        state_bytes=state_bytes,
        run_bytes=2 * (replica.weights + state_bytes),
        steps=job.steps,
        flops=job.flops,
        tokens_a_parameter=job.tokens / parameters,
        times_chinchilla=chinchilla_ratio(job.config, job.tokens),
        placements=tuple(
            _placement(job, sharding, dtype, checkpointing)
            for sharding in shardings
            for dtype, checkpointing in ways
        ),
        fewest=tuple(_fewest(job, *way) for way in ways if job.device_memory),
        traffic=tuple(
            _traffic(job, sharding, dtype)
            for sharding in shardings
            for dtype in dtypes
            if job.devices > 1
        ),
    )


def time_for(job: Job, flops_per_s: float, basis: Literal["measured", "given"]) -> Time:
    """How long a job takes where each device reaches `flops_per_s`."""
    one_device_s = job.flops.total / flops_per_s
    return Time(basis, flops_per_s, one_device_s, one_device_s / job.devices)


def _placement(job: Job, sharding: Sharding, dtype: Dtype, checkpointing: bool) -> Placement:
    need = device_memory(
        job.config, sharding=sharding, devices=job.devices, micro_batch=job.piece,
        seq_len=job.config.max_seq_len, dtype=dtype, checkpointing=checkpointing,
    )  # fmt: skip
    enough = None if job.device_memory is None else fits(need, job.device_memory)
    return Placement(sharding, dtype, checkpointing, need, need.total, enough)


def _fewest(job: Job, dtype: Dtype, checkpointing: bool) -> Fewest:
    assert job.device_memory is not None
    devices = smallest_devices(
        job.config, job.device_memory, micro_batch=job.piece, seq_len=job.config.max_seq_len,
        dtype=dtype, checkpointing=checkpointing, most=job.batch_size,
    )  # fmt: skip
    return Fewest(dtype, checkpointing, devices)


def _traffic(job: Job, sharding: Sharding, dtype: Dtype) -> Traffic:
    sent = step_traffic(
        job.config, sharding=sharding, devices=job.devices, dtype=dtype, pieces=job.pieces
    )
    seconds = None if job.link_gbps is None else 8 * sent / (1e9 * job.link_gbps)
    return Traffic(sharding, dtype, sent, seconds)
