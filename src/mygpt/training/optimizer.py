"""AdamW over a model's parameters, and its state as named arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.model import GPT
from mygpt.training.config import TrainConfig


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter, 2019); norms and biases decay only with `decay_all`."""
    matrices = [p for p in model.parameters() if p.ndim >= 2 or config.decay_all]
    others = [p for p in model.parameters() if p.ndim < 2 and not config.decay_all]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": config.weight_decay}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    device = next(model.parameters()).device
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=device.type != "mps"
    )


def optimizer_arrays(optimizer: torch.optim.Optimizer, model: GPT) -> dict[str, NDArray[Any]]:
    """The optimizer's memory of each parameter, as `<what>/<parameter>`."""
    return {
        f"{what}/{name}": value.detach().cpu().numpy()
        for name, parameter in model.named_parameters()
        for what, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_arrays(
    optimizer: torch.optim.Optimizer, model: GPT, arrays: dict[str, NDArray[Any]]
) -> None:
    """Put back what `optimizer_arrays` gave; what was remembered since is forgotten."""
    optimizer.state.clear()
    parameters = dict(model.named_parameters())
    for key, array in arrays.items():
        what, name = key.split("/", 1)
        parameter = parameters[name]
        # Fused AdamW wants its step counts where the parameters are.
        value = torch.from_numpy(np.array(array)).to(parameter.device)
        if what == "step":  # one number; some files hold it as a row of one
            value = value.reshape(())
        optimizer.state[parameter][what] = value
