"""Models whose parameters are loaded later: built without drawing random numbers for them."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT


class _NoInitialization(TorchFunctionMode):
    """Inside, torch's initializers leave parameters as they are.

    On the meta device there is nothing to initialize, and there the initializers import torch's
    compiler, which takes seconds.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options = options or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return arguments[0] if arguments else options["tensor"]
        return function(*arguments, **options)


def meta_model(config: GPTConfig) -> GPT:
    """A GPT on torch's meta device: its parameters have shapes and no memory."""
    model = GPT.__new__(GPT)
    with torch.device("meta"), _NoInitialization():
        model.build(config)
    return model


def allocate(model: GPT, device: torch.device) -> GPT:
    """Give a meta model memory on `device`; its parameters hold anything until they are loaded."""
    model.to_empty(device=device)
    model.register_rotary()
    for name, buffer in model.named_buffers(recurse=False):
        setattr(model, name, buffer.to(device))
    return model


def unloaded_model(config: GPTConfig) -> GPT:
    """A GPT on the CPU whose parameters hold anything until they are loaded."""
    model = GPT.__new__(GPT)
    with torch.device("cpu"), _NoInitialization():
        model.build(config)
    return model
