"""The compiled training step: which kernels it is made of."""

from __future__ import annotations

from mygpt.engines.cpu.build import KernelLibrary

_OURS, _THEIRS = "mygpt.training.compiled", "mygpt.engines.cpu"
_COMPILED = "layout", "products", "arithmetic", "attention", "network", "orthogonal"
_SHARED = "layout", "simd", "arithmetic", "matmul", "panels"
TRAINING = KernelLibrary(
    "training",
    "the training step",
    20,
    (*(f"{_OURS}.{name}" for name in _COMPILED), *(f"{_THEIRS}.{name}" for name in _SHARED)),
    (
        (f"{_OURS}.network", "pack_weights"),
        (f"{_OURS}.network", "losses_and_gradients"),
        (f"{_OURS}.orthogonal", "update_matrices"),
    ),
)
