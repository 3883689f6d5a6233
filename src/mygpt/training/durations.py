"""How long a step takes here, estimated before the first one: a run ends only between steps.

Letters: B batch, T time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from mygpt.core.config import GPTConfig
from mygpt.errors import InputError
from mygpt.scaling.estimates import flops_per_token
from mygpt.training.config import TrainConfig

_LEAST_STEPS = 10  # of a timed run
_SHORT_S = 0.5  # a step that suits any budget
_LONG_S = 10.0  # a step that is announced
# No CPU computes so many operations in less than some seconds: below, nothing is measured.
_LONG_FLOPS = 1e12
_BYTES_PER_S = 2e8  # for writing, syncing and reading back a file
_FILES = 8  # of the weights' size: the first state and the last one (three each), two models


def file_s(config: GPTConfig) -> float:
    """Seconds for writing a model's file and reading it back."""
    return 4.0 * config.num_parameters() / _BYTES_PER_S


def step_flops(shape: GPTConfig, config: TrainConfig) -> float:
    """Floating-point operations of a run's longest step."""
    windows = [config.window(stage) for stage in range(len(config.stages) + 1)]
    return max(b * t * flops_per_token(shape, t).total for t, b in windows)


def fit_budget(
    shape: GPTConfig, config: TrainConfig, flops_per_s: float, *, least_batch: int | None
) -> tuple[TrainConfig, list[str]]:
    """A timed recipe whose steps fit into its minutes, and notes about it.

    Args:
        shape: the model's.
        config: the recipe.
        flops_per_s: what a training step reaches here.
        least_batch: how small batches may be made; None leaves them as they are.

    Raises:
        InputError: where the minutes are too few for a run of this model.
    """
    assert config.minutes is not None
    budget_s, wanted = 60.0 * config.minutes, config

    def step_s(config: TrainConfig) -> float:
        return step_flops(shape, config) / flops_per_s

    def needed_s(config: TrainConfig) -> float:
        return _LEAST_STEPS * step_s(config) + _FILES * file_s(shape)

    def too_long(config: TrainConfig) -> bool:
        return step_s(config) > _SHORT_S and needed_s(config) > budget_s

    while least_batch is not None and too_long(config) and config.batch_size > least_batch:
        stages = tuple((share, t, max(least_batch, b // 2)) for share, t, b in config.stages)
        batch_size = max(least_batch, config.batch_size // 2)
        config = replace(config, batch_size=batch_size, stages=stages)
    if too_long(config):
        batch = "--batch-size, " if least_batch is None else ""
        minutes = math.ceil(needed_s(config) / 60)
        raise InputError(
            f"minutes={config.minutes:g} is too short for a model of "
            f"{shape.num_parameters():,} parameters: one step ({_windows(config)}) takes about "
            f"{shown_s(step_s(config))} here, so choose --minutes {minutes} or more, or a "
            f"smaller {batch}--preset or --max-seq-len"
        )
    if config is wanted:
        return config, []
    note = (
        f"batches of {config.batch_size}, not {wanted.batch_size}: a step of "
        f"{wanted.batch_size} windows takes about {shown_s(step_s(wanted))} here"
    )
    return config, [note]


def long_steps(shape: GPTConfig, config: TrainConfig, measure: Callable[[], float]) -> list[str]:
    """A note if a step takes long, for a run that does not end by the clock.

    Args:
        shape: the model's.
        config: the recipe.
        measure: floating-point operations a second that a training step reaches here; only
            called where it matters, since the same command is to be the same run.
    """
    flops = step_flops(shape, config)
    if flops < _LONG_FLOPS or (step_s := flops / measure()) < _LONG_S:
        return []
    whole = f", the run about {shown_s(step_s * (config.total_steps or 0))}"
    return [
        f"one step ({_windows(config)}) takes about {shown_s(step_s)} here{whole}: a smaller "
        "--max-seq-len, --batch-size or model has shorter ones"
    ]


def _windows(config: TrainConfig) -> str:
    several = "s" * (config.batch_size != 1)
    return f"{config.batch_size} window{several} of {config.longest_window:,} tokens"


def shown_s(seconds: float) -> str:
    """A duration in words."""
    for unit, size in (("day", 86400.0), ("hour", 3600.0), ("minute", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}s"
    return f"{seconds:.0f} seconds" if seconds >= 2 else f"{seconds:.1f} seconds"
