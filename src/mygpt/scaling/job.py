"""A training that is planned (`Job`), and everything that follows from it (`Estimate`).

Letters: N parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mygpt.core.config import GPTConfig, require_int, require_number
from mygpt.errors import InputError
from mygpt.scaling.compute import Flops, chinchilla_ratio, flops_per_token
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

_PIECE_TOKENS = 4096  # of the windows at once, where nobody says how many


@dataclass(frozen=True)
class Job:
    """What is to be trained, on what.

    Attributes:
        config: the model.
        tokens: to read.
        batch_size: windows a step, of all devices together.
        devices: of all machines together.
        micro_batch: windows at once on a device; None is about 4,096 tokens' worth.
        device_memory: bytes of each; None where it is not known.
        link_gbps: gigabits a second that each device can send; None where it is not known.

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
        """Tokens a step."""
        return self.batch_size * self.config.max_seq_len

    @property
    def steps(self) -> int:
        """How many steps read all tokens."""
        return math.ceil(self.tokens / self.batch_tokens)

    @property
    def windows(self) -> int:
        """Windows a step on the device that has most."""
        return math.ceil(self.batch_size / self.devices)

    @property
    def piece(self) -> int:
        """Windows at once on a device."""
        usual = max(1, _PIECE_TOKENS // self.config.max_seq_len)
        return min(self.windows, self.micro_batch or usual)

    @property
    def pieces(self) -> int:
        """How often a device goes through the model in a step."""
        return math.ceil(self.windows / self.piece)

    @property
    def flops(self) -> Flops:
        """Of the whole training."""
        return flops_per_token(self.config, self.config.max_seq_len).times(self.tokens)


@dataclass(frozen=True)
class Placement:
    """One way to train, and what it needs of each device.

    Attributes:
        sharding: "ddp" or "fsdp"; on one device "ddp" is plain training.
        dtype: of products.
        checkpointing: whether activations are computed again.
        memory: bytes by purpose.
        total: their sum.
        fits: whether a tenth of the device is left; None where its memory is not known.
    """

    sharding: Sharding
    dtype: Dtype
    checkpointing: bool
    memory: DeviceMemory
    total: int
    fits: bool | None


@dataclass(frozen=True)
class Fewest:
    """The least number of devices for one way to train; None where no number a batch allows is."""

    dtype: Dtype
    checkpointing: bool
    devices: int | None


@dataclass(frozen=True)
class Traffic:
    """What each device sends in a step, and the seconds that takes at least (None: no link)."""

    sharding: Sharding
    dtype: Dtype
    bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Time:
    """How long the whole training takes at a rate that somebody measured.

    Attributes:
        basis: "measured" here, or "given" as an efficiency and a peak.
        flops_per_s: of one device.
        one_device_s: on one device.
        all_devices_s: on all, at this rate and without loss to communication.
    """

    basis: Literal["measured", "given"]
    flops_per_s: float
    one_device_s: float
    all_devices_s: float


@dataclass(frozen=True)
class Estimate:
    """What follows from a job; all of it computed, nothing run.

    Attributes:
        parameters: N.
        weights_bytes: float32, as the model's file has them.
        weights_16bit_bytes: as an export in 16 bits has them.
        state_bytes: of the file that going on needs: weights and AdamW's means.
        run_bytes: of a run's folder: two models and two states.
        steps: to make.
        flops: 6ND and attention's products.
        tokens_a_parameter: D / N.
        times_chinchilla: the tokens over 20 N.
        placements: each way to train.
        fewest: the least devices for each; empty where a device's memory is not known.
        traffic: of a step; empty on one device.
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
    """Everything that follows from a job, for each of the formats and ways to keep activations."""
    whole, numbers = states(job.config), job.config.num_parameters()
    state_bytes = whole.weights + whole.optimizer
    shardings: tuple[Sharding, ...] = ("ddp", "fsdp") if job.devices > 1 else ("ddp",)
    ways = [(dtype, again) for dtype in dtypes for again in checkpointings]
    return Estimate(
        parameters=numbers,
        weights_bytes=whole.weights,
        weights_16bit_bytes=2 * numbers,
        state_bytes=state_bytes,
        run_bytes=2 * (whole.weights + state_bytes),
        steps=job.steps,
        flops=job.flops,
        tokens_a_parameter=job.tokens / numbers,
        times_chinchilla=chinchilla_ratio(job.config, job.tokens),
        placements=tuple(
            _placement(job, sharding, dtype, again)
            for sharding in shardings
            for dtype, again in ways
        ),
        fewest=tuple(_fewest(job, dtype, again) for dtype, again in ways if job.device_memory),
        traffic=tuple(
            _traffic(job, sharding, dtype)
            for sharding in shardings
            for dtype in dtypes
            if job.devices > 1
        ),
    )


def time_for(job: Job, flops_per_s: float, basis: Literal["measured", "given"]) -> Time:
    """How long a job takes where each device reaches so many operations a second."""
    one = job.flops.total / flops_per_s
    return Time(basis, flops_per_s, one, one / job.devices)


def _placement(job: Job, sharding: Sharding, dtype: Dtype, again: bool) -> Placement:
    need = device_memory(
        job.config, sharding=sharding, devices=job.devices, micro_batch=job.piece,
        seq_len=job.config.max_seq_len, dtype=dtype, checkpointing=again,
    )  # fmt: skip
    told = None if job.device_memory is None else fits(need, job.device_memory)
    return Placement(sharding, dtype, again, need, need.total, told)


def _fewest(job: Job, dtype: Dtype, again: bool) -> Fewest:
    assert job.device_memory is not None
    devices = smallest_devices(
        job.config, job.device_memory, micro_batch=job.piece, seq_len=job.config.max_seq_len,
        dtype=dtype, checkpointing=again, most=job.batch_size,
    )  # fmt: skip
    return Fewest(dtype, again, devices)


def _traffic(job: Job, sharding: Sharding, dtype: Dtype) -> Traffic:
    sent = step_traffic(
        job.config, sharding=sharding, devices=job.devices, dtype=dtype, pieces=job.pieces
    )
    seconds = None if job.link_gbps is None else 8 * sent / (1e9 * job.link_gbps)
    return Traffic(sharding, dtype, sent, seconds)
