"""`choose`, the one function that selects the engine: by device, number format, size and length.

It does not import torch, which would take longer than most jobs.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
from dataclasses import dataclass
from typing import Literal

from mygpt.core.config import GPTConfig
from mygpt.errors import InputError, require_choice
from mygpt.machine import DTYPES

EngineName = Literal["numpy", "cpu", "torch"]
ENGINES = ("auto", "numpy", "cpu", "torch")

# With fewer parameters, launching operations on a GPU costs more than its arithmetic saves.
_WORTH_A_GPU = 30_000_000  # parameters
# Compiling the kernels takes about ten seconds; a job that NumPy does in less does not wait for it.
_WORTH_COMPILING_S = 5.0
_NUMPY_STEP_S, _NUMPY_PRODUCTS_PER_S = 3e-4, 5e9  # per new token; per token read


@dataclass(frozen=True)
class Choice:
    """An engine and the reason for it, as the end of a sentence."""

    name: EngineName
    reason: str


def choose(
    config: GPTConfig,
    *,
    tokens: int,
    reads: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    wanted: str = "auto",
) -> Choice:
    """The engine for generating `tokens` tokens in all.

    Args:
        config: the model's shape.
        tokens: new tokens, of all samples together.
        reads: tokens that the model has to read (see `tokens_to_read`); None is `tokens`.
        device: "auto", or torch's name of a device.
        dtype: one of `DTYPES`; "auto" excludes no engine.
        wanted: one of `ENGINES`.

    Raises:
        InputError: for unknown names, or an engine without the device or number format.
    """
    require_choice("engine", wanted, ENGINES)
    require_choice("dtype", dtype, DTYPES)
    if wanted != "auto":
        return _check(wanted, device, dtype)
    if dtype == "int8":
        return _check("cpu", device, dtype)
    if dtype not in ("auto", "float32"):
        return Choice("torch", f"only torch has {dtype}")
    if device not in ("auto", "cpu"):
        return Choice("torch", f"only torch runs on device {device}")
    if device == "auto" and may_have_gpu() and config.num_parameters() >= _WORTH_A_GPU:
        return Choice("torch", "there may be a GPU, and the model is large enough for it")
    return _choose_on_cpu(config, tokens, tokens if reads is None else reads)


def tokens_to_read(prompt: int, new: int, window: int, overflow: str) -> int:
    """How many tokens a model reads to generate `new` tokens after `prompt`.

    Past the window, "crop" reads the whole window for each token.
    """
    inside = max(0, min(new, window - prompt))
    past = (new - inside) * (window if overflow == "crop" else 1)
    return min(prompt, window) + inside + past


def _choose_on_cpu(config: GPTConfig, tokens: int, reads: int) -> Choice:
    if not cpu_engine_available():
        return Choice("numpy", "Numba is missing, or this system has no POSIX threads")
    from mygpt.cpu.common.build import has_machine_code

    if has_machine_code():
        return Choice("cpu", "its machine code is compiled")
    products_s = reads * config.num_parameters() / _NUMPY_PRODUCTS_PER_S
    if tokens * _NUMPY_STEP_S + products_s < _WORTH_COMPILING_S:
        return Choice("numpy", "the job is shorter than compiling (`mygpt warmup` does that ahead)")
    return Choice("cpu", "the job is long enough to compile for")


def _check(wanted: str, device: str, dtype: str) -> Choice:
    """The requested engine, or an error with what it does not support."""
    if wanted == "torch":
        if dtype == "int8":
            raise InputError(
                "dtype=int8 works only with the cpu engine: use --engine cpu, or float32"
            )
        return Choice("torch", "it was requested")
    if device not in ("auto", "cpu"):
        raise InputError(f"engine={wanted} runs on the CPU: use --engine torch for {device}")
    if dtype not in ("auto", "float32", "int8") or (dtype == "int8" and wanted == "numpy"):
        fit = "float32" if wanted == "numpy" else "float32 or int8"
        other = "cpu" if dtype == "int8" else "torch"
        raise InputError(f"engine={wanted} has no dtype {dtype}: use {fit}, or --engine {other}")
    if wanted == "numpy":
        return Choice("numpy", "it was requested")
    if not cpu_engine_available():
        raise InputError(
            "engine=cpu needs Numba and a POSIX system: install numba, or use --engine numpy"
        )
    return Choice("cpu", "it alone has int8" if dtype == "int8" else "it was requested")


@functools.cache
def cpu_engine_available() -> bool:
    """Whether this system has what the cpu engine needs."""
    from importlib.util import find_spec

    needs = all(find_spec(name) is not None for name in ("numba", "llvmlite"))
    return needs and os.name == "posix" and sys.maxsize > 2**32


def may_have_gpu() -> bool:
    """Whether the system seems to have a GPU that torch could use."""
    nvidia = os.path.exists("/dev/nvidiactl") or os.path.exists("/proc/driver/nvidia/version")
    return nvidia or (sys.platform == "darwin" and platform.machine() == "arm64")
