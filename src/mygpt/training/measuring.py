"""How fast this machine trains, measured in a moment: what the default recipe is chosen by."""

from __future__ import annotations

import time

import torch

from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.training.recipe import causal_flops_per_token, shape_of

_WIDTH, _LAYERS, _WINDOW, _BATCH = 96, 2, 64, 32
_SECONDS = 0.5


def training_flops_per_s(threads: int) -> float:
    """Floating-point operations a second that the training kernels reach here.

    The best of some steps of a small model, since other programs only ever slow one down.
    """
    from mygpt.training.compiled.step import CpuTrainingStep

    config = GPTConfig(64, **shape_of(_WIDTH, _LAYERS, _WINDOW))
    with torch.random.fork_rng(devices=[]):
        model = GPT.from_config(config)
    step = CpuTrainingStep(model, threads)
    ids = (torch.arange(_BATCH * _WINDOW) % 64).view(_BATCH, _WINDOW)
    step.gradients(ids, ids)
    best, end = float("inf"), time.monotonic() + _SECONDS
    while time.monotonic() < end:
        began = time.perf_counter()
        step.gradients(ids, ids)
        best = min(best, time.perf_counter() - began)
    return ids.numel() * causal_flops_per_token(config, _WINDOW) / best
