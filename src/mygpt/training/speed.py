"""How fast this machine trains, measured by a few steps."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.core.training import train_steps
from mygpt.cpu.train.muon import parts
from mygpt.scaling.estimates import flops_per_token
from mygpt.training.config import DtypeName, TrainConfig
from mygpt.training.distributed.process_group import SINGLE_PROCESS
from mygpt.training.gradients import make_gradients, suitable_engine
from mygpt.training.hardware import check_format, cpu_products, described
from mygpt.training.memory import check_batch_fits, check_model_fits, fitting_piece, free_memory
from mygpt.training.optimizer import Optimizer
from mygpt.training.recipe import shape_of

# The model and the time with which the speed is measured, and the time for a second format.
_WIDTH, _LAYERS, _WINDOW, _BATCH = 96, 2, 64, 32
_SECONDS, _MORE_SECONDS = 0.5, 0.25


def training_speeds(threads: int, formats: Sequence[DtypeName]) -> dict[DtypeName, float]:
    """Floating-point operations per second of the machine-code training step, by format.

    That of the fastest of some steps of a small model: other programs only slow steps down. The
    formats take turns, so that they are compared under the same load. That of bfloat16 is
    float32's times the ratio of whole steps: Muon's update takes the same time in both, and so a
    larger part of the shorter step.
    """
    from mygpt.cpu.train.step import CpuTrainingStep

    config = GPTConfig(64, **shape_of(_WIDTH, _LAYERS, _WINDOW))
    with torch.random.fork_rng(devices=[]):
        model = GPT.from_config(config)
    ids = (torch.arange(_BATCH * _WINDOW) % 64).view(_BATCH, _WINDOW)
    steps = {name: CpuTrainingStep(model, threads, cpu_products(name)) for name in formats}
    best, update_s = dict.fromkeys(formats, math.inf), math.inf
    matrices = {n: torch.zeros_like(p) for n, p in model.named_parameters() if parts(n, config)}
    for step in steps.values():
        step.gradients(ids, ids)  # allocates buffers
    end = time.monotonic() + _SECONDS + _MORE_SECONDS * (len(formats) - 1)
    while time.monotonic() < end:
        for name, step in steps.items():
            best[name] = min(best[name], _seconds(step.gradients, ids, ids))
        if len(formats) > 1:
            update = partial(step.update_matrices, matrices, rate=0.0, decay=0.0)
            update_s = min(update_s, _seconds(update))
    work = ids.numel() * flops_per_token(config, _WINDOW).total
    speeds = {name: work / step_s for name, step_s in best.items()}
    if len(formats) > 1:
        base_s = best["float32"]
        for name, step_s in best.items():
            speeds[name] = speeds["float32"] * (base_s + update_s) / (step_s + update_s)
    return speeds


def _seconds(work: Callable[..., Any], *arguments: Any) -> float:
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


@dataclass(frozen=True)
class MeasuredSpeed:
    """What was measured."""

    device: str  # its name, and how it computed
    micro_batch: int  # windows at once: as many as asked for, or as fit in memory
    steps: int  # that were timed, after one that was not
    tokens_per_s: float  # the tokens of a step over the steps' median time


def measure_speed(
    config: GPTConfig,
    device: torch.device,
    *,
    micro_batch: int,
    dtype: DtypeName = "auto",
    checkpoint_activations: bool = False,
    budget_s: float = 5.0,
) -> MeasuredSpeed:
    """Train a few steps on `device` and time them: for `budget_s` seconds, and at least three.

    Raises:
        OutOfMemoryError: when the model or one window does not fit.
    """
    check_model_fits(config, free_memory(device))
    recipe = TrainConfig(
        batch_size=micro_batch, seq_len=config.max_seq_len, lr=1e-4, steps=1,
        engine=suitable_engine(config, device), dtype=dtype, sample_tokens=0,
        checkpoint_activations=checkpoint_activations,
    )  # fmt: skip
    check_format(recipe, device)
    with torch.random.fork_rng([device] * (device.type == "cuda")):
        model = GPT.from_config(config).to(device)
    free = free_memory(device)
    recipe = replace(recipe, batch_size=fitting_piece(model, recipe, free) or 1)
    check_batch_fits(model, recipe, free)
    times = _step_times(model, recipe, budget_s)
    tokens_per_s = recipe.batch_size * recipe.seq_len / statistics.median(times)
    name = described(recipe, device, SINGLE_PROCESS)
    return MeasuredSpeed(name, recipe.batch_size, len(times), tokens_per_s)


def _step_times(model: GPT, recipe: TrainConfig, budget_s: float) -> list[float]:
    """Seconds of each step: gradients, their norm, clipping, and the update."""
    last = next(model.parameters())
    ids = torch.arange(recipe.batch_size * (recipe.seq_len + 1), device=last.device)
    ids = (ids % model.config.vocab_size).view(recipe.batch_size, -1)
    batches = itertools.repeat((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
    gradients = make_gradients(model, recipe)
    optimizer = Optimizer(model, recipe, gradients.step)
    steps = train_steps(batches, gradients, optimizer, lambda _: recipe.lr, recipe.grad_clip)
    times: list[float] = []
    with gradients:
        model.train()
        while len(times) <= 3 or sum(times[1:]) < budget_s:
            began = time.perf_counter()
            next(steps)
            last.flatten()[0].item()  # waits for the device
            times.append(time.perf_counter() - began)
    return times[1:]  # the first allocates buffers and compiles
