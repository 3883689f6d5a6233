"""Training, in one loop: batch, learning rate, loss and gradients, clipping, update.

`train_steps` is the loop of every training run: `mygpt train` passes faster gradients and another
optimizer to it, and logs, validates and saves between its steps.
Letters: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Gradients(Protocol):
    """Computes gradients: what a training backend implements."""

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch, in nats per token (a scalar).

        Leaves the gradient of each parameter in `parameter.grad`, replacing that of the last batch.

        Args:
            inputs: (B, T) int64 token ids.
            targets: (B, T) int64, the ids one position later.
        """
        ...

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients down together to a norm of at most `max_norm`; 0 leaves them.

        Returns their norm before that (a scalar).
        """
        ...


class Optimizer(Protocol):
    """Changes the weights."""

    def step(self, lr: float) -> None:
        """Update every parameter from its gradient, at the learning rate `lr`."""
        ...


class Step(NamedTuple):
    """One step of training."""

    number: int  # from 1
    loss: Tensor  # of the batch before the update, nats per token (a scalar)
    lr: float
    norm: Tensor  # of all gradients together, before clipping (a scalar)


def train_steps(
    batches: Iterable[tuple[Tensor, Tensor]],
    gradients: Gradients,
    optimizer: Optimizer,
    learning_rate: Callable[[int], float],
    max_norm: float = 0.0,
) -> Iterator[Step]:
    """Train on one batch after the other; yields after every update.

    Nothing waits for the device here: losses and norms are tensors.

    Args:
        batches: inputs and targets of each step, both (B, T) int64; training ends with them.
        gradients: computes a batch's loss and gradients.
        optimizer: updates the weights from the gradients.
        learning_rate: the rate of a step, by the number of steps before it.
        max_norm: the largest norm of all gradients together; 0 is no limit.
    """
    for number, (inputs, targets) in enumerate(batches, start=1):
        lr = learning_rate(number - 1)
        loss = gradients(inputs, targets)
        norm = gradients.clip(max_norm)
        optimizer.step(lr)  # here the weights change
        yield Step(number, loss, lr, norm)


class TorchGradients:
    """`Gradients` by torch's automatic differentiation: forward pass, backward pass.

    Args:
        model: called with inputs and targets, it returns logits and the mean loss.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """As `Gradients.__call__`."""
        self.model.zero_grad()
        _, loss = self.model(inputs, targets)
        loss.backward()
        return loss.detach()

    def clip(self, max_norm: float) -> Tensor:
        """As `Gradients.clip`."""
        return clip_gradients(list(self.model.parameters()), max_norm)


def clip_gradients(
    parameters: list[nn.Parameter], max_norm: float, norm: Tensor | None = None
) -> Tensor:
    """Multiply all gradients by min(1, max_norm / norm), in place; 0 leaves them as they are.

    Pascanu, Mikolov & Bengio, 2013 (arXiv:1211.5063).

    Returns the norm of all of them together before that (a scalar); pass it where it is known.
    """
    if norm is None:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


class AdamW:
    """torch's AdamW (Loshchilov & Hutter, 2019) for all parameters of a model."""

    def __init__(
        self,
        model: nn.Module,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        fused: bool = False,
    ) -> None:
        self._optimizer = torch.optim.AdamW(
            model.parameters(), betas=betas, weight_decay=weight_decay, fused=fused
        )

    def step(self, lr: float) -> None:
        """As `Optimizer.step`."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
