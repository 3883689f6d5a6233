"""Parts of a model that can be switched off: heads, and the attention and MLP of blocks.

A part adds to the residual stream through its output projection alone. The ablated model is
therefore a model with zeros there: every engine and every command runs it as any other model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from mygpt.checkpoint.model_file import Checkpoint
from mygpt.core.config import GPTConfig
from mygpt.errors import InputError

if TYPE_CHECKING:
    from mygpt.core.model import GPT

    Model = TypeVar("Model", bound=GPT | Checkpoint)

_HEAD, _OTHER = re.compile(r"(\d{1,9})\.(\d{1,9})"), re.compile(r"(attention|mlp|block)(\d{1,9})")


@dataclass(frozen=True)
class Part:
    """A head, or the attention, the MLP or both of a block.

    Its name counts from 1, as the pages do: "1.3" is head 3 of block 1, and "attention1", "mlp1"
    and "block1" are parts of block 1.
    """

    kind: Literal["head", "attention", "mlp", "block"]
    block: int  # index of the block, from 0
    head: int = 0  # of a head: its index in the block, from 0

    @classmethod
    def parse(cls, name: str, config: GPTConfig) -> Part:
        """The part of that name.

        Raises:
            InputError: if a model of this configuration has no such part.
        """
        if not isinstance(name, str):  # 1.10 as a number would be head 1
            raise InputError(f'part={name!r:.40} must be text, such as "1.3" or "mlp1"')
        blocks, heads = config.num_layers, config.num_heads
        part = None
        if found := _HEAD.fullmatch(name):
            part = cls("head", int(found[1]) - 1, int(found[2]) - 1)
        elif found := _OTHER.fullmatch(name):
            kind: Any = found[1]
            part = cls(kind, int(found[2]) - 1)
        if part is None or not (0 <= part.block < blocks and 0 <= part.head < heads):
            raise InputError(
                f"{name!r:.40} is not a part of this model: choose a head from 1.1 to "
                f"{blocks}.{heads}, or attention, mlp or block with a number from 1 to {blocks} "
                "(mlp1); blocks and heads count from 1, as on the pages"
            )
        return part

    def __str__(self) -> str:
        if self.kind == "head":
            return f"{self.block + 1}.{self.head + 1}"
        return f"{self.kind}{self.block + 1}"


def ablated(model: Model, parts: Iterable[Part]) -> Model:
    """The model without these parts: each adds zero to the residual stream.

    Args:
        model: a `GPT` or a checkpoint. It is not changed; the result shares all other weights
            with it.
        parts: what is switched off. A head's values are multiplied by zero before the output
            projection, whose bias stays; attention and MLP are switched off with their biases.
    """
    if isinstance(model, Checkpoint):
        arrays = dict(model.arrays)
        for name, where in _zeros(parts, model.config):
            arrays[name] = np.array(arrays[name])
            arrays[name][where] = 0
        changed: Any = replace(model, arrays=arrays)
    else:
        changed = _ablated_module(model, parts)
    return changed


def _ablated_module(model: GPT, parts: Iterable[Part]) -> GPT:
    from torch import nn

    copied = _with_the_same_tensors(model)
    for name, where in _zeros(parts, model.config):
        module, _, leaf = name.rpartition(".")
        old = copied.get_parameter(name)
        values = old.detach().clone()
        values[where] = 0
        setattr(copied.get_submodule(module), leaf, nn.Parameter(values, old.requires_grad))
    return copied


def _with_the_same_tensors(module: Any) -> Any:
    """A copy of a module and of those in it, with their tensors: `deepcopy` takes five times as
    long, more than a pass of a small model.
    """
    copied = module.__new__(type(module))
    for name, value in vars(module).items():  # its tables of parameters, buffers and hooks
        copied.__dict__[name] = value.copy() if isinstance(value, (dict, set)) else value
    for name, child in copied._modules.items():
        copied._modules[name] = None if child is None else _with_the_same_tensors(child)
    return copied


def _zeros(parts: Iterable[Part], config: GPTConfig) -> Iterator[tuple[str, Any]]:
    """Names of parameters and the index of what is zero in them."""
    d = config.head_size
    for part in parts:
        at = f"blocks.{part.block}"
        if part.kind == "head":
            columns = slice(part.head * d, (part.head + 1) * d)
            yield f"{at}.attention.output.weight", (slice(None), columns)
            continue
        biases = {"attention": config.attention_bias, "mlp": config.mlp_bias}
        for kind in ("attention", "mlp"):
            if part.kind in (kind, "block"):
                yield f"{at}.{kind}.output.weight", ...
                if biases[kind]:
                    yield f"{at}.{kind}.output.bias", ...
