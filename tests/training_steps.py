"""Batches, and their gradients by torch and by machine code, that several tests compare.

Letters: B batch, T time.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.cpu.train.step import CpuTrainingStep
from mygpt.training.optimizer import Optimizer
from shapes import build as build_model

Batch = tuple[torch.Tensor, torch.Tensor]
Results = tuple[torch.Tensor, dict[str, torch.Tensor]]  # the loss, and gradients by name

TUTORIAL = GPTConfig(19, 32, 2, 2, max_seq_len=600)
GPT2 = GPTConfig(37, 48, 3, 2, max_seq_len=600, mlp="gelu_tanh", attention_bias=True)
_MODERN: dict[str, Any] = {
    "norm": "rms", "position": "rotary", "mlp": "swiglu", "mlp_bias": False, "qk_norm": True,
    "max_seq_len": 600,
}  # fmt: skip
MODERN = GPTConfig(65, 32, 2, 2, tied=False, **_MODERN)
GROUPED = GPTConfig(11, 32, 6, 1, num_kv_heads=2, head_dim=16, mlp_dim=48, **_MODERN)
# Sums over more than one piece of every kind: over C, over the MLP's width, over V.
WIDE = GPTConfig(600, 528, 1, 1, head_dim=80, mlp_dim=544, max_seq_len=8, tied=False)
FAMILIES = {"tutorial": TUTORIAL, "gpt2": GPT2, "modern": MODERN, "grouped": GROUPED}


def build(config: GPTConfig, seed: int = 0, spread: float = 0.2) -> GPT:
    return build_model(config, seed, spread=spread).train()


def draw_batch(config: GPTConfig, batch: int, time: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (2, batch, time), generator=generator)
    return ids[0], ids[1]


def moments(optimizer: Optimizer) -> dict[str, NDArray[Any]]:
    """An optimizer's state, as `<kind>/<parameter>`."""
    return {name: tensor.numpy() for name, tensor in optimizer.tensors().items()}


def by_torch(model: GPT, batch: Batch) -> Results:
    """The loss and the gradients that autograd gives."""
    model.zero_grad(set_to_none=True)
    _, loss = model(*batch)
    assert loss is not None
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


def by_kernels(step: CpuTrainingStep, batch: Batch) -> Results:
    loss = step.gradients(*batch)
    named = step.model.named_parameters()
    return loss, {n: p.grad.clone() for n, p in named if p.grad is not None}
