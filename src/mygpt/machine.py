"""What this machine has: which devices and number formats can be asked for."""

from __future__ import annotations

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
