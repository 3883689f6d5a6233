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

_OURS = (
    GPT, Block, Attention, MLP, RMSNorm, torch.nn.LayerNorm, torch.nn.Linear, torch.nn.Embedding,
    torch.nn.Dropout, torch.nn.ModuleList,
)  # fmt: skip
_engines: WeakKeyDictionary[GPT, tuple[Any, CpuEngine]] = WeakKeyDictionary()


def can_pack(model: Any) -> bool:
    """Whether the compiled engine would do all that the model's own forward does.

    It would not for a changed forward, other modules or hooks, which may look at or change
    what passes.
    """
    if not has_own_forward(model) or not compiled_engine_available():
        return False
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        return False
    return all(
        isinstance(module, _OURS) and not module._forward_hooks and not module._forward_pre_hooks
        for module in model.modules()
    )


def cpu_engine_of(model: GPT) -> CpuEngine:
    """The model's engine; packed again when any weight was changed, by whatever way."""
    from mygpt.engines.cpu import CpuEngine, digest_of

    parameters = [p.detach().contiguous() for p in model.parameters()]
    key = (model.config, digest_of([(p.data_ptr(), p.numel()) for p in parameters]))
    known = _engines.get(model)
    if known is None or known[0] != key:
        known = key, CpuEngine(model.config, arrays_of(model))
        _engines[model] = known
    return known[1]


def arrays_of(model: GPT) -> dict[str, NDArray[np.float32]]:
    """The parameters of a model on the CPU by name, without a copy where they lie well."""
    return {name: p.detach().float().contiguous().numpy() for name, p in model.named_parameters()}
