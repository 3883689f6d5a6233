"""How fast this device trains a model: a few real steps, as a run would make them."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass, replace

import torch

from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.core.training import train_steps
from mygpt.training.config import DtypeName, TrainConfig
from mygpt.training.distributed.process_group import SINGLE_PROCESS
from mygpt.training.gradients import make_gradients, suitable_engine
from mygpt.training.hardware import described
from mygpt.training.memory import check_batch_fits, check_model_fits, fitting_piece, free_memory
from mygpt.training.optimizer import Optimizer


@dataclass(frozen=True)
class Efficiency:
    """What was measured.

    Attributes:
        device: its name, and how it computed.
        micro_batch: windows at once: as many as asked for, or as fit in memory.
        steps: that were timed, after one that was not.
        tokens_per_s: the tokens of a step over the steps' median time.
    """

    device: str
    micro_batch: int
    steps: int
    tokens_per_s: float


def measure(
    config: GPTConfig,
    device: torch.device,
    *,
    micro_batch: int,
    dtype: DtypeName = "auto",
    checkpoint_activations: bool = False,
    budget_s: float = 5.0,
) -> Efficiency:
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
    with torch.random.fork_rng([device] * (device.type == "cuda")):
        model = GPT.from_config(config).to(device)
    free = free_memory(device)
    recipe = replace(recipe, batch_size=fitting_piece(model, recipe, free) or 1)
    check_batch_fits(model, recipe, free)
    times = _step_times(model, recipe, budget_s)
    tokens_per_s = recipe.batch_size * recipe.seq_len / statistics.median(times)
    name = described(recipe, device, SINGLE_PROCESS)
    return Efficiency(name, recipe.batch_size, len(times), tokens_per_s)


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
