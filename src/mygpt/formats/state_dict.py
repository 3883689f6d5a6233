"""Access to the tensors of another program's state dict: each is checked, and read exactly once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError, OutOfMemoryError
from mygpt.formats.tensor_names import name_in_file, plain_names
from mygpt.machine import free_memory_bytes

if TYPE_CHECKING:
    import torch


class StateDict:
    """The tensors of another program's state dict by name: each is checked, and read once.

    Args:
        path: the file, for messages.
        state: tensors by name; names may have the prefixes of wrappers, such as "module.".
        anchors: names without `prefix`, by which an outer prefix is found (see `plain_names`).
        prefix: the prefix of all names but the head's in the calls below.

    Raises:
        InputError: if it has anything but plain tensors.
        OutOfMemoryError: if the tensors need more memory, as float32, than is free.
    """

    def __init__(
        self, path: Path, state: Any, *, anchors: Iterable[str] = (), prefix: str = ""
    ) -> None:
        if not isinstance(state, Mapping) or not state:
            raise InputError(f"{path} does not hold a state dict: save model.state_dict()")
        self._path = path
        self._left: dict[str, torch.Tensor] = {}
        self._names: dict[str, str] = {}
        self._dtypes: set[str] = set()
        for key, tensor in state.items():
            if not isinstance(key, str):
                raise InputError(
                    f"{path}: a key of its state dict is of type {type(key).__name__}, not a "
                    "tensor's name: save model.state_dict()"
                )
            self._check(key, tensor)
        self._names = plain_names(path, state, anchors, prefix)  # as the file has them
        self._left = {name: state[theirs] for name, theirs in self._names.items()}
        held = sum(tensor.nbytes for tensor in self._left.values())
        if held > 3 * path.stat().st_size:  # a tied head is one matrix under two names
            raise InputError(
                f"{path} is damaged: its tensors are larger than the file; copy it again"
            )
        needed = sum(4 * tensor.numel() for tensor in self._left.values())
        free = free_memory_bytes()
        if free is not None and needed > free:
            raise OutOfMemoryError(
                f"{path} needs {needed:,} bytes of memory, and only {free:,} bytes are free: close "
                "other programs, or use a machine with more memory"
            )

    def _check(self, name: str, tensor: Any) -> None:
        import torch

        what = None
        if not isinstance(tensor, torch.Tensor):
            what = type(tensor).__name__
        elif tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            what = "a sparse, nested or quantized tensor"
        elif tensor.device.type != "cpu":
            what = "a tensor without values (on the meta device)"
        elif tensor.nbytes > tensor.untyped_storage().nbytes():
            what = "an expanded view, larger than its stored values"
        if what is not None:
            raise InputError(
                f"{self._path}: {name!r:.80} is {what}, not a plain tensor: "
                "save model.state_dict() of a plain model"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; `InputError` if it is missing."""
        return tuple(self._tensor(name).shape)

    def matrix(self, name: str) -> tuple[int, int]:
        """The shape of a matrix; `InputError` if it is missing, or not a matrix."""
        shape = tuple(self._tensor(name).shape)
        if len(shape) != 2:
            raise InputError(
                f"{self._path}: tensor {self._shown(name)} has shape {shape}, and must be a "
                "matrix: the file is of another kind of model"
            )
        return shape

    def count_blocks(self, prefix: str) -> int:
        """The number N of blocks, named `prefix` + 0 to N - 1 + "."; `InputError` for a gap."""
        pattern = re.compile(re.escape(prefix) + r"(\d{1,9})\.", re.ASCII)
        found = {int(m[1]) for m in map(pattern.match, self._left) if m}
        missing = next((n for n in range(len(found)) if n not in found), None)
        if not found or missing is not None:
            raise InputError(
                f"{self._path}: the tensors of {self._shown(f'{prefix}{missing or 0}')} are "
                f"missing: {self._summary()}"
            )
        return len(found)

    def take(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A copy of a tensor as float32, which is then marked as read.

        Raises:
            InputError: if it is missing, of another shape, or not of floating-point numbers.
        """
        import torch

        tensor = self._tensor(name)
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"{self._path}: tensor {self._shown(name)} has shape {tuple(tensor.shape)}, and "
                f"its configuration needs {shape}: they are of different models"
            )
        if not tensor.is_floating_point():
            raise InputError(
                f"{self._path}: tensor {self._shown(name)} is of type "
                f"{str(tensor.dtype).removeprefix('torch.')}, not of floating-point numbers: save "
                "the model before it is quantized"
            )
        self._dtypes.add(str(tensor.dtype).removeprefix("torch."))
        del self._left[name]
        return np.array(tensor.detach().resolve_neg().to(torch.float32).numpy(), order="C")

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._left:
            raise InputError(
                f"{self._path}: tensor {self._shown(name)} is missing: {self._summary()}"
            )
        return self._left[name]

    def _shown(self, name: str) -> str:
        """The name in the file for a name without prefixes, also for a missing tensor."""
        return self._names.get(name) or name_in_file(name, self._names)

    def _summary(self) -> str:
        first = min(self._names.values())
        return (
            f"the file has {len(self._names):,} tensors, the first by name is {first!r:.80}; the "
            "model is of another kind, or model.state_dict() of the whole model must be saved again"
        )

    def is_floating(self, name: str) -> bool:
        """Whether a tensor has floating-point numbers; `InputError` if it is missing."""
        return bool(self._tensor(name).is_floating_point())

    def peek(self, name: str) -> NDArray[np.float64]:
        """The values of a tensor as float64, without marking it as read."""
        return np.array(self._tensor(name).detach().resolve_neg().double().numpy())

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors have equal values; True also if one is missing."""
        import torch

        first, second = self._left.get(name), self._left.get(other)
        if first is None or second is None:
            return True
        return first.dtype == second.dtype and torch.equal(first, second)

    def ignore(self, *endings: str) -> None:
        """Skip the tensors whose names end with one of `endings`: buffers, not parameters."""
        for name in [name for name in self._left if name.endswith(endings)]:
            del self._left[name]

    def finish(self) -> list[str]:
        """Notes on the tensors that were read; `InputError` if any tensor was not."""
        if self._left:
            shown = ", ".join(repr(self._names[name][:60]) for name in sorted(self._left)[:3])
            raise InputError(
                f"{self._path} has {len(self._left)} tensors that are not part of this kind of "
                f"model ({shown}): its code was changed, and it cannot be imported"
            )
        return number_notes(self._dtypes)


def number_notes(dtypes: Iterable[str]) -> list[str]:
    """A note about weights whose type in the file is not float32, if there are any."""
    others = sorted(set(dtypes) - {"float32"})
    done = "rounded" if "float64" in others else "converted"
    return [f"weights of type {', '.join(others)} are {done} to float32"] if others else []
