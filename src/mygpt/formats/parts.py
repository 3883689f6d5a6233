"""The mapping between the parameters of mygpt and the tensors of a Hugging Face family.

A family (`gpt2.py`, `llama.py`) gives one `Part` for each of its tensors. Import and export both
follow this table: `check_tensors`, then `read_parameters`; or `write_safetensors`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.checkpoint.container import Arrays
from mygpt.checkpoint.durable import write_durably
from mygpt.checkpoint.safetensors import to_json
from mygpt.errors import InputError, OutOfMemoryError
from mygpt.formats.tensor_names import name_in_file
from mygpt.formats.weight_files import READABLE, StoredTensor
from mygpt.machine import free_memory_bytes

Shapes = Mapping[str, tuple[int, ...]]

_MOST_HEADER_BYTES = 100_000_000  # bytes of a header that the safetensors library reads


@dataclass(frozen=True)
class Part:
    """The rows of one parameter of mygpt that correspond to one tensor of another program.

    Attributes:
        name: the parameter of mygpt.
        begin: the first row.
        end: the row after the last; None is the parameter's end.
        transposed: their tensor is (in, out), as in GPT-2; mygpt's is (out, in).
    """

    name: str
    begin: int = 0
    end: int | None = None
    transposed: bool = False

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """The shape of their tensor, given the shapes of mygpt's parameters."""
        rows, *rest = shapes[self.name]
        shape = ((rows if self.end is None else self.end) - self.begin, *rest)
        return shape[::-1] if self.transposed else shape

    def view(self, arrays: Arrays) -> NDArray[Any]:
        """Their tensor as a view of mygpt's parameter."""
        rows = arrays[self.name][self.begin : self.end]
        return rows.T if self.transposed else rows


def check_tensors(
    folder: Path, tensors: Mapping[str, StoredTensor], parts: Mapping[str, Part], shapes: Shapes
) -> None:
    """Check that the tensors match the model, and that there is memory for them as float32.

    Args:
        folder: the folder, for messages.
        tensors: their tensors by name, without buffers.
        parts: for each of their tensors, its rows in mygpt's parameters.
        shapes: the shapes of mygpt's parameters.

    Raises:
        InputError: naming a tensor that is missing, unknown, or of another shape or number type.
        OutOfMemoryError: if they need more memory than is free.
    """
    for problem in _mismatches(folder, tensors, parts, shapes):
        raise InputError(problem)
    # `read_parameters` needs a second buffer for one transposed tensor at a time.
    transposed = [math.prod(part.shape(shapes)) for part in parts.values() if part.transposed]
    needed = 4 * (sum(map(math.prod, shapes.values())) + max(transposed, default=0))
    free = free_memory_bytes()
    if free is not None and needed > free:
        raise OutOfMemoryError(
            f"{folder} needs {needed:,} bytes in float32, and only {free:,} bytes of memory are "
            "free: close other programs, or use a machine with more memory"
        )


def read_parameters(
    tensors: Mapping[str, StoredTensor], parts: Mapping[str, Part], shapes: Shapes
) -> dict[str, NDArray[np.float32]]:
    """mygpt's parameters, float32, read from tensors that `check_tensors` accepted."""
    arrays = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
    for name, part in parts.items():
        view = part.view(arrays)
        if view.flags.c_contiguous:
            tensors[name].fill(view)
        else:
            buffer = np.empty(view.shape, np.float32)
            tensors[name].fill(buffer)
            view[...] = buffer
    return arrays


def _mismatches(
    folder: Path, tensors: Mapping[str, StoredTensor], parts: Mapping[str, Part], shapes: Shapes
) -> Iterator[str]:
    for name, tensor in tensors.items():
        if name not in parts:
            yield (
                f"{tensor.path}: tensor {tensor.name!r:.80} is not part of the model that "
                f"config.json describes{_MERGE if 'lora_' in name else ''}"
            )
    for name, part in parts.items():
        if name not in tensors:
            there = name_in_file(name, {ours: tensor.name for ours, tensor in tensors.items()})
            yield (
                f"{folder} has no tensor {there!r:.80}, which the model that its config.json "
                "describes needs"
            )
            continue
        tensor, wanted = tensors[name], part.shape(shapes)
        if tensor.shape != wanted:
            yield (
                f"{tensor.path}: tensor {tensor.name!r} has shape {tensor.shape!s:.80}, and "
                f"config.json describes {wanted}"
            )
        if tensor.dtype not in READABLE:
            yield (
                f"{tensor.path}: tensor {tensor.name!r} has the number type "
                f"{tensor.dtype!r:.20}: only {', '.join(READABLE)} can be read"
            )


_MERGE = ": it is from an adapter; merge it first (model.merge_and_unload().save_pretrained(...))"


def write_safetensors(path: Path, arrays: Arrays, parts: Mapping[str, Part]) -> None:
    """Write mygpt's parameters as another program's tensors to one safetensors file, float32.

    Args:
        path: the file.
        arrays: mygpt's parameters by name.
        parts: for each of their tensors, its rows in mygpt's parameters.

    Raises:
        InputError: if the header is longer than the safetensors library reads.
        StorageError: if there is no space, or the folder cannot be written to.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    pieces: list[memoryview] = []
    reached = 0
    for name in sorted(parts):
        array = np.ascontiguousarray(parts[name].view(arrays), dtype="<f4")
        begin, reached = reached, reached + array.nbytes
        header[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [begin, reached],
        }
        pieces.append(array.reshape(-1).view(np.uint8).data)
    text = to_json(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MOST_HEADER_BYTES:
        raise InputError(
            f"{len(parts):,} tensors need a header of {len(text):,} bytes, and the safetensors "
            f"library reads at most {_MOST_HEADER_BYTES:,}: export a model with fewer layers"
        )
    write_durably(path, [len(text).to_bytes(8, "little") + text, *pieces])
