"""The loss and gradients of one batch, by torch or by machine code, in threads or processes.

With torch on a CPU, its threads divide every operation and synchronise after each, hundreds of
times a step. Here each thread takes its share of the rows through the whole model, and they
synchronise once a step: faster for small models, and on a busy machine. The loss of a batch is the
mean over its rows, so the shares' gradients add up to the batch's. The same holds between
processes: each computes its rows, and all get the gradient of the whole batch, through torch's DDP
or FSDP, or with machine code by one all-reduce.
Letters: B batch, T time.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.core.training import clip_gradients
from mygpt.evaluation.losses import TokenLosses, model_token_losses
from mygpt.training.config import Engine, TrainConfig
from mygpt.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from mygpt.training.distributed.sharding import is_sharded, local
from mygpt.training.hardware import (
    autocast,
    checkpoint_blocks,
    compile_with_torch,
    compute_dtype,
    cpu_products,
    products_in,
    why_no_torch_compile,
)

if TYPE_CHECKING:
    from mygpt.cpu.train.predictions import NgramPredictions
    from mygpt.cpu.train.step import CpuTrainingStep
    from mygpt.training.ngram_targets import NgramTargets


def suitable_engine(shape: GPTConfig, device: torch.device) -> Engine:
    """The machine-code kernels if they support the shape and the device, else torch."""
    from mygpt.cpu.train.step import suits
    from mygpt.decode.choice import cpu_engine_available

    if not cpu_engine_available():
        return "torch"
    return "compiled" if device.type == "cpu" and suits(shape) else "torch"


def make_gradients(
    model: GPT, config: TrainConfig, group: ProcessGroup = SINGLE_PROCESS
) -> ParallelGradients | CpuGradients:
    """The gradients backend of `config.engine`: the one place that selects it."""
    if config.engine == "compiled":
        return CpuGradients(model, config, group)
    threads = ParallelGradients.suitable_threads(model, config.piece) if group.is_single else 1
    return ParallelGradients(model, threads, config.micro_batch, config=config, group=group)


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Inside, torch uses so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Smoothing(NamedTuple):
    """What smooths the targets of a batch."""

    ngrams: NgramTargets  # predicts them
    positions: NDArray[np.int64]  # (B, T), where they are in the text
    share: float  # the fraction of a target that the prediction is, from 0 to 1


class _Backend:
    """What gradients by torch and by machine code have in common.

    It is a context manager: inside, torch may have fewer threads.

    Attributes:
        note: a line for people, where something that was asked for cannot be done.
        uses_torch_compile: whether `torch.compile` makes the forward pass.
        step: the machine code, which can also update matrices; None with torch.
    """

    def __init__(self, model: GPT, group: ProcessGroup) -> None:
        self.model, self.group = model, group
        self.parameters = list(model.parameters())
        self.note: str | None = None
        self.uses_torch_compile = False
        self.step: CpuTrainingStep | None = None
        self._batch_size: int | None = None
        self._smoothing: Smoothing | None = None
        self._threads_outside = torch.get_num_threads()
        self._inside = ExitStack()

    def __enter__(self) -> Self:
        self._threads_outside = torch.get_num_threads()
        return self

    def __exit__(self, *error: Any) -> None:
        self._inside.__exit__(*error)

    def paused(self) -> AbstractContextManager[None]:
        """Inside, torch has all its threads: for work that is not a training step."""
        return _torch_threads(self._threads_outside)

    def expect_rows(self, batch_size: int) -> None:
        """Set the number of rows that the next batches have in all processes together."""
        self._batch_size = batch_size

    def smooth(self, smoothing: Smoothing | None) -> None:
        """Smooth the targets of the next batch; its loss stays that of the targets themselves."""
        self._smoothing = smoothing


class ParallelGradients(_Backend):
    """`core.training.Gradients` by torch, in several threads or processes.

    Args:
        model: what is trained.
        threads: how many share a batch; 1 is one plain backward pass.
        micro_batch: rows that go through the model at once; 0 is all of a batch. The gradients
            of all pieces are added up: a batch too large for the memory takes more time instead.
        config: number format, `torch.compile`, blocks recomputed; None is plain float32.
        group: the processes that share a batch; of several, each has one thread here and
            torch's own.
    """

    def __init__(
        self,
        model: GPT,
        threads: int,
        micro_batch: int = 0,
        *,
        config: TrainConfig | None = None,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        super().__init__(model, group)
        self.micro_batch = micro_batch
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None
        device = self.parameters[0].device
        self._dtype_name = "float32" if config is None else config.dtype
        dtype = torch.float32 if config is None else compute_dtype(config.dtype, device)
        self._sharded = is_sharded(self.parameters[0])  # FSDP has its own number formats
        self._autocast = partial(autocast, device, torch.float32 if self._sharded else dtype)
        self._plain = group.is_single and dtype == torch.float32
        self._forward: Callable[..., Any] = model
        if config is not None and not self._sharded:
            self._prepare_forward(config)
        elif config is not None and config.compile:
            self.note = why_no_torch_compile(device)
        self.uses_torch_compile = config is not None and config.compile and self.note is None

    def _prepare_forward(self, config: TrainConfig) -> None:
        if config.checkpoint_activations:
            checkpoint_blocks(self.model)
        if config.compile:
            rows = self.group.rows_per_process(config.batch_size)
            with self._autocast():
                batch = min(rows, self.micro_batch or rows), config.seq_len
                self._forward, self.note = compile_with_torch(self.model, batch)
        if not self.group.is_single:
            self._forward = _data_parallel(self._forward)

    @staticmethod
    def suitable_threads(model: GPT, batch_size: int) -> int:
        """As many threads as torch would use, on a CPU without dropout; else 1.

        Dropout's numbers come from one generator, whose order threads would not keep.
        """
        on_cpu = next(model.parameters()).device.type == "cpu"
        if not on_cpu or model.config.dropout:
            return 1
        return min(torch.get_num_threads(), batch_size)

    def __enter__(self) -> Self:
        super().__enter__()
        self._inside.enter_context(products_in(self._dtype_name))
        if self.threads > 1:
            self._inside.enter_context(_torch_threads(1))
            self._pool = ThreadPoolExecutor(
                self.threads - 1, initializer=torch.set_num_threads, initargs=(1,)
            )
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool is not None:
            # After an exception in the middle of a step the other threads are not waited for.
            self._pool.shutdown(wait=error[0] is None)
            self._pool = None
        super().__exit__(*error)

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss in nats per token (a scalar).

        Args:
            inputs: this process's rows of the batch, (B, T) int64.
            targets: likewise.
        """
        for parameter in self.parameters:
            parameter.grad = None
        batch_size = self._batch_size or len(inputs)
        most = self.group.rows_per_process(batch_size)
        rows = self.micro_batch or most
        batch = self._batch(inputs, targets)
        pieces = list(zip(*(torch.split(each, rows) for each in batch), strict=True))
        sizes: list[float] = [batch_size] * len(pieces)
        if self._sharded:  # all processes must gather weights equally often: add empty pieces
            missing = -(-most // rows) - len(pieces)
            pieces += [tuple(each[:1] for each in pieces[0])] * missing
            sizes += [math.inf] * missing  # a piece divided by infinitely many rows adds nothing
        # DDP sums over the processes with a batch's last piece.
        no_sums = getattr(self._forward, "no_sync", nullcontext)
        losses = []
        for number, (piece, size) in enumerate(zip(pieces, sizes, strict=True), 1):
            with nullcontext() if number == len(pieces) else no_sums():
                losses.append(self._add(piece, size))
        return self.group.sum_loss(reduce(torch.add, losses))

    @property
    def token_losses(self) -> TokenLosses | None:
        """A function for each target's loss; None if the model's own forward pass is best."""
        if self._plain:
            return None
        return partial(shared_losses, self.group, self._losses)

    def _losses(
        self, inputs: NDArray[np.integer], targets: NDArray[np.integer]
    ) -> NDArray[np.floating]:
        with self._autocast():
            return model_token_losses(self.model, inputs, targets)

    def _batch(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Inputs and targets, and the distributions (B, T, V) that smooth these, if any do."""
        if self._smoothing is None:
            return inputs, targets
        ngrams, positions, _ = self._smoothing
        soft = torch.from_numpy(ngrams.probabilities(positions.reshape(-1)))
        return inputs, targets, soft.view(*targets.shape, -1).to(inputs.device)

    def _losses_of(
        self, forward: Callable[..., Any], rows: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean loss of some rows, and what is to be minimised: that of smoothed targets."""
        logits, loss = forward(*rows[:2])
        if self._smoothing is None:
            return loss, loss
        soft_loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[2].flatten(0, 1))
        return loss.detach(), torch.lerp(loss, soft_loss, self._smoothing.share)

    def _add(self, rows: tuple[torch.Tensor, ...], batch_size: float) -> torch.Tensor:
        """Add these rows' gradients to all gradients; returns their part of the batch's loss."""
        count = len(rows[0])
        if self._pool is None:
            with self._autocast():
                loss, objective = self._losses_of(self._forward, rows)
            objective = count / batch_size * objective
            # DDP and FSDP compute the mean over the processes; the sum is needed.
            torch.autograd.backward(
                objective if self.group.is_single else self.group.size * objective
            )
            return count / batch_size * loss.detach()
        threads = min(self.threads, count)
        shares = list(zip(*(each.tensor_split(threads) for each in rows), strict=True))
        weights = [len(share[0]) / batch_size for share in shares]
        others = [
            self._pool.submit(self._share, share, weight)
            for share, weight in zip(shares[1:], weights[1:], strict=True)
        ]
        loss, total = self._share(shares[0], weights[0])
        for other in others:  # always in the same order, so that the sum is bitwise the same
            share_loss, gradients = other.result()
            loss = loss + share_loss
            for gradient, more in zip(total, gradients, strict=True):
                gradient.add_(more)
        for parameter, gradient in zip(self.parameters, total, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return loss

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients down to a norm of `max_norm` (0: not); their norm before, a scalar.

        It is the norm of all gradients together, in all processes.
        """
        if not self._sharded:
            return clip_gradients(self.parameters, max_norm)
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        squares = torch.nn.utils.get_total_norm(gradients).square()
        self.group.all_reduce(squares)
        norm = squares.sqrt()
        if max_norm:
            scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch clips
            for gradient in gradients:
                gradient.mul_(scale)
        return norm

    def _share(
        self, rows: tuple[torch.Tensor, ...], weight: float
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """These rows' part of the batch's loss and gradients."""
        loss, objective = self._losses_of(self.model, rows)
        return weight * loss.detach(), torch.autograd.grad(weight * objective, self.parameters)


class CpuGradients(_Backend):
    """`core.training.Gradients` by machine code, for models of a shape that `suits` allows.

    Threads divide the batch's rows.

    Args:
        model: the model, on the CPU.
        config: the training configuration.
        group: the processes that divide a batch.
    """

    step: CpuTrainingStep

    def __init__(
        self, model: GPT, config: TrainConfig, group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        from mygpt.cpu.train.step import CpuTrainingStep

        super().__init__(model, group)
        flags = {
            "--compile": config.compile,
            "--checkpoint-activations": config.checkpoint_activations,
        }
        if asked := [flag for flag, wanted in flags.items() if wanted]:
            self.note = f"{' and '.join(asked)}: no effect on mygpt's kernels for CPUs"
        threads = min(torch.get_num_threads(), group.rows_per_process(config.batch_size))
        self.step = CpuTrainingStep(model, threads, cpu_products(config.dtype))
        self._ngrams: NgramPredictions | None = None

    def __enter__(self) -> Self:
        super().__enter__()
        self._inside.enter_context(_torch_threads(1))
        return self

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss in nats per token (a scalar); arguments as for `Gradients`."""
        if self._smoothing is None:
            loss = self.step.gradients(inputs, targets)
        else:
            soft = self._predictions(self._smoothing.ngrams)(self._smoothing.positions.reshape(-1))
            loss = self.step.gradients(inputs, targets, soft, self._smoothing.share)
        if self.group.is_single:
            return loss
        # The batch's mean is the sum of the processes' means, each times its fraction of the rows.
        fraction = len(inputs) / (self._batch_size or len(inputs))
        self.group.all_reduce(self.step.scaled_gradients(fraction))
        return self.group.sum_loss(fraction * loss)

    def _predictions(self, ngrams: NgramTargets) -> NgramPredictions:
        if self._ngrams is None:
            from mygpt.cpu.train.predictions import NgramPredictions

            levels = [tuple(vars(level).values()) for level in ngrams.levels]
            self._ngrams = NgramPredictions(
                ngrams.tokens, ngrams.lowest, levels, ngrams.vocab_size, self.step.threads
            )
        return self._ngrams

    def clip(self, max_norm: float) -> torch.Tensor:
        """As `Gradients.clip`."""
        return clip_gradients(self.parameters, max_norm, self.step.gradient_norm())

    def token_losses(
        self, inputs: NDArray[np.integer], targets: NDArray[np.integer]
    ) -> NDArray[np.float32]:
        """The loss of each target, (B, T), from (B, T) ids; without dropout."""
        return shared_losses(self.group, self.step.token_losses, inputs, targets)


def _data_parallel(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's DDP, which sums gradients during the backward pass; Li et al., 2020."""
    from torch.nn.parallel import DistributedDataParallel

    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"gradient_as_bucket_view": True, buffers: False}
    return DistributedDataParallel(forward, **options)


def cpu_token_losses(model: GPT) -> TokenLosses | None:
    """A faster function for each target's loss than the model's own; None if there is none."""
    if suitable_engine(model.config, next(model.parameters()).device) != "compiled":
        return None
    from mygpt.cpu.train.step import CpuTrainingStep

    return CpuTrainingStep(model, torch.get_num_threads()).token_losses


def shared_losses(
    group: ProcessGroup,
    score: TokenLosses,
    inputs: NDArray[np.integer],
    targets: NDArray[np.integer],
) -> NDArray[np.floating]:
    """Each target's loss, (B, T): each process computes its share of the rows, all get all."""
    if group.is_single:
        return score(inputs, targets)
    first, end = (len(inputs) * (group.rank + n) // group.size for n in (0, 1))
    own = slice(first, end) if end > first else slice(0, 1)  # sharded weights are gathered by all
    found = score(inputs[own], targets[own])[: end - first]
    return np.concatenate(group.gather(found))
