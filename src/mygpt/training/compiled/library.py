"""The list of the training step's kernels, for `mygpt.engines.cpu.build`; imports no torch."""

from __future__ import annotations

from mygpt.engines.cpu.build import KernelLibrary

_TRAINING, _DECODING = "mygpt.training.compiled", "mygpt.engines.cpu"
_SOURCES = "layout", "products", "arithmetic", "attention", "block", "network", "orthogonal"
_SHARED = "layout", "simd", "arithmetic", "matmul", "panels"
TRAINING = KernelLibrary(
    "training",
    "the training step",
    20,
    (*(f"{_TRAINING}.{name}" for name in _SOURCES), *(f"{_DECODING}.{name}" for name in _SHARED)),
    (
        (f"{_TRAINING}.network", "pack_weights"),
        (f"{_TRAINING}.network", "losses_and_gradients"),
        (f"{_TRAINING}.orthogonal", "update_matrices"),
    ),
)
