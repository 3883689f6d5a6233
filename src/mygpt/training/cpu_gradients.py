"""The loss and gradients of one batch by machine code on a CPU (`mygpt.cpu.train`).

Threads divide the batch's rows. Of several processes each computes its own rows, and one all-reduce
gives all of them the gradients of the whole batch.
Letters: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.core.model import GPT
from mygpt.core.training import clip_gradients
from mygpt.cpu.train.step import CpuTrainingStep
from mygpt.training.config import TrainConfig
from mygpt.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from mygpt.training.gradients import shared_losses


class CpuGradients:
    """A batch's loss and gradients by machine code, for models of a shape that `suits` allows.

    Args:
        model: the model, on the CPU.
        config: the training configuration.
        group: the processes that divide a batch.

    It is a context manager: inside, torch's own (small) operations use one thread.
    """

    def __init__(
        self, model: GPT, config: TrainConfig, group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        self.group = group
        self._parameters = list(model.parameters())
        self._batch_size: int | None = None
        self.uses_torch_compile = False
        self.note = None
        flags = {
            "--compile": config.compile,
            "--checkpoint-activations": config.checkpoint_activations,
        }
        if asked := [flag for flag, wanted in flags.items() if wanted]:
            self.note = f"{' and '.join(asked)}: no effect on mygpt's kernels for CPUs"
        self._before = torch.get_num_threads()
        threads = min(self._before, group.rows_per_process(config.batch_size))
        self.step = CpuTrainingStep(model, threads)
        self._entered = False

    def __enter__(self) -> CpuGradients:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)
        self._entered = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which torch's operations use all threads again."""
        torch.set_num_threads(self._before)
        try:
            yield
        finally:
            torch.set_num_threads(1 if self._entered else self._before)

    def expect_rows(self, batch_size: int) -> None:
        """As `Gradients.expect_rows`."""
        self._batch_size = batch_size

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss in nats per token (a scalar); arguments as for `Gradients`."""
        loss = self.step.gradients(inputs, targets)
        if self.group.is_single:
            return loss
        # The batch's mean is the sum of the processes' means, each times its fraction of the rows.
        fraction = len(inputs) / (self._batch_size or len(inputs))
        self.group.all_reduce(self.step.scaled_gradients(fraction))
        return self.group.sum_loss(fraction * loss)

    def clip(self, max_norm: float) -> torch.Tensor:
        """As `Gradients.clip`."""
        return clip_gradients(self._parameters, max_norm, self.step.gradient_norm())

    def token_losses(
        self, inputs: NDArray[np.integer], targets: NDArray[np.integer]
    ) -> NDArray[np.float32]:
        """The loss of each target, (B, T), from (B, T) ids; without dropout."""
        return shared_losses(self.group, self.step.token_losses, inputs, targets)
