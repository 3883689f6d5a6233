"""The `cpu` engine: the whole decoding loop as machine code, compiled by Numba.

README.md in this folder describes the memory layout, the threads and the cache of machine code.
`layout` names all fields, `pack` fills those of a model. Numba compiles `simd`, `arithmetic`,
`matmul`, `attention`, `forward`, `sample`, `digest`, `panels` and `loop`; `build` stores the
machine code. `decoding` runs it on the arrays of `memory` with the threads of `workers`; `batch`
lets requests join and leave between tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.core.config import GPTConfig
from mygpt.cpu.common.build import load_kernels
from mygpt.cpu.decode.batch import CpuBatch, slot_bytes
from mygpt.cpu.decode.decoding import CpuDecoding
from mygpt.cpu.decode.pack import PackedModel
from mygpt.engine import Request
from mygpt.errors import require_choice


class CpuEngine:
    """Decodes on the CPU.

    Args:
        config: the model's shape.
        arrays: its parameters by name, as `GPT.state_dict` has them.
        weights: "float32", or "int8" for a quarter of the memory and its traffic.
        threads: how many to use; None chooses by the amount of work.
    """

    name = "cpu"

    def __init__(
        self,
        config: GPTConfig,
        arrays: Mapping[str, NDArray[Any]],
        *,
        weights: str = "float32",
        threads: int | None = None,
    ) -> None:
        require_choice("weights", weights, ("float32", "int8"))
        self.model = PackedModel(config, arrays, quantized=weights == "int8")
        self.threads = threads

    def start(self, requests: Sequence[Request]) -> CpuDecoding:
        """Begin to decode; see `mygpt.engine.Engine`."""
        return CpuDecoding(self.model, requests, self.threads)

    def open(self, size: int) -> CpuBatch:
        """A batch that requests join and leave; see `mygpt.engine.Engine`."""
        return CpuBatch(self.model, size, self.threads)

    @property
    def slot_bytes(self) -> int:
        """The most bytes of memory that a slot of a batch takes."""
        return slot_bytes(self.model.config)


def digest_of(places: Sequence[tuple[int, int]]) -> int:
    """A hash of arrays of 32-bit numbers, given as (address, count): equal means unchanged."""
    table = np.array(places, np.int64).reshape(-1, 2)
    return load_kernels().digest(table.ctypes.data, len(table))


__all__ = ["CpuBatch", "CpuDecoding", "CpuEngine", "digest_of"]
