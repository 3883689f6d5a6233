"""The optimizers: AdamW, or Muon for the matrices of the blocks with AdamW for the rest.

AdamW is torch's function: `torch.optim.AdamW` would import torch's compiler, which takes seconds.
The memory of each parameter is kept as named arrays. Of a sharded parameter each process updates
the rows that it holds.
Letters: C embedding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch.optim.adamw import adamw

from mygpt.core.model import GPT
from mygpt.cpu.train import muon
from mygpt.training.config import TrainConfig
from mygpt.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from mygpt.training.distributed.sharding import (
    gathered,
    is_sharded,
    like,
    local,
    own_rows,
    put_rows,
)

if TYPE_CHECKING:
    from mygpt.cpu.train.step import CpuTrainingStep

# With Muon: the learning rates of AdamW's parameters, as multiples of Muon's (docs/lab-notes.md).
_EMBEDDING_RATE, _HEAD_RATE, _NORM_RATE = 1.0, 0.5, 0.5
_MUON_BETAS, _MUON_EPS = (0.9, 0.95), 1e-10
_EPS = 1e-8


class Optimizer:
    """Updates a model's parameters from their gradients.

    Args:
        model: whose.
        config: which optimizer, its decay and its betas.
        compiled: the kernels that do Muon's part; None is torch's operations.
        group: the processes that hold parts of the parameters, where these are sharded.
    """

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        compiled: CpuTrainingStep | None = None,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.model, self.config, self.group = model, config, group
        self._compiled = compiled
        self._parameters = dict(model.named_parameters())
        # The optimizer state, by (kind, parameter); created at the first step.
        self._memory: dict[tuple[str, str], torch.Tensor] = {}
        self._groups: dict[tuple[float, float], list[str]] = {}  # AdamW's, by rate and decay
        self._matrices: dict[str, list[int]] = {}  # Muon's, with the rows of each one's parts
        for name, parameter in self._parameters.items():
            rows = muon.parts(name, model.config) if config.optimizer == "muon" else None
            if rows is not None:
                self._matrices[name] = rows
            else:
                self._groups.setdefault(self._rate_and_decay(name, parameter), []).append(name)

    def _rate_and_decay(self, name: str, parameter: torch.Tensor) -> tuple[float, float]:
        config = self.config
        if config.optimizer == "adamw":
            decays = parameter.ndim >= 2 or config.decay_all
            return 1.0, config.weight_decay if decays else 0.0
        if "embedding" in name:
            return _EMBEDDING_RATE, 0.0
        return (_HEAD_RATE if name.startswith("head") else _NORM_RATE), 0.0

    @torch.no_grad()
    def step(self, lr: float, found_inf: torch.Tensor | None = None) -> None:
        """Update every parameter from its gradient.

        Args:
            lr: the learning rate.
            found_inf: 1 skips the update, 0 does not (a scalar): on a device that runs
                asynchronously, which is not waited for; None where that was decided before.
        """
        for (rate, decay), names in self._groups.items():
            self._adamw(names, rate * lr, decay, found_inf)
        if self._compiled is not None and self._matrices:
            momenta = {name: self._kept("momentum", name) for name in self._matrices}
            self._compiled.update_matrices(momenta, rate=lr, decay=self.config.weight_decay)
        else:
            for name in self._matrices:
                self._muon(name, lr, found_inf)

    def _adamw(
        self, names: list[str], rate: float, decay: float, found_inf: torch.Tensor | None
    ) -> None:
        config, plain = self.config, self.config.optimizer == "adamw"
        parameters = [self._parameters[name] for name in names]
        memory = {
            kind: [local(self._kept(kind, name)) for name in names]
            for kind in ("exp_avg", "exp_avg_sq", "step")
        }
        beta1, beta2 = (config.beta1, config.beta2) if plain else _MUON_BETAS
        adamw(
            [local(parameter) for parameter in parameters],
            [local(parameter.grad) for parameter in parameters if parameter.grad is not None],
            memory["exp_avg"],
            memory["exp_avg_sq"],
            max_exp_avg_sqs=[],
            state_steps=memory["step"],
            fused=parameters[0].device.type != "mps",
            found_inf=found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=rate,
            weight_decay=decay,
            eps=_EPS if plain else _MUON_EPS,
            maximize=False,
        )

    def _muon(self, name: str, lr: float, found_inf: torch.Tensor | None) -> None:
        """Update a matrix. Of a sharded one every process updates all rows, and keeps its own."""
        parameter, momentum = self._parameters[name], self._kept("momentum", name)
        assert parameter.grad is not None
        matrices = [gathered(tensor) for tensor in (parameter.detach(), parameter.grad, momentum)]
        parts = (torch.split(matrix, self._matrices[name]) for matrix in matrices)
        decay = self.config.weight_decay
        for weight, gradient, memory in zip(*parts, strict=True):
            muon.update(weight, gradient, memory, rate=lr, decay=decay, found_inf=found_inf)
        if is_sharded(parameter):
            for tensor, matrix in ((parameter, matrices[0]), (momentum, matrices[2])):
                local(tensor).copy_(own_rows(tensor, matrix, self.group))

    def _kept(self, what: str, name: str) -> torch.Tensor:
        """A parameter's optimizer state of one kind: zeros at first."""
        if (what, name) not in self._memory:
            parameter = self._parameters[name]
            self._memory[what, name] = like(parameter, memory_shape(what, tuple(parameter.shape)))
        return self._memory[what, name]

    def tensors(self, keys: Iterable[str] = ()) -> dict[str, torch.Tensor]:
        """The optimizer state, as `<kind>/<parameter>`; `keys` that are new are zeros."""
        for key in keys:
            what, _, name = key.partition("/")
            self._kept(what, name)
        return {f"{what}/{name}": value for (what, name), value in self._memory.items()}

    def load(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Replace the optimizer state by arrays with the names of `tensors`."""
        self._memory.clear()
        for key, tensor in self.tensors(arrays).items():
            put_rows(tensor, arrays[key], self.group)


def memory_shape(what: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one kind of optimizer state, for a parameter of this shape."""
    return () if what == "step" else shape
