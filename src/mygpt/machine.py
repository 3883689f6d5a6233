"""What this machine has: which devices and number formats can be asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mygpt.errors import InputError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


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


def choose_dtype(name: str = "float32") -> torch.dtype:
    """The torch number format called `name`; `InputError` unless it is one of `DTYPES`."""
    import torch

    if name not in DTYPES:
        raise InputError(f"dtype={name!r} is not known: choose {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype
