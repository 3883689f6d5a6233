"""How fast this device trains a model: a few real steps, as a run would make them.

If the model does not fit or a step would take too long, the micro-batch is made smaller, then the
number of blocks; the figures name what was trained.
"""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass, replace

import torch

from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.core.training import train_steps
from mygpt.errors import InputError
from mygpt.machine import gemm_rate
from mygpt.scaling import palm_flops_per_token
from mygpt.scaling.memory import activation_bytes
from mygpt.training.config import DtypeName, TrainConfig
from mygpt.training.cpu_gradients import CpuGradients
from mygpt.training.gradients import (
    make_gradients,
    suitable_engine,
)
from mygpt.training.memory import free_memory, model_bytes
from mygpt.training.optimizer import Optimizer

_STEP_S = 10.0  # the longest step, at the speed of plain matrix products
_FEWEST_STEPS, _MOST_STEPS = 3, 50
_SHARE = 0.6  # of the free memory: this estimate is rougher than a run's own
_HEAP = 1.5  # size of the heap relative to the tensors in it


@dataclass(frozen=True)
class Efficiency:
    """What was measured.

    Attributes:
        config: what was trained: the model, or the same with fewer blocks.
        micro_batch: windows at once.
        device: its name.
        dtype: of products.
        engine: what computed the gradients.
        steps: that were timed, after one that was not.
        step_s: their median.
        tokens_per_s: so many in a step over that time.
        flops_per_s: these times 6N and attention's products (Chowdhery et al. 2022, appendix B).
        products_per_s: what plain products of matrices reach; None where that is not measured.
    """

    config: GPTConfig
    micro_batch: int
    device: str
    dtype: str
    engine: str
    steps: int
    step_s: float
    tokens_per_s: float
    flops_per_s: float
    products_per_s: float | None

    @property
    def share_of_products(self) -> float | None:
        """Operations per second of training, relative to those of plain products."""
        return self.flops_per_s / self.products_per_s if self.products_per_s else None


def measure(
    config: GPTConfig,
    *,
    device: torch.device,
    micro_batch: int,
    dtype: DtypeName = "auto",
    checkpoint_activations: bool = False,
    budget_s: float = 5.0,
) -> Efficiency:
    """Train a few steps on `device` and time them.

    Args:
        config: the model.
        device: where.
        micro_batch: windows at once, at most.
        dtype: of products, as `TrainConfig` has it.
        checkpoint_activations: whether blocks are recomputed in the backward pass.
        budget_s: seconds of timed steps; three are made in any case.

    Raises:
        InputError: where not one block fits.
    """
    shown = _dtype_name(dtype, device)
    rate = _products_per_s(device, shown)
    trained, windows = _measurable(config, device, micro_batch, rate)
    recipe = TrainConfig(
        batch_size=windows, seq_len=config.max_seq_len, lr=1e-4, steps=1,
        engine=suitable_engine(trained, device), dtype=dtype,
        checkpoint_activations=checkpoint_activations,
    )  # fmt: skip
    times = _step_times(trained, recipe, device, budget_s)
    if rate is not None:  # other programs can only slow it down
        rate = max(rate, _products_per_s(device, shown) or 0.0)
    tokens_per_s = windows * config.max_seq_len / statistics.median(times)
    return Efficiency(
        config=trained,
        micro_batch=windows,
        device=_device_name(device),
        dtype=shown,
        engine=recipe.engine,
        steps=len(times),
        step_s=statistics.median(times),
        tokens_per_s=tokens_per_s,
        flops_per_s=tokens_per_s * palm_flops_per_token(trained, trained.max_seq_len).total,
        products_per_s=rate,
    )


def _products_per_s(device: torch.device, dtype: str) -> float | None:
    return None if device.type == "mps" else 1e9 * gemm_rate(str(device), dtype, budget_s=0.5)


def _step_times(
    config: GPTConfig, recipe: TrainConfig, device: torch.device, budget_s: float
) -> list[float]:
    """Seconds of each step: gradients, their norm, clipping, and the update."""
    with torch.random.fork_rng([device] * (device.type == "cuda")):
        torch.manual_seed(0)
        model = GPT.from_config(config).to(device)
        ids = torch.randint(0, config.vocab_size, (recipe.batch_size, recipe.seq_len + 1))
    inputs, targets = ids[:, :-1].contiguous().to(device), ids[:, 1:].contiguous().to(device)
    gradients = make_gradients(model, recipe)
    compiled = gradients.step if isinstance(gradients, CpuGradients) else None
    optimizer = Optimizer(model, recipe, compiled)
    batches = itertools.repeat((inputs, targets))
    steps = train_steps(batches, gradients, optimizer, lambda _: recipe.lr, recipe.grad_clip)
    times: list[float] = []
    with gradients:
        model.train()
        while len(times) <= _FEWEST_STEPS or (
            sum(times[1:]) < budget_s and len(times) <= _MOST_STEPS
        ):
            began = time.perf_counter()
            next(steps).norm.item()  # waits for the device
            _wait(device)
            times.append(time.perf_counter() - began)
    return times[1:]  # the first allocates buffers and compiles


def _measurable(
    config: GPTConfig, device: torch.device, micro_batch: int, rate: float | None
) -> tuple[GPTConfig, int]:
    """The model, or its first blocks, and as many windows at once as fit into time and memory."""
    free = free_memory(device)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    least = min(micro_batch, threads)

    def fits(shape: GPTConfig, windows: int) -> bool:
        need = model_bytes(shape, threads=min(threads, windows))
        kept = sum(activation_bytes(shape, "float32", stream=4))
        need += round(_HEAP * windows * shape.max_seq_len * kept)
        return free is None or need <= _SHARE * free

    def suits(shape: GPTConfig, windows: int) -> bool:
        flops = windows * shape.max_seq_len * palm_flops_per_token(shape, shape.max_seq_len).total
        return fits(shape, windows) and (rate is None or flops <= _STEP_S * rate)

    windows = micro_batch
    while windows > least and not suits(config, windows):
        windows = max(least, windows // 2)
    blocks, one = config.num_layers, replace(config, num_layers=1)
    while blocks > 1 and not suits(replace(config, num_layers=blocks), windows):
        blocks -= 1
    if blocks == 1 and not fits(one, windows):
        windows = 1
    if blocks == 1 and not fits(one, windows):
        raise InputError(
            f"not one block of width {config.embed_dim} with a window of {config.max_seq_len} fits "
            "into the memory that is free: remove --measure, or give --peak-tflops and "
            "--efficiency"
        )
    return replace(config, num_layers=blocks), windows


def _dtype_name(dtype: DtypeName, device: torch.device) -> str:
    """The number format of products, by torch's name."""
    from mygpt.training.hardware import compute_dtype

    return str(compute_dtype(dtype, device)).removeprefix("torch.")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
