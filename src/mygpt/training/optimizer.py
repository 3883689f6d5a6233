"""The optimizers: AdamW, or Muon for the matrices of the blocks with AdamW for the rest.

AdamW is torch's fused kernel called directly: `torch.optim` would import torch's compiler,
which takes seconds. The memory of each parameter is kept as named arrays. Of a sharded parameter
each process updates the rows that it holds.
Letters: C embedding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray

from mygpt.core.model import GPT
from mygpt.cpu.train import muon
from mygpt.training.config import TrainConfig
from mygpt.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from mygpt.training.distributed.sharding import (
    first_row,
    gathered,
    is_sharded,
    like,
    local,
    put_rows,
)

if TYPE_CHECKING:
    from mygpt.cpu.train.step import CpuTrainingStep

# With Muon: the learning rates of AdamW's parameters, as multiples of Muon's (docs/lab-notes.md).
_EMBEDDING_RATE, _HEAD_RATE, _NORM_RATE = 1.0, 0.5, 0.5
_MUON_BETA1, _MUON_BETA2, _MUON_EPS = 0.9, 0.95, 1e-10
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
        self.model = model
        self.group = group
        self.config = config
        self._compiled = compiled
        self._parameters = dict(model.named_parameters())
        # The optimizer state, by (kind, parameter); created at the first step.
        self._memory: dict[tuple[str, str], torch.Tensor] = {}
        self._groups: dict[tuple[float, float], list[str]] = {}
        self._matrices: list[str] = []
        for name, parameter in self._parameters.items():
            if config.optimizer == "muon" and muon.parts(name, model.config) is not None:
                self._matrices.append(name)
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
        if self._matrices:
            self._muon(lr, found_inf)

    def _adamw(
        self, names: list[str], rate: float, decay: float, found_inf: torch.Tensor | None
    ) -> None:
        plain = self.config.optimizer == "adamw"
        moments = ("exp_avg", "exp_avg_sq")
        kept = {what: [local(self._kept(what, n)) for n in names] for what in moments}
        steps = [self._kept("step", name) for name in names]
        torch._foreach_add_(steps, 1.0)
        parameters = [local(self._parameters[name]) for name in names]
        arguments: dict[str, Any] = {
            "lr": rate,
            "beta1": self.config.beta1 if plain else _MUON_BETA1,
            "beta2": self.config.beta2 if plain else _MUON_BETA2,
            "weight_decay": decay,
            "eps": _EPS if plain else _MUON_EPS,
        }
        gradients = [local(g) for n in names if (g := self._parameters[n].grad) is not None]
        if parameters[0].device.type == "mps":
            memory = kept["exp_avg"], kept["exp_avg_sq"], steps
            _adamw_by_hand(parameters, gradients, *memory, arguments)
            return
        torch._fused_adamw_(
            parameters, gradients, kept["exp_avg"], kept["exp_avg_sq"], [], steps,
            amsgrad=False, maximize=False, grad_scale=None, found_inf=found_inf, **arguments,
        )  # fmt: skip
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))

    def _muon(self, lr: float, found_inf: torch.Tensor | None) -> None:
        decay = self.config.weight_decay
        if self._compiled is not None:
            momenta = {name: self._kept("momentum", name) for name in self._matrices}
            self._compiled.update_matrices(momenta, rate=lr, decay=decay)
            return
        for name in self._matrices:
            parameter, momentum = self._parameters[name], self._kept("momentum", name)
            assert parameter.grad is not None
            gradient = parameter.grad
            if is_sharded(parameter):
                self._sharded_muon(name, lr, found_inf)
                continue
            rows = muon.parts(name, self.model.config) or []
            shared = (torch.split(t, rows) for t in (parameter, gradient, momentum))
            for weight, own, memory in zip(*shared, strict=True):
                muon.update(weight, own, memory, rate=lr, decay=decay, found_inf=found_inf)

    def _sharded_muon(self, name: str, lr: float, found_inf: torch.Tensor | None) -> None:
        """Every process computes the update of the gathered matrix, and keeps its rows."""
        parameter, momentum = self._parameters[name], self._kept("momentum", name)
        gradient = parameter.grad
        assert gradient is not None
        matrices = [
            gathered(parameter.detach()).clone(),
            gathered(gradient),
            gathered(momentum).clone(),
        ]
        rows = muon.parts(name, self.model.config) or []
        for weight, own, memory in zip(*(torch.split(m, rows) for m in matrices), strict=True):
            muon.update(
                weight, own, memory, rate=lr, decay=self.config.weight_decay, found_inf=found_inf
            )
        start = first_row(parameter, self.group)
        for sharded, matrix in ((parameter, matrices[0]), (momentum, matrices[2])):
            here = local(sharded)
            here.copy_(matrix[start : start + len(here)])

    def _kept(self, what: str, name: str) -> torch.Tensor:
        """A parameter's optimizer state of one kind: zeros at first."""
        if (what, name) not in self._memory:
            parameter = self._parameters[name]
            shape = memory_shape(what, tuple(parameter.shape))
            self._memory[what, name] = like(parameter, shape)
        return self._memory[what, name]

    def tensors(self, keys: Iterable[str] = ()) -> dict[str, torch.Tensor]:
        """The optimizer state, as `<kind>/<parameter>`; `keys` that are new are zeros."""
        for key in keys:
            what, _, name = key.partition("/")
            self._kept(what, name)
        return {f"{what}/{name}": value for (what, name), value in self._memory.items()}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The optimizer state as arrays, as `<kind>/<parameter>`."""
        return {
            f"{what}/{name}": value.detach().cpu().numpy()
            for (what, name), value in self._memory.items()
        }

    def load(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Replace the optimizer state by what `arrays` gave."""
        self._memory.clear()
        for key, array in arrays.items():
            what, name = key.split("/", 1)
            put_rows(self._kept(what, name), array, self.group)


def memory_shape(what: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one kind of optimizer state, for a parameter of this shape."""
    return () if what == "step" else shape


def _adamw_by_hand(
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    means: list[torch.Tensor],
    squares: list[torch.Tensor],
    steps: list[torch.Tensor],
    options: dict[str, float],
) -> None:
    """AdamW (Loshchilov & Hutter, 2019) for devices without torch's fused kernel."""
    beta1, beta2 = options["beta1"], options["beta2"]
    for p, g, m, v, step in zip(parameters, gradients, means, squares, steps, strict=True):
        count = float(step)
        p.mul_(1 - options["lr"] * options["weight_decay"])
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        size = (v / (1 - beta2**count)).sqrt_().add_(options["eps"])
        p.addcdiv_(m, size, value=-options["lr"] / (1 - beta1**count))
