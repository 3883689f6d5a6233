"""Private names of other projects that mygpt depends on, each with the reason.

Besides these, `decode/packing.py` reads the dictionaries of torch's modules.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def set_process_group_timeout(timeout: timedelta) -> None:
    """Change the timeout of torch's default group; public only when a group is made."""
    import torch

    change = getattr(torch.distributed.distributed_c10d, "_set_pg_timeout", None)
    if change is not None:
        change(timeout)


def mark_static_address(tensor: torch.Tensor) -> None:
    """Declare that a tensor stays where it is in memory, for CUDA graphs of `torch.compile`."""
    import torch

    torch._dynamo.mark_static_address(tensor, guard=False)
