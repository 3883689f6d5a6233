"""The tensors of another program's model, and the one way from them to mygpt's parameters.

A format has a table of names (`Names`), from which both directions follow: import reads `Tensors`
into mygpt's parameters, and export writes views of the parameters under the other program's names.
Letters: C embedding, D head size, G key/value heads, H heads, M MLP width.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.checkpoint.container import Arrays
from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.core.config import GPTConfig
from mygpt.errors import InputError
from mygpt.machine import require_memory
from mygpt.tokenization import Tokenizer

READABLE = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}  # number types, as in NumPy

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_OTHER = "it is another kind of model, or its code was changed"
_MERGE = "it is from an adapter; merge it first (model.merge_and_unload().save_pretrained(...))"


@dataclass(frozen=True)
class Imported:
    """A model of another program."""

    config: GPTConfig  # its configuration
    arrays: Arrays  # its parameters, float32, by the names of `parameter_shapes`
    tokenizer: Tokenizer  # its tokenizer
    # Lines for the user: what was dropped or assumed
    notes: list[str] = field(default_factory=list)
    # Its source, as JSON values, for the checkpoint's provenance
    origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet."""

    path: Path  # the file
    name: str  # its name in the file
    dtype: str  # its number type, as safetensors calls it: "F32", "BF16"
    shape: tuple[int, ...]  # its shape
    # Reads it into a float32 array of that shape, in C order
    fill: Callable[[NDArray[np.float32]], None]

    def read(self) -> NDArray[np.float32]:
        """Its values; `InputError` if its number type cannot be read."""
        self.require_readable()
        array = np.empty(self.shape, np.float32)
        self.fill(array)
        return array

    def require_readable(self) -> None:
        """Raise `InputError` if its number type cannot be read."""
        if self.dtype not in READABLE:
            raise InputError(
                f"{self.path}: tensor {self.name!r:.80} has the number type {self.dtype!r:.20}: "
                f"only {', '.join(READABLE)} can be read"
            )


@dataclass(frozen=True)
class Part:
    """The rows of one parameter of mygpt that are one tensor of another program."""

    name: str  # the parameter of mygpt
    begin: int  # the first row
    end: int  # the row after the last
    transposed: bool  # their tensor is (in, out), as in GPT-2; mygpt's is (out, in)

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of their tensor, given those of mygpt's parameters."""
        shape = (self.end - self.begin, *shapes[self.name][1:])
        return shape[::-1] if self.transposed else shape

    def view(self, arrays: Arrays) -> NDArray[Any]:
        """Their tensor as a view of mygpt's parameter."""
        rows = arrays[self.name][self.begin : self.end]
        return rows.T if self.transposed else rows


@dataclass(frozen=True)
class Names:
    """How another program names the tensors of a model."""

    block: str  # the beginning of the names in a block, before its number: "transformer.h."
    # Its name for each module of mygpt; several for a matrix of mygpt that is several matrices
    # there (queries, keys and values; gate and up)
    modules: Mapping[str, str | tuple[str, ...]]
    transposed: bool = False  # the matrices of its blocks are (in, out)

    def of(self, parameter: str) -> list[str]:
        """The names of the tensors that are one parameter of mygpt."""
        module, _, kind = parameter.rpartition(".")
        at = ""
        if module.startswith("blocks."):
            _, number, module = module.split(".", 2)
            at = f"{self.block}{number}."
        theirs = self.modules[module]
        return [f"{at}{name}.{kind}" for name in ([theirs] if isinstance(theirs, str) else theirs)]

    def parts(self, config: GPTConfig) -> dict[str, Part]:
        """For each of their tensors, its rows in mygpt's parameters."""
        queries, keys = config.num_heads * config.head_size, config.kv_heads * config.head_size
        found: dict[str, Part] = {}
        for parameter, (rows, *rest) in parameter_shapes(config).items():
            theirs = self.of(parameter)
            sizes = {1: [rows], 2: [rows // 2] * 2, 3: [queries, keys, keys]}[len(theirs)]
            transposed = self.transposed and bool(rest) and parameter.startswith("blocks.")
            begin = 0
            for name, size in zip(theirs, sizes, strict=True):
                found[name] = Part(parameter, begin, begin + size, transposed)
                begin += size
        return found

    def views(self, config: GPTConfig, arrays: Arrays) -> dict[str, NDArray[Any]]:
        """Their tensors as views of mygpt's parameters; a parameter that is missing is zeros."""
        shapes = parameter_shapes(config)
        absent = {name: np.zeros(shapes[name]) for name in shapes.keys() - arrays.keys()}
        complete = {**arrays, **absent}
        return {name: part.view(complete) for name, part in self.parts(config).items()}


class Tensors(dict[str, StoredTensor]):
    """Tensors of another program's model by name, without the prefixes of wrappers.

    DataParallel, torch.compile and FSDP add a part to every name ("module.", "_orig_mod."), a
    class that contains the model adds an outer prefix ("model."), and a model that is saved
    without its head lacks the family's prefix ("transformer.").

    Args:
        where: the file or folder, for messages.
        found: tensors by the names in the file.
        anchors: names without `prefix`; the first of them that is found shows the outer prefix.
        prefix: the family's prefix, which all names but the head's get.

    Raises:
        InputError: if two names in the file become equal.
    """

    def __init__(
        self,
        where: Path,
        found: Mapping[str, StoredTensor],
        anchors: Iterable[str] = (),
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.where = where
        self.update(found)
        self._rename(lambda name: ".".join(p for p in name.split(".") if p not in _WRAPPERS))
        for anchor in anchors:
            ends = [name for name in self if f".{name}".endswith(f".{anchor}")]
            if len(ends) == 1:
                self._remove_outer(ends[0].removesuffix(anchor), prefix)
                break

    def _remove_outer(self, outer: str, prefix: str) -> None:
        """Remove a prefix of names, up to and without `prefix`, which is added if it is missing."""
        has_prefix = f".{outer}".endswith(f".{prefix}")
        outer = outer.removesuffix(prefix) if has_prefix else outer

        def renamed(name: str) -> str:
            inner = name.removeprefix(outer)
            lacks = name.startswith(outer) and not has_prefix and not inner.startswith("lm_head.")
            return prefix + inner if lacks else inner

        self._rename(renamed)

    def _rename(self, renamed: Callable[[str], str]) -> None:
        found = dict(self)
        self.clear()
        for name, tensor in found.items():
            if (plain := renamed(name)) in self:
                raise InputError(
                    f"{self.where} has tensor {plain!r:.80} twice, once as {tensor.name!r:.80}: "
                    "save model.state_dict() of the plain model"
                )
            self[plain] = tensor

    def in_file(self, name: str) -> str:
        """The name that the file uses, or would use, for a tensor."""
        for ours, tensor in self.items():
            if tensor.name.endswith(ours):
                return tensor.name.removesuffix(ours) + name
            if ours.endswith(tensor.name):
                return name.removeprefix(ours.removesuffix(tensor.name))
        return name

    def matrix(self, name: str) -> tuple[int, int]:
        """The shape of a matrix; `InputError` if it is missing, or not a matrix."""
        if name not in self:
            raise self._missing(name)
        shape = self[name].shape
        if len(shape) != 2 or not min(shape):
            raise InputError(
                f"{self.where}: tensor {self[name].name!r:.80} has shape {shape!s:.80}, and must "
                "be a matrix that is not empty: the file is not a model of this kind"
            )
        return shape[0], shape[1]

    def _missing(self, name: str) -> InputError:
        return InputError(
            f"{self.where} has no tensor {self.in_file(name)!r:.80}, which its configuration "
            "needs: it is another kind of model, or was not saved completely"
        )

    def count_blocks(self, names: Names) -> int:
        """The number N of blocks, which are numbered 0 to N - 1; `InputError` for a gap."""
        pattern = re.compile(re.escape(names.block) + r"(\d{1,9})\.", re.ASCII)
        found = {int(match[1]) for match in map(pattern.match, self) if match}
        missing = next(n for n in range(len(found) + 1) if n not in found)
        if not found or missing < len(found):
            raise self._missing(f"{names.block}{missing}")
        return len(found)

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors have equal values."""
        same_shape = self[name].shape == self[other].shape
        return same_shape and np.array_equal(self[name].read(), self[other].read(), equal_nan=True)

    def drop(self, *endings: str) -> None:
        """Skip the tensors whose names end with one of `endings`: buffers, not parameters."""
        for name in [name for name in self if f".{name}".endswith(endings)]:
            del self[name]

    def check(self, names: Names, config: GPTConfig) -> None:
        """Check that these are the tensors of a model, and that there is memory for them.

        Raises:
            InputError: naming a tensor that is missing, unknown, or of another shape or type.
            OutOfMemoryError: if they need more memory, as float32, than is free.
        """
        if config.num_layers > len(self):  # before a name is made for each of that many tensors
            raise InputError(
                f"{self.where} has {len(self):,} tensors, too few for the {config.num_layers:,} "
                "layers of its configuration: copy it again"
            )
        shapes, parts = parameter_shapes(config), names.parts(config)
        wanted = {name: part.shape(shapes) for name, part in parts.items()}
        for name, tensor in self.items():
            if name not in wanted:
                raise InputError(
                    f"{tensor.path}: tensor {tensor.name!r:.80} is not part of the model that its "
                    f"configuration describes: {_MERGE if 'lora_' in name else _OTHER}"
                )
        for name, shape in wanted.items():
            if name not in self:
                raise self._missing(name)
            if self[name].shape != shape:
                raise InputError(
                    f"{self[name].path}: tensor {self[name].name!r:.80} has shape "
                    f"{self[name].shape!s:.80}, and its configuration needs {shape}"
                )
            self[name].require_readable()
        # A transposed tensor needs a second buffer, one at a time.
        buffers = [math.prod(wanted[name]) for name, part in parts.items() if part.transposed]
        numbers = sum(map(math.prod, shapes.values())) + max(buffers, default=0)
        require_memory(self.where, 4 * numbers)

    def load(self, names: Names, config: GPTConfig) -> dict[str, NDArray[np.float32]]:
        """mygpt's parameters, float32; errors as for `check`."""
        self.check(names, config)
        arrays = {n: np.empty(shape, np.float32) for n, shape in parameter_shapes(config).items()}
        for name, part in names.parts(config).items():
            view = part.view(arrays)
            if view.flags.c_contiguous:
                self[name].fill(view)
            else:
                view[...] = self[name].read()
        return arrays

    def rounding_notes(self) -> list[str]:
        """A note if weights are rounded to float32."""
        if any(tensor.dtype == "F64" for tensor in self.values()):
            return ["weights of type float64 are rounded to float32"]
        return []


def shortest(config: GPTConfig) -> GPTConfig:
    """The configuration with None for each default value: equal models get equal fields."""
    meanings = {
        "num_kv_heads": "kv_heads",
        "head_dim": "head_size",
        "mlp_dim": "mlp_hidden",
        "norm_eps": "eps",
    }
    for name, meaning in meanings.items():
        with contextlib.suppress(InputError):  # some widths have no default head size
            change: dict[str, Any] = {name: None}
            shorter = replace(config, **change)
            if getattr(shorter, meaning) == getattr(config, meaning):
                config = shorter
    return config
