"""The learning rate and the end of a run, as functions of how far the run has come."""

from __future__ import annotations

import math

from mygpt.training.config import TrainConfig


def progress(config: TrainConfig, step: int, elapsed_s: float) -> float:
    """The share of the run that is done, in [0, 1], after `step` steps and `elapsed_s` seconds."""
    if config.minutes is not None:
        return min(1.0, elapsed_s / max(1e-3, 60.0 * config.minutes - config.reserve_s))
    total_steps = config.total_steps or 0
    return step / total_steps if step < total_steps else 1.0


def learning_rate(config: TrainConfig, done: float) -> float:
    """The rate when the share `done` of the run is done (cosine: Loshchilov & Hutter, 2017)."""
    if config.schedule == "constant":
        return config.lr
    if done < config.warmup_ratio:  # from a tenth, so that no step is wasted
        return config.lr * (0.1 + 0.9 * done / config.warmup_ratio)
    fallen = (done - config.warmup_ratio) / (1.0 - config.warmup_ratio)
    low = config.min_lr_ratio
    if config.schedule == "linear":
        return config.lr * (low + (1.0 - low) * (1.0 - fallen))
    return config.lr * (low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * fallen)))
