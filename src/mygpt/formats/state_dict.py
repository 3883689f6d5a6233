"""The tensors of a state dict from elsewhere, by name: each is checked and taken once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mygpt.errors import InputError, OutOfMemoryError
from mygpt.formats.tensor_names import plain_names, spelled
from mygpt.machine import free_memory_bytes

if TYPE_CHECKING:
    import torch


class StateDict:
    """The tensors of a state dict from elsewhere: each is checked and taken once.

    Args:
        path: the file, for messages.
        state: tensors by name, also with what wraps a model before or inside the names.
        anchors: names without `prefix` that tell what stands before all (see `plain_names`).
        prefix: what the names asked for have before all but the head's.

    Raises:
        InputError: where it holds anything but plain tensors of floating-point numbers.
        OutOfMemoryError: where they would not fit into memory as float32.
    """

    def __init__(
        self, path: Path, state: Any, *, anchors: Iterable[str] = (), prefix: str = ""
    ) -> None:
        if not isinstance(state, Mapping) or not state:
            raise InputError(f"{path} holds no state dict: save model.state_dict() again")
        self._path = path
        self._left: dict[str, torch.Tensor] = {}
        self._names: dict[str, str] = {}
        self._dtypes: set[str] = set()
        for key, tensor in state.items():
            if not isinstance(key, str):
                raise InputError(f"{path}: {type(key).__name__} is no name of a tensor")
            self._check(key, tensor)
        self._names = plain_names(path, state, anchors, prefix)  # as the file has them
        self._left = {name: state[theirs] for name, theirs in self._names.items()}
        held = sum(tensor.nbytes for tensor in self._left.values())
        if held > 3 * path.stat().st_size:  # a tied head is one matrix under two names
            raise InputError(f"{path} is damaged: its tensors are larger than the file")
        needed = sum(4 * tensor.numel() for tensor in self._left.values())
        free = free_memory_bytes()
        if free is not None and needed > free:
            raise OutOfMemoryError(
                f"{path} needs {needed:,} bytes of memory, and {free:,} bytes are free"
            )

    def _check(self, name: str, tensor: Any) -> None:
        import torch

        what = None
        if not isinstance(tensor, torch.Tensor):
            what = type(tensor).__name__
        elif tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            what = "a sparse, nested or quantized tensor"
        elif tensor.device.type != "cpu":
            what = "a tensor without numbers"
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
        """The shape of a tensor that must be there."""
        return tuple(self._tensor(name).shape)

    def matrix(self, name: str) -> tuple[int, int]:
        """The shape of a matrix that must be there; `InputError` where it is none."""
        shape = tuple(self._tensor(name).shape)
        if len(shape) != 2:
            raise InputError(
                f"{self._path}: tensor {self._shown(name)} has shape {shape}, and must be a "
                "matrix: it is of another kind of model"
            )
        return shape

    def numbered(self, prefix: str) -> int:
        """How many blocks there are: names `prefix` + 0 to N - 1 + ".", without gaps."""
        pattern = re.compile(re.escape(prefix) + r"(\d{1,9})\.", re.ASCII)
        found = {int(m[1]) for m in map(pattern.match, self._left) if m}
        missing = next((n for n in range(len(found)) if n not in found), None)
        if not found or missing is not None:
            raise InputError(
                f"{self._path}: the tensors of {self._shown(f'{prefix}{missing or 0}')} are "
                f"missing: {self._what_is_there()}"
            )
        return len(found)

    def take(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A copy as float32; `InputError` where it is missing or of another shape or kind."""
        import torch

        tensor = self._tensor(name)
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"{self._path}: tensor {self._shown(name)} has shape {tuple(tensor.shape)}, and "
                f"its configuration wants {shape}: they are of different models"
            )
        if not tensor.is_floating_point():
            raise InputError(
                f"{self._path}: tensor {self._shown(name)} holds "
                f"{str(tensor.dtype).removeprefix('torch.')}, not floating-point numbers: save the "
                "model before it is quantized"
            )
        self._dtypes.add(str(tensor.dtype).removeprefix("torch."))
        del self._left[name]
        return np.array(tensor.detach().resolve_neg().to(torch.float32).numpy(), order="C")

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._left:
            raise InputError(
                f"{self._path}: tensor {self._shown(name)} is missing: {self._what_is_there()}"
            )
        return self._left[name]

    def _shown(self, name: str) -> str:
        """A name as the file has it, or would have it."""
        return self._names.get(name) or spelled(name, self._names)

    def _what_is_there(self) -> str:
        first = min(self._names.values())
        return (
            f"of the tensors in the file ({len(self._names):,}) {first!r:.80} is the first; save "
            "model.state_dict() of the whole model again, or it is of another kind of model"
        )

    def is_floating(self, name: str) -> bool:
        """Whether a tensor that is there holds floating-point numbers."""
        return bool(self._tensor(name).is_floating_point())

    def peek(self, name: str) -> NDArray[np.float64]:
        """The numbers of a tensor that is there and stays."""
        return np.array(self._tensor(name).detach().resolve_neg().double().numpy())

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same numbers; a missing one is the same as any."""
        import torch

        first, second = self._left.get(name), self._left.get(other)
        if first is None or second is None:
            return True
        return first.dtype == second.dtype and torch.equal(first, second)

    def ignore(self, *endings: str) -> None:
        """Leave out tensors whose names end so: buffers that are not trained."""
        for name in [name for name in self._left if name.endswith(endings)]:
            del self._left[name]

    def finish(self) -> list[str]:
        """Notes on what was taken; `InputError` where a tensor is left that has no place."""
        if self._left:
            shown = ", ".join(repr(self._names[name][:60]) for name in sorted(self._left)[:3])
            raise InputError(
                f"{self._path} holds {len(self._left)} tensors that have no place in such a model "
                f"({shown}): its code was changed, and mygpt does not know how"
            )
        return number_notes(self._dtypes)


def number_notes(dtypes: Iterable[str]) -> list[str]:
    """A line about weights that are no float32 in their file; none where all are."""
    others = sorted(set(dtypes) - {"float32"})
    done = "rounded to" if "float64" in others else "kept as"
    return [f"weights of {', '.join(others)} are {done} float32"] if others else []
