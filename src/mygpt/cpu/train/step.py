"""The training kernels applied to a model: its description for them, buffers, and runs by threads.

Letters: B batch, T time, C embedding, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.cpu.common.build import TRAINING, load_library
from mygpt.cpu.common.layout import Arena, padded, shape_of
from mygpt.cpu.common.processor import tile_shapes, tiles_permitted
from mygpt.cpu.common.workers import run_on_threads
from mygpt.cpu.train import layout as at
from mygpt.cpu.train import muon
from mygpt.engine import only_in_torch
from mygpt.errors import InputError


def suits(config: GPTConfig) -> bool:
    """Whether the kernels implement a block, and its widths are multiples of LANES."""
    widths = (config.embed_dim, config.head_size, config.mlp_hidden)
    return only_in_torch(config) is None and all(width % at.LANES == 0 for width in widths)


class CpuTrainingStep:
    """Computes a batch's loss by machine code, and leaves its gradients in `parameter.grad`.

    Args:
        model: float32, on the CPU, of a shape that `suits`.
        threads: the number of threads that divide a batch.
        products: how the products of gradients are computed, see `layout`; losses without
            gradients are always computed in float32.
    """

    def __init__(self, model: GPT, threads: int, products: int = at.FLOAT32) -> None:
        self.model = model
        self.threads = threads
        self.products = products
        if products == at.TILES and not tiles_permitted():
            raise RuntimeError("this process may not use AMX's tile registers")
        self._muon_of: dict[str, int] = {}
        self._kernels = load_library(TRAINING)
        self._job = np.zeros(at.JOB_SIZE, np.int64)
        self._reals = np.zeros(at.REALS_SIZE, np.float32)
        self._alive: list[Any] = []
        self._shape = (0, 0)
        self._parameters = dict(model.named_parameters())
        self._allocate_gradients()
        self._describe_model()

    def _allocate_gradients(self) -> None:
        """A row of floats for each thread; the first thread's become the parameters' gradients."""
        #     thread 0   | parameter 0 | parameter 1 | ... |   <- parameter.grad are views of it
        #     thread 1   | parameter 0 | parameter 1 | ... |   <- added to it after each step
        # Each parameter's part is rounded up to whole vectors.
        self._offsets, size = {}, 0
        for name, parameter in self._parameters.items():
            self._offsets[name] = size
            size += padded(parameter.numel())
        self._gradients = torch.zeros(self.threads, size)
        self._views = {
            name: self._gradients[0, start : start + p.numel()].view(p.shape)
            for (name, p), start in zip(
                self._parameters.items(), self._offsets.values(), strict=True
            )
        }
        self._job[at.GRADIENTS] = self._gradients.data_ptr()
        self._job[at.GRADIENTS_SIZE] = size

    def _keep(self, array: NDArray[Any]) -> int:
        self._alive.append(array)
        return int(array.ctypes.data)

    def _address(self, name: str) -> int:
        return self._parameters[name].data_ptr() if name in self._parameters else 0

    def _norm(self, name: str) -> list[int]:
        offsets = self._offsets
        if f"{name}.weight" not in offsets:
            return [0] * at.NORM_SIZE
        return [
            self._address(f"{name}.weight"),
            self._address(f"{name}.bias"),
            offsets[f"{name}.weight"],
            offsets.get(f"{name}.bias", 0),
        ]

    def _matrix(self, name: str) -> list[int]:
        weight = self._parameters[f"{name}.weight"]
        outputs, inputs = weight.shape
        # Forward panels have whole vectors of outputs: those past the last one stay zero. Backward
        # panels need no filling: `suits` requires inputs to be a multiple of LANES.
        sizes = [padded(outputs) * inputs, outputs * inputs, 0, 0]
        if self.products != at.FLOAT32:  # float32 is then for losses alone: without backward panels
            sizes[1:] = 0, at.pairs_of(inputs) * padded(outputs), at.pairs_of(outputs) * inputs
        panels = Arena(4 * sum(sizes) + 64 * len(sizes))
        return [
            weight.data_ptr(),
            self._address(f"{name}.bias"),
            *(self._keep(panels.take(size)) if size else 0 for size in sizes),
            outputs,
            inputs,
            self._offsets[f"{name}.weight"],
            self._offsets.get(f"{name}.bias", 0),
        ]

    def _describe_model(self) -> None:
        """Fill the job's tables of layers and matrices, and its description of the shape."""
        config, job = self.model.config, self._job
        layers = []
        for n in range(config.num_layers):
            block = f"blocks.{n}"
            row = self._norm(f"{block}.attention_norm") + self._norm(f"{block}.mlp_norm")
            row += self._norm(f"{block}.attention.query_norm")
            row += self._norm(f"{block}.attention.key_norm")
            for name in (
                "attention.query_key_value",
                "attention.output",
                "mlp.input",
                "mlp.output",
            ):
                row += self._matrix(f"{block}.{name}")
            layers.append(row)
        table = np.array(layers, np.int64)
        head = np.array(self._matrix("token_embedding" if config.tied else "head"), np.int64)
        job[at.LAYER_TABLE], job[at.HEAD_MATRIX] = self._keep(table), self._keep(head)
        job[at.FINAL_NORM] = self._keep(np.array(self._norm("final_norm"), np.int64))
        first = table.ctypes.data + 8 * at.W_ATTENTION
        places = [
            first + 8 * (n * at.LAYER_SIZE + m * at.MATRIX_SIZE)
            for n in range(config.num_layers)
            for m in range(4)
        ]
        places.append(int(job[at.HEAD_MATRIX]))
        job[at.MATRICES] = self._keep(np.array(places, np.int64))
        job[at.MATRIX_COUNT] = len(places)
        job[at.EMBEDDING] = self._address("token_embedding.weight")
        job[at.EMBEDDING_GRADIENT] = self._offsets["token_embedding.weight"]
        job[at.POSITIONS] = self._address("position_embedding.weight")
        job[at.POSITIONS_GRADIENT] = self._offsets.get("position_embedding.weight", 0)
        if config.position == "rotary":
            self._place_rotary()
        for name, size in shape_of(config).items():
            job[getattr(at, name)] = size
        for place, value in (
            (at.THREADS, self.threads),
            (at.HIDDEN, config.mlp_hidden),
            (at.REALS, self._keep(self._reals)),
            (at.TILE_SHAPES, self._keep(tile_shapes())),
        ):
            job[place] = value
        self._reals[at.EPS] = config.eps

    def _allocate_workspace(self, batch: int, time: int) -> None:
        """Allocate buffers for batches of B windows of T."""
        config, products = self.model.config, self.products
        job, workspace = self._job, at.workspace_for(config, batch, time, self.threads, products)
        count = workspace.floats * self.threads
        self._workspace = Arena(4 * count + 64).take(count)
        self._starts = workspace.starts
        self._losses = np.zeros(batch * time, np.float32)
        job[at.WORKSPACE], job[at.WORKSPACE_SIZE] = self._workspace.ctypes.data, workspace.floats
        job[at.WORKSPACE_TABLE] = self._starts.ctypes.data
        job[at.LAYER_WORKSPACE], job[at.CHUNK] = workspace.layer, workspace.chunk
        job[at.LOSSES] = self._losses.ctypes.data
        self._shape = (batch, time)

    def _place_rotary(self) -> None:
        self._rotary = self.model.rotary_cos, self.model.rotary_sin  # the model's may be replaced
        self._job[at.COSINES], self._job[at.SINES] = (table.data_ptr() for table in self._rotary)

    def _set_batch(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Put a batch's addresses into the job; allocate buffers where its shape is a new one."""
        if self._shape != tuple(inputs.shape):
            time, most = inputs.shape[1], self.model.max_seq_len
            if time > most:  # the kernels would read past the last position
                raise InputError(f"input length T={time} exceeds max_seq_len={most}")
            if self.model.config.position == "rotary":
                self.model.reserve_positions(time)
                self._place_rotary()
            self._allocate_workspace(*inputs.shape)
        self._batch = inputs.contiguous(), targets.contiguous()
        job = self._job
        job[at.IDS], job[at.TARGETS] = (ids.data_ptr() for ids in self._batch)
        job[at.SOFT_TARGETS] = 0
        job[at.BATCH], job[at.TIME] = self._shape

    def _run(self, kernel: str) -> None:
        run_on_threads(self._kernels[kernel], int(self._job.ctypes.data), self.threads)

    def gradients(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        soft_targets: torch.Tensor | None = None,
        smoothing: float = 0.0,
    ) -> torch.Tensor:
        """The mean loss in nats per token; `inputs` and `targets` are (B, T) int64.

        Dropout derives its random numbers from a seed that torch's global generator draws.
        With `soft_targets` (B T, V) float32 the gradients, not the returned loss, are those for
        targets which are these distributions to the fraction `smoothing`.
        """
        self._set_batch(inputs, targets)
        job, reals = self._job, self._reals
        if soft_targets is not None:
            job[at.SOFT_TARGETS], reals[at.SMOOTHING] = soft_targets.data_ptr(), smoothing
        dropout = self.model.config.dropout if self.model.training else 0.0
        job[at.SEED] = int(torch.randint(2**31, ())) if dropout else 0
        job[at.LOSSES_ONLY], job[at.PRODUCTS] = 0, self.products
        reals[at.DROPOUT], reals[at.GRADIENT_SCALE] = dropout, 1 / inputs.numel()
        self._run("pack_weights")
        self._run("losses_and_gradients")
        if self.threads > 1:
            self._run("sum_gradients")
        for name, view in self._views.items():
            self._parameters[name].grad = view
        return torch.tensor(self._losses.mean(dtype=np.float64), dtype=torch.float32)

    def scaled_gradients(self, fraction: float) -> torch.Tensor:
        """All gradients in one row, multiplied by this process's fraction of the batch."""
        return self._gradients[0].mul_(fraction)

    def losses(self, inputs: torch.Tensor, targets: torch.Tensor) -> NDArray[np.float32]:
        """The loss of each token, (B T,), without dropout; gradients are not changed."""
        self._set_batch(inputs, targets)
        self._job[at.LOSSES_ONLY], self._reals[at.DROPOUT] = 1, 0.0
        self._job[at.PRODUCTS] = at.FLOAT32
        self._run("pack_weights")
        self._run("losses_and_gradients")
        return self._losses

    def token_losses(
        self, inputs: NDArray[np.integer], targets: NDArray[np.integer]
    ) -> NDArray[np.float32]:
        """The loss of each target, (B, T), from (B, T) ids; without dropout."""
        ids, wanted = (torch.from_numpy(a.astype(np.int64)) for a in (inputs, targets))
        return self.losses(ids, wanted).reshape(inputs.shape)

    def gradient_norm(self) -> torch.Tensor:
        """The norm of all gradients, a scalar."""
        return self._gradients[0].norm()

    def update_matrices(
        self, momenta: dict[str, torch.Tensor], *, rate: float, decay: float
    ) -> None:
        """Muon's step on the named parameters, with their momenta; see `mygpt.cpu.train.muon`."""
        places = {name: momentum.data_ptr() for name, momentum in momenta.items()}
        if self._muon_of != places:
            self._describe_muon(momenta)
            self._muon_of = places
        reals = self._reals
        reals[at.MUON_RATE], reals[at.MUON_DECAY], reals[at.MOMENTUM] = rate, decay, muon.MOMENTUM
        self._run("update_matrices")

    def _describe_muon(self, momenta: dict[str, torch.Tensor]) -> None:
        """Fill the job's table of Muon's matrices, and allocate buffers for the largest."""
        entries = []
        for name, momentum in momenta.items():
            parameter, gradient = self._parameters[name], self._views[name]
            start, columns = 0, parameter.shape[1]
            for rows in muon.parts(name, self.model.config) or []:
                skipped = 4 * start * columns
                addresses = [t.data_ptr() + skipped for t in (parameter, momentum, gradient)]
                entries.append([*addresses, rows, columns])
                start += rows
        # Thread n takes entries n, n + threads, ...: sorted by size, their parts are of similar
        # work.
        entries.sort(key=lambda entry: -entry[3] * entry[4])
        self._muon_table = np.array(entries, np.int64)
        largest = max(rows * columns for *_, rows, columns in entries)
        square = max(min(rows, columns) for *_, rows, columns in entries) ** 2
        size = -(-(2 * largest + 2 * square) // at.LANES) * at.LANES
        self._muon_workspace = Arena(4 * size * self.threads + 64).take(size * self.threads)
        job = self._job
        job[at.MUON_TABLE], job[at.MUON_COUNT] = self._muon_table.ctypes.data, len(entries)
        job[at.MUON_WORKSPACE], job[at.MUON_WORKSPACE_SIZE] = self._muon_workspace.ctypes.data, size
        job[at.MUON_ITERATIONS] = muon.ITERATIONS
