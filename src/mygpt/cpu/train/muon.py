"""Muon: momentum made nearly orthogonal, for the matrices inside the blocks (Jordan et al., 2024).

`torch.optim.Muon` iterates in bfloat16, which CPUs without it emulate, and on one matrix at a
time. Here it is float32 and three iterations; query, key and value, and gate and up, are
matrices of their own. On a CPU the kernels of `mygpt.cpu.train` do the same.
Letters: A rows, B columns.
"""

from __future__ import annotations

import torch

from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.core.config import GPTConfig

MOMENTUM = 0.95
ITERATIONS = 3
_LINEAR, _CUBIC, _FIFTH = 3.4445, -4.7750, 2.0315


def parts(name: str, config: GPTConfig) -> list[int] | None:
    """The numbers of rows of the matrices in a parameter; None if Muon does not update it."""
    if not name.startswith("blocks.") or not name.endswith(".weight") or "norm" in name:
        return None
    shape = parameter_shapes(config)[name]
    if "query_key_value" in name:
        key_rows = config.kv_heads * config.head_size
        return [shape[0] - 2 * key_rows, key_rows, key_rows]
    if "mlp.input" in name and config.mlp == "swiglu":
        return [config.mlp_hidden, config.mlp_hidden]
    return [shape[0]]


def orthogonalize(matrix: torch.Tensor, iterations: int = ITERATIONS) -> torch.Tensor:
    """A matrix (A, B) with the same singular vectors and singular values near 1."""
    x = matrix / (matrix.norm() + 1e-7)
    if turned := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(iterations):
        square = x @ x.T
        x = _LINEAR * x + (_CUBIC * square + _FIFTH * square @ square) @ x
    return x.T if turned else x


@torch.no_grad()
def update(
    weight: torch.Tensor, gradient: torch.Tensor, momentum: torch.Tensor, *, rate: float,
    decay: float, found_inf: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """One step on one matrix, in place: Nesterov's momentum, orthogonalised, decoupled decay.

    Where the scalar `found_inf` is 1 nothing changes; the device is not waited for.
    """
    keep: torch.Tensor | float = 1.0
    if found_inf is not None:
        keep = 1.0 - found_inf
        gradient = torch.where(found_inf > 0, momentum, gradient)
    momentum.lerp_(gradient, 1.0 - MOMENTUM)
    step = orthogonalize(gradient.lerp(momentum, MOMENTUM))
    taller = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
    weight.mul_(1.0 - rate * decay * keep).sub_(step * keep, alpha=rate * taller)
