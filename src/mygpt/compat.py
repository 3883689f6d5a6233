"""Private names of other projects that mygpt depends on, each with the reason.

Besides these, `decode/packing.py` reads the dictionaries of torch's modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def numba_functions_apart() -> Iterator[None]:
    """Meanwhile Numba's functions are translated to LLVM code and nothing more is done with them.

    Numba would link into each the code of all that it calls, directly or not, and make machine code
    of that. The functions cannot be called: this is for a process that does nothing else.
    """
    from numba.core import codegen

    library: Any = codegen.CPUCodeLibrary
    engine: Any = codegen.JITCPUCodegen
    kept = library.finalize, engine.set_env

    def finish(own: Any) -> None:
        own._finalized = True

    library.finalize, engine.set_env = finish, lambda *_: None
    try:
        yield
    finally:
        library.finalize, engine.set_env = kept


def numba_modules(libraries: Iterable[Any]) -> list[str]:
    """The LLVM code of some functions of Numba and of all that they call, a text for each.

    Args:
        libraries: of functions that were translated within `numba_functions_apart`.
    """
    found, waiting = {}, list(libraries)
    while waiting:
        library = waiting.pop()
        if id(library) not in found:
            found[id(library)] = library.get_llvm_str()
            waiting += library._linking_libraries
    return list(found.values())


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
