"""The compiled training step: which kernels it is made of."""

from __future__ import annotations

from mygpt.engines.cpu.build import Program

_OURS, _THEIRS = "mygpt.training.compiled", "mygpt.engines.cpu"
_COMPILED = "layout", "products", "arithmetic", "attention", "network", "orthogonal"
_SHARED = "layout", "simd", "arithmetic", "matmul", "panels"
TRAINING = Program(
    "training",
    "the training step",
    20,
    (*(f"{_OURS}.{name}" for name in _COMPILED), *(f"{_THEIRS}.{name}" for name in _SHARED)),
    (
        (f"{_OURS}.network", "prepare"),
        (f"{_OURS}.network", "learn"),
        (f"{_OURS}.orthogonal", "update_matrices"),
    ),
)
