"""What this machine has: which devices and number formats can be asked for, and what is free."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mygpt.errors import InputError

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")


def choose_device(name: str = "auto") -> torch.device:
    """The torch device called `name`: "auto" (CUDA, else MPS, else CPU), or torch's own names.

    Raises:
        InputError: for a device that torch does not know or that this machine lacks.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device={name!r} is not known: choose auto, cpu, cuda or mps") from error
    missing = (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing or device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device={name!r} is not available here: use --device cpu, or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(f"device={name!r}: this machine has {count} CUDA devices, from cuda:0")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch number format called `name`, for a model on `device`.

    "auto" is bfloat16 where CUDA computes in it, else float32.

    Raises:
        InputError: for a format that is not one of `DTYPES`, or not torch's.
    """
    import torch

    if name not in DTYPES:
        raise InputError(f"dtype={name!r} is not known: choose {', '.join(DTYPES)}")
    if name == "int8":
        raise InputError("dtype=int8 is the cpu engine's: use --engine cpu, or float32")
    if name == "auto":
        # Older GPUs imitate bfloat16, and are slower for it.
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if native else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def free_memory_bytes() -> int | None:
    """Main memory that a program can still take here; None where the system does not tell.

    What the system calls available, or what the limit of this process's control group leaves.
    """
    free = _available()
    for limit in _control_groups():
        free = limit if free is None else min(free, limit)
    return free


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        try:  # no Linux: what is there, for want of what is free
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return None
    kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kib is None else 1024 * int(kib)


def _control_groups(proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What each memory limit above this process leaves (Linux's control groups, both versions)."""
    left: list[int] = []
    try:
        groups = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return left
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        here = base / path.strip("/")
        for folder in (here, *here.parents):
            if not folder.is_relative_to(base):
                break
            try:
                limit, used = ((folder / name).read_text(encoding="ascii") for name in names)
                left.append(max(0, int(limit) - int(used)))
            except (OSError, ValueError):  # not there, or "max"
                continue
    return left
