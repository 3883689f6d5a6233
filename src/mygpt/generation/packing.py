"""The compiled engine of a torch model, packed anew whenever its weights have changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.engines.choice import compiled_engine_available
from mygpt.engines.torch_engine import has_own_forward
from mygpt.model import GPT, MLP, Attention, Block, RMSNorm

if TYPE_CHECKING:
    from mygpt.engines.cpu import CpuEngine

_OURS = {
    GPT, Block, Attention, MLP, RMSNorm, torch.nn.LayerNorm, torch.nn.Linear, torch.nn.Embedding,
    torch.nn.Dropout, torch.nn.ModuleList,
}  # fmt: skip
_engines: WeakKeyDictionary[GPT, tuple[Any, CpuEngine]] = WeakKeyDictionary()


def can_pack(model: Any) -> bool:
    """Whether the compiled engine would do all that the model's own forward does."""
    return parameters_to_pack(model) is not None


def parameters_to_pack(model: Any) -> list[torch.Tensor] | None:
    """All parameters, or None where the compiled engine would not do the same as the model.

    It would not for a changed forward, other modules, or hooks, which may look at or change
    what passes. One walk of our own: torch's take several times as long, more than many a job.
    """
    if not has_own_forward(model) or not compiled_engine_available():
        return None
    found: list[torch.Tensor] = []
    waiting: list[Any] = [model]
    while waiting:
        module = waiting.pop()
        kind = type(module)
        if kind not in _OURS and not (kind.__mro__[1] is GPT and module is model):
            return None
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        for parameter in module._parameters.values():
            if parameter is not None:
                if parameter.dtype != torch.float32 or not parameter.is_cpu:
                    return None
                found.append(parameter)
        waiting.extend(module._modules.values())
    return found


def cpu_engine_of(model: GPT, parameters: list[torch.Tensor] | None = None) -> CpuEngine:
    """The model's engine; packed again when any weight was changed, by whatever way.

    `parameters` are `parameters_to_pack`'s, where the caller has them already.
    """
    from mygpt.engines.cpu import CpuEngine, digest_of

    if parameters is None:
        parameters = parameters_to_pack(model) or []
    laid = [p if p.is_contiguous() else p.detach().contiguous() for p in parameters]
    key = (model.config, digest_of([(p.data_ptr(), p.numel()) for p in laid]))
    known = _engines.get(model)
    if known is None or known[0] != key:
        known = key, CpuEngine(model.config, arrays_of(model))
        _engines[model] = known
    return known[1]


def arrays_of(model: GPT) -> dict[str, NDArray[np.float32]]:
    """The parameters of a model on the CPU by name, without a copy where they lie well."""
    return {name: p.detach().float().contiguous().numpy() for name, p in model.named_parameters()}
