"""The `cpu` engine of a torch model, packed again whenever its weights have changed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from numpy.typing import NDArray

from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.core.config import GPTConfig, positions_for
from mygpt.core.generation import uses_standard_forward
from mygpt.core.model import GPT, MLP, Attention, Block, RMSNorm
from mygpt.decode.choice import cpu_engine_available
from mygpt.engine import only_in_torch

if TYPE_CHECKING:
    from mygpt.cpu.decode.engine import CpuEngine

_OURS = {
    GPT, Block, Attention, MLP, RMSNorm, torch.nn.LayerNorm, torch.nn.Linear, torch.nn.Embedding,
    torch.nn.Dropout, torch.nn.ModuleList,
}  # fmt: skip
_TABLES = frozenset({"rotary_cos", "rotary_sin"})  # which grow
_engines: WeakKeyDictionary[GPT, tuple[Any, CpuEngine]] = WeakKeyDictionary()


def packable_parameters(model: Any) -> dict[str, torch.Tensor] | None:
    """All parameters and tables by name, or None where the engine would not do as the model.

    It would not for a changed forward, other modules, hooks (which may read or change what
    passes), modules that were set up otherwise than the configuration says, or an option that
    only torch implements. One walk of our own: torch's take several times as long, more than many
    a job.
    """
    if not uses_standard_forward(model) or not cpu_engine_available():
        return None
    if only_in_torch(model.config) is not None:
        return None
    found: dict[str, torch.Tensor] = {}
    shapes = _shapes(model.config)
    tables = _TABLES if model.config.position == "rotary" else frozenset()
    waiting: list[tuple[str, Any]] = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        if not _is_as_made(module, model):
            return None
        held = module._parameters if prefix else module._buffers
        for name, tensor in held.items():
            if tensor is not None:
                path = prefix + name
                if tensor.dtype != torch.float32 or not tensor.is_cpu:
                    return None
                if path in tables:
                    if tensor.shape[1:] != (model.config.head_size,):
                        return None
                elif tensor.shape != shapes.get(path):
                    return None
                found[path] = tensor
        for name, child in module._modules.items():
            waiting.append((f"{prefix}{name}.", child))
    rows = {len(found[name]) for name in tables & found.keys()}
    enough = all(most >= positions_for(model.max_seq_len) for most in rows) and len(rows) <= 1
    return found if enough and len(found) == len(shapes) + len(tables) else None


def _is_as_made(module: Any, model: GPT) -> bool:
    """Whether a module is one of ours, without hooks, set up as the model's configuration says."""
    kind, config = type(module), model.config
    if kind not in _OURS and not (module is model and kind.__mro__[1] is GPT):
        return False
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return False
    if kind is RMSNorm or kind is torch.nn.LayerNorm:
        return bool(module.eps == config.eps)
    if kind is Attention:
        return module.config is config or bool(module.config == config)
    return kind is not MLP or bool(module.kind == config.mlp)


@functools.cache
def _shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters; kept, since every call of `packable_parameters` reads them."""
    return parameter_shapes(config)


def cpu_engine_of(model: GPT, numbers: dict[str, torch.Tensor] | None = None) -> CpuEngine:
    """The model's engine; packed again when any number was changed, by whatever way.

    `numbers` are `packable_parameters`'s, where the caller has them already.
    """
    from mygpt.cpu.decode.engine import CpuEngine, digest_of
    from mygpt.cpu.decode.speculation import Drafts

    if numbers is None:
        numbers = packable_parameters(model) or {}
    laid = [p if p.is_contiguous() else p.detach().contiguous() for p in numbers.values()]
    key = (model.config, digest_of([(p.data_ptr(), p.nbytes // 4) for p in laid]))
    known = _engines.get(model)
    if known is None or known[0] != key:
        arrays = {name: p.detach().numpy() for name, p in zip(numbers, laid, strict=True)}
        known = key, CpuEngine(model.config, arrays, drafts=Drafts())
        _engines[model] = known
    return known[1]


def arrays_of(model: GPT) -> dict[str, NDArray[Any]]:
    """A model's parameters by name; no copy where they are contiguous float32 on the CPU."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        arrays[name] = p.detach().float().cpu().contiguous().numpy()
    return arrays
