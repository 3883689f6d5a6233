"""FSDP2: each process holds a shard of every weight, its gradient and its optimizer state.

Zhao et al., 2023 (arXiv:2304.11277), with torch's `fully_shard`: the weights of a block are
gathered when they are needed. A parameter is then a DTensor, whose rows (dimension 0) are
distributed as by `torch.chunk`. Elementwise operations run on the local rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt.checkpoint.unloaded_model import allocate, meta_model
from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.training.config import TrainConfig
from mygpt.training.distributed.process_group import ProcessGroup
from mygpt.training.hardware import checkpoint_blocks, compute_dtype, why_no_torch_compile

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of a tensor in this process: all of a plain one."""
    return cast("DTensor", tensor).to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether its rows are distributed; does not import torch's distributed tensors."""
    return hasattr(tensor, "to_local")


def own_rows(tensor: torch.Tensor, matrix: Any, group: ProcessGroup) -> Any:
    """Those rows of a matrix that this process holds of `tensor`, which has as many."""
    if not is_sharded(tensor):
        return matrix
    start = group.rank * -(-len(tensor) // group.size)  # as torch.chunk divides
    return matrix[start : start + len(local(tensor))]


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """All rows, gathered; every process must call this."""
    return cast("DTensor", tensor).full_tensor() if is_sharded(tensor) else tensor


def like(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Zeros of this shape, with rows distributed like those of `tensor`, which has as many."""
    if not is_sharded(tensor) or not shape:
        return torch.zeros(shape, device=tensor.device)
    from torch.distributed.tensor import DTensor

    held = cast(DTensor, tensor)
    rows = torch.zeros(len(local(tensor)), *shape[1:], device=tensor.device)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        rows, held.device_mesh, held.placements, run_check=False, shape=torch.Size(shape),
        stride=stride,
    )  # fmt: skip


def put_rows(tensor: torch.Tensor, array: NDArray[Any], group: ProcessGroup) -> None:
    """Fill a tensor with its process's rows of an array."""
    here = local(tensor)
    rows = np.array(own_rows(tensor, array, group))
    with torch.no_grad():
        here.copy_(torch.from_numpy(rows).view(here.shape))


def sharded_model(
    shape: GPTConfig, config: TrainConfig, device: torch.device, group: ProcessGroup
) -> GPT:
    """A sharded model of this shape, whose weights are still to be filled."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = meta_model(shape)
    dtype = compute_dtype(config.dtype, device)
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (group.size,))
    if config.checkpoint_activations:
        checkpoint_blocks(model)
    for block in model.blocks:
        if config.compile and why_no_torch_compile(device) is None:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return allocate(model, device)


def fill(model: GPT, source: GPT | None, group: ProcessGroup) -> None:
    """Copy the weights of process 0's `source` into a sharded model, one by one."""
    known = {} if source is None else source.state_dict()
    for name, tensor in model.named_parameters():
        array = np.empty(tuple(tensor.shape), torch.empty(0, dtype=tensor.dtype).numpy().dtype)
        if source is not None:
            array[...] = known[name].detach().cpu().numpy()
        group.broadcast_bytes(array)
        put_rows(tensor, array, group)


def gathered_arrays(model: GPT, group: ProcessGroup) -> dict[str, NDArray[Any]]:
    """All weights on process 0's CPU, gathered one by one; the others get none."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, tensor in model.state_dict().items():
        array = gathered(tensor.detach())
        if group.is_main:
            arrays[name] = array.cpu().numpy()
    return arrays
