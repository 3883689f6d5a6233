"""The loss and gradients of one batch; on a CPU its rows are shared between threads.

Torch's own threads split every operation and wait for each other after each: hundreds of times
a step. Here each thread takes its share of the rows through the whole model on one core, and
they meet once a step. Small models gain most, and so does a machine that is busy with other
work. A batch's loss is the mean over its rows, so the shares' gradients add up to the whole's.
Letters: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial, reduce
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.config import GPTConfig
from mygpt.evaluation import TokenLosses
from mygpt.model import GPT
from mygpt.training.config import Engine, TrainConfig
from mygpt.training.optimizer import TABLE

if TYPE_CHECKING:
    from mygpt.training.compiled.step import CompiledStep


def suitable_engine(shape: GPTConfig, device: torch.device) -> Engine:
    """The compiled kernels where they can, else torch."""
    from mygpt.engines.choice import compiled_engine_available
    from mygpt.training.compiled.step import suits

    if not compiled_engine_available():
        return "torch"
    return "compiled" if device.type == "cpu" and suits(shape) else "torch"


def make_gradients(model: GPT, config: TrainConfig) -> Gradients | CompiledGradients:
    """What `config.engine` names, with as many threads as suit it."""
    if config.engine == "compiled":
        return CompiledGradients(model, config)
    threads = Gradients.suitable_threads(model, config.piece)
    return Gradients(model, threads, config.micro_batch)


def clippable(model: GPT) -> list[torch.nn.Parameter]:
    """All parameters but the n-gram tables, whose rows' steps do not grow with their gradients."""
    named = model.named_parameters()
    return [parameter for name, parameter in named if not name.startswith(TABLE)]


class Gradients:
    """Computes a batch's loss and leaves its gradients in `parameter.grad`.

    Args:
        model: what is trained.
        threads: how many share a batch; 1 is one plain backward pass.
        micro_batch: rows that go through the model at once; 0 is all of a batch. The gradients
            of all pieces are added up: a batch too large for the memory takes more time instead.

    Enter it as a context: with several threads, torch's own are set to one each inside.
    """

    def __init__(self, model: GPT, threads: int, micro_batch: int = 0) -> None:
        self.model = model
        self.micro_batch = micro_batch
        self.parameters = list(model.parameters())
        self.threads = threads
        self._before = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None

    @staticmethod
    def suitable_threads(model: GPT, batch_size: int) -> int:
        """As many as torch would use, on a CPU without dropout; else 1.

        Dropout's numbers come from one generator, whose order threads would not keep.
        """
        on_cpu = next(model.parameters()).device.type == "cpu"
        if not on_cpu or model.config.dropout:
            return 1
        return min(torch.get_num_threads(), batch_size)

    def __enter__(self) -> Gradients:
        if self.threads > 1:
            self._before = torch.get_num_threads()
            torch.set_num_threads(1)
            self._pool = ThreadPoolExecutor(
                self.threads - 1, initializer=torch.set_num_threads, initargs=(1,)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._pool is not None:
            # Whoever leaves in the middle of a step does not wait for it.
            self._pool.shutdown(wait=kind is None)
            self._pool = None
            torch.set_num_threads(self._before)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, torch has all its threads back: for work that is not a training step."""
        if self._pool is None:
            yield
            return
        torch.set_num_threads(self._before)
        try:
            yield
        finally:
            torch.set_num_threads(1)

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss in nats per token (a scalar); `inputs` and `targets` are (B, T) int64."""
        rows = self.micro_batch or len(inputs)
        pieces = zip(torch.split(inputs, rows), torch.split(targets, rows), strict=True)
        losses = [self._add(*piece, len(inputs)) for piece in pieces]
        return reduce(torch.add, losses)

    token_losses = None  # validation goes through the model's own forward pass

    def _add(self, inputs: torch.Tensor, targets: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Add to all gradients what these rows of the batch give; what they add to its loss."""
        if self._pool is None:
            _, loss = self.model(inputs, targets)
            loss = len(inputs) / batch_size * loss
            loss.backward()
            return loss.detach()
        threads = min(self.threads, len(inputs))
        shares = list(zip(inputs.tensor_split(threads), targets.tensor_split(threads), strict=True))
        weights = [len(rows) / batch_size for rows, _ in shares]
        others = [
            self._pool.submit(self._share, *share, weight)
            for share, weight in zip(shares[1:], weights[1:], strict=True)
        ]
        loss, total = self._share(*shares[0], weights[0])
        for other in others:  # always in the same order: the sum is the same to the bit
            share_loss, gradients = other.result()
            loss = loss + share_loss
            torch._foreach_add_(total, gradients)
        for parameter, gradient in zip(self.parameters, total, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return loss

    def norm(self) -> torch.Tensor:
        """The norm of all gradients but the n-gram tables', a scalar."""
        gradients = [p.grad for p in clippable(self.model) if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _share(
        self, inputs: torch.Tensor, targets: torch.Tensor, weight: float
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """What these rows add to the batch's loss and gradients."""
        _, loss = self.model(inputs, targets)
        loss = weight * loss
        return loss.detach(), torch.autograd.grad(loss, self.parameters)


class CompiledGradients:
    """The same from the compiled kernels, where `suits` says that they can.

    Args:
        model: what is trained, on the CPU.
        config: how.

    Enter it as a context: torch's own operations, small ones, have one thread inside.
    """

    def __init__(self, model: GPT, config: TrainConfig) -> None:
        from mygpt.training.compiled.step import CompiledStep

        self._before = torch.get_num_threads()
        threads = min(self._before, config.batch_size)
        self.step = CompiledStep(model, threads, config.table_dropout)
        self._entered = False

    def __enter__(self) -> CompiledGradients:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)
        self._entered = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, torch has all its threads back."""
        torch.set_num_threads(self._before)
        try:
            yield
        finally:
            torch.set_num_threads(1 if self._entered else self._before)

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss in nats per token (a scalar); `inputs` and `targets` are (B, T) int64."""
        return self.step.gradients(inputs, targets)

    def norm(self) -> torch.Tensor:
        """The norm of all gradients but the n-gram tables', a scalar."""
        return self.step.gradient_norm()

    def token_losses(
        self, inputs: NDArray[np.integer], targets: NDArray[np.integer]
    ) -> NDArray[np.float32]:
        """The loss of each target, (B, T), from (B, T) ids; without dropout."""
        return _token_losses(self.step, inputs, targets)


def compiled_token_losses(model: GPT) -> TokenLosses | None:
    """A faster way to each target's loss than the model's own; None where there is none."""
    if suitable_engine(model.config, next(model.parameters()).device) != "compiled":
        return None
    from mygpt.training.compiled.step import CompiledStep

    return partial(_token_losses, CompiledStep(model, torch.get_num_threads()))


def _token_losses(
    step: CompiledStep, inputs: NDArray[np.integer], targets: NDArray[np.integer]
) -> NDArray[np.float32]:
    ids, wanted = (torch.from_numpy(a.astype(np.int64)) for a in (inputs, targets))
    losses: NDArray[np.float32] = step.losses(ids, wanted)
    return losses.reshape(inputs.shape)
