"""How a device computes: number formats, `torch.compile`, recomputed activations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch

from mygpt.core.model import GPT
from mygpt.errors import InputError
from mygpt.machine import choose_dtype
from mygpt.training.config import DtypeName, TrainConfig
from mygpt.training.distributed.process_group import ProcessGroup


def compute_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The number format of matrix products: float32 or bfloat16.

    Raises:
        InputError: for a format that the device does not support.
    """
    if name == "tf32":
        if device.type != "cuda":
            raise InputError(f"dtype=tf32 is for CUDA devices, not {device.type}: use float32")
        return torch.float32
    if name == "auto" and device.type != "cuda":
        return torch.float32
    return choose_dtype(name, device)


def check_format(
    config: TrainConfig, device: torch.device, remedy: str = "use --dtype float32"
) -> None:
    """Raise for a number format that the device, or this processor, does not support.

    Raises:
        InputError: with the remedy.
    """
    compute_dtype(config.dtype, device)
    if config.engine == "compiled" and config.dtype == "bfloat16" and not cpu_products("bfloat16"):
        raise InputError(
            "dtype=bfloat16 needs a processor with AVX-512 BF16 or AMX (AMD Zen 4, Intel Xeon of "
            f"2023, and later), which this one is not: {remedy}"
        )


def cpu_products(name: DtypeName) -> int:
    """How the machine code computes products in a format, see `mygpt.cpu.common.processor`.

    0 is float32, also where the processor has no products in bfloat16.
    """
    from mygpt.cpu.common.processor import bfloat16_products

    return bfloat16_products() if name == "bfloat16" else 0


@contextmanager
def products_in(name: DtypeName) -> Iterator[None]:
    """Inside, torch computes float32 products in float32, or with "tf32" in CUDA's TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Inside, torch computes products in `dtype`, and chooses the format of the rest."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def checkpoint_blocks(model: GPT) -> None:
    """Keep only the input of each block, and recompute the rest in the backward pass.

    Chen et al., 2016 (arXiv:1604.06174). The blocks' names and weights stay as they are.
    """
    from torch.utils.checkpoint import checkpoint

    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_with_torch(model: GPT, batch: tuple[int, int]) -> tuple[Callable[..., Any], str | None]:
    """The model compiled by `torch.compile`, after one trial; the model itself if that fails.

    Args:
        model: on its device.
        batch: (B, T) of the trial.

    Returns:
        What to call, and why it is not compiled, in one line (None if it is).
    """
    rows, time = batch
    device = next(model.parameters()).device
    ids = torch.zeros(rows, time + 1, dtype=torch.int64, device=device)
    try:
        made: Callable[..., Any] = torch.compile(model)
        made(ids[:, :-1], ids[:, 1:])[1].backward()  # with the strides of a batch
    except Exception as error:  # a missing compiler, an unsupported operation
        return model, _failure(error)
    finally:
        model.zero_grad()
    return made, None


@cache
def why_no_torch_compile(device: torch.device) -> str | None:
    """Why `torch.compile` does not work on a device, in one line; None if it does."""
    try:
        numbers = torch.ones(4, device=device, requires_grad=True)
        made: torch.Tensor = torch.compile(torch.nn.functional.silu)(numbers).sum()
        torch.autograd.backward(made)
    except Exception as error:
        return _failure(error)
    return None


def _failure(error: Exception) -> str:
    reason = str(error).strip().split("\n")[0][:120] or type(error).__name__
    return f"torch.compile failed ({reason}): training without it"


def described(
    config: TrainConfig,
    device: torch.device,
    group: ProcessGroup,
    *,
    uses_torch_compile: bool = False,
) -> str:
    """The device and each choice that was made for it, on one line."""
    parts = [_name(device)]
    if config.engine == "compiled":
        products = "bfloat16 products" if config.dtype == "bfloat16" else "float32"
        parts.append(f"{products}, mygpt's kernels for CPUs")
    else:
        dtype = compute_dtype(config.dtype, device)
        products = "TF32 products" if config.dtype == "tf32" else str(dtype).removeprefix("torch.")
        mixed = dtype != torch.float32 and not group.shards_model(config.shard)
        parts.append(f"{products} by autocast" if mixed else products)
        parts.append("torch.compile" if uses_torch_compile else "no torch.compile")
        parts += ["activations recomputed"] * config.checkpoint_activations
    if device.type == "cuda":
        parts.append("attention by SDPA (flash where it fits), fused AdamW")
    if not group.is_single:
        how = "FSDP" if group.shards_model(config.shard) else "DDP"
        backend = "NCCL" if device.type == "cuda" else "gloo"
        parts.append(f"{group.size} processes ({how}, {backend})")
    return ", ".join(parts)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    plural = "s" if threads > 1 else ""
    return f"cpu ({threads} thread{plural})" if device.type == "cpu" else str(device)
