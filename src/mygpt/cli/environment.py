"""What mygpt runs on here: the facts `mygpt doctor` shows, and what is wrong with them."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import shutil
import sys
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

_GIB = 2**30
_LEAST_DISK_BYTES = _GIB
_LEAST_MEMORY_BYTES = _GIB // 2  # torch alone takes most of it
# A core with AVX2 multiplies at 20 GFLOP/s and more, also when it is old and shares its time;
# plain loops, which run where no BLAS was found, at 1 to 4.
_LEAST_GFLOP_PER_S, _LEAST_WITHOUT_AVX2 = 6.0, 0.5
_VARIABLES = (
    "OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "ATEN_", "NUMBA_", "TORCH_", "PYTORCH_", "CUDA_",
    "LD_PRELOAD", "MALLOC_", "MYGPT_",
)  # fmt: skip
_BLAS = {"mkl": "MKL", "open": "OpenBLAS", "accelerate": "Accelerate"}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Torch:
    """The torch that is installed.

    Attributes:
        version: its own.
        build: "CPU", or what it was built for, such as "CUDA 12.8".
        libraries: what multiplies matrices on a CPU, and what starts threads.
        capability: the vector instructions its own kernels use.
        threads: how many it uses.
        devices: GPUs it can use, name and bytes of memory (None where it does not tell).
        problem: why it sees no GPU, in its own words; empty where it said nothing.
    """

    version: str
    build: str
    libraries: tuple[str, ...]
    capability: str
    threads: int
    devices: tuple[tuple[str, int | None], ...]
    problem: str


@dataclass(frozen=True)
class Environment:
    """Facts about this machine and what is installed, before anything is measured.

    Attributes:
        python: its version.
        system: the operating system and the kind of processor.
        cpu: the processor's name.
        vectors: its vector extensions.
        threads: hardware threads this process may run on.
        cores: cores this process may keep busy; a control group's quota may leave a fraction.
        quota: what the control group grants of them; None without a limit.
        load: processes that wanted to run during the last minute; None where nobody counts.
        memory_bytes: main memory, None where the system does not tell; and what is free of it.
        mygpt: its version.
        torch: None where it cannot be imported.
        torch_error: why it cannot.
        numba: its version; None where it is missing or of no use here.
        compiled: whether the decoding loop's machine code is at hand.
        cache: where that is kept.
        cache_writable: whether it could be.
        disk_free_bytes: where `runs/` lies or would lie.
        nvidia: whether an NVIDIA driver is loaded.
        variables: those of the process's environment that change speed or place.
        outdated: (package, version here, least version) of what is too old or missing.
    """

    python: str
    system: str
    cpu: str
    vectors: tuple[str, ...]
    threads: int
    cores: float
    quota: float | None
    load: float | None
    memory_bytes: int | None
    free_memory_bytes: int | None
    mygpt: str
    torch: Torch | None
    torch_error: str
    numba: str | None
    compiled: bool
    cache: str
    cache_writable: bool
    disk_free_bytes: int
    nvidia: bool
    variables: dict[str, str]
    outdated: tuple[tuple[str, str, str], ...]


def look(runs: Path = Path("runs")) -> Environment:
    """Gather the facts; imports torch, changes nothing."""
    from mygpt import __version__, machine
    from mygpt.engines.choice import compiled_engine_available, may_have_gpu
    from mygpt.engines.cpu.build import cache_folder, is_compiled
    from mygpt.engines.cpu.workers import usable_cores

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # before torch's own start
    available, quota = compiled_engine_available(), machine.cpu_quota()
    told, problem = _look_at_torch()
    return Environment(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        cpu=machine.cpu_name(),
        vectors=machine.vector_extensions(),
        threads=_hardware_threads(),
        cores=min(float(usable_cores()), quota or math.inf),
        quota=quota,
        load=load,
        memory_bytes=machine.total_memory_bytes(),
        free_memory_bytes=machine.free_memory_bytes(),
        mygpt=__version__,
        torch=told,
        torch_error=problem,
        numba=metadata.version("numba") if available else None,
        compiled=available and is_compiled(),
        cache=str(cache_folder()),
        cache_writable=_is_writable(cache_folder()),
        disk_free_bytes=shutil.disk_usage(_existing(runs)).free,
        nvidia=sys.platform != "darwin" and may_have_gpu(),
        variables={
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)
        },
        outdated=tuple(_outdated()),
    )


def _look_at_torch() -> tuple[Torch | None, str]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch links is missing
        return None, (str(error).splitlines() or [type(error).__name__])[0]
    build = "CPU"
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    backends: Any = torch.backends
    blas = re.findall(r"BLAS_INFO=(\w+)", torch.__config__.show())
    libraries = [*(_BLAS.get(name, name) for name in blas)]
    libraries += ["OpenMP"] * backends.openmp.is_available()
    devices: list[tuple[str, int | None]] = []
    with warnings.catch_warnings(record=True) as said:  # an old driver is told in a warning
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            for number in range(torch.cuda.device_count()):
                found = torch.cuda.get_device_properties(number)
                devices.append((found.name, found.total_memory))
        if torch.backends.mps.is_available():
            devices.append(("MPS", None))
    problem = "" if devices or not said else str(said[0].message).splitlines()[0]
    told = Torch(
        version=torch.__version__,
        build=build,
        libraries=tuple(libraries),
        capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        devices=tuple(devices),
        problem=problem,
    )
    return told, ""


def _hardware_threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _existing(path: Path) -> Path:
    """The nearest folder above `path`, or itself, that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if os.path.exists(place))


def _is_writable(folder: Path) -> bool:
    place = _existing(folder)
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def _outdated() -> list[tuple[str, str, str]]:
    """What pyproject.toml asks for and this environment does not have."""
    found = []
    with contextlib.suppress(metadata.PackageNotFoundError):
        for requirement in metadata.requires("mygpt") or ():
            match = re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement)  # extras have a marker
            if match is None:
                continue
            name, least = match.groups()
            try:
                here = metadata.version(name)
            except metadata.PackageNotFoundError:
                here = "missing"
            if _release(here) < _release(least):
                found.append((name, here, least))
    return found


def _release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def advice(here: Environment, probe: dict[str, Any]) -> list[str]:
    """One line, with its remedy, for each thing that is wrong.

    Args:
        here: the facts.
        probe: what was measured (see `mygpt.cli.doctor`); empty for nothing.
    """
    return [
        *(
            f"{name} {version} is older than {least}, the least that mygpt runs with: "
            f"pip install --upgrade {name}"
            if version != "missing"
            else f"{name} is missing: pip install {name}"
            for name, version, least in here.outdated
        ),
        *_torch_advice(here),
        *_kernel_advice(here),
        *_room_advice(here),
        *_speed_advice(here, probe),
    ]


def _torch_advice(here: Environment) -> list[str]:
    if here.torch is None:
        return [f"torch cannot be imported ({here.torch_error}): install it again"]
    lines = []
    threads, cores = here.torch.threads, max(1, math.ceil(here.cores))
    named = [name for name in _THREAD_VARIABLES if name in here.variables]
    settings = " and ".join(f"{name}={here.variables[name]}" for name in named)
    remedy = f"export OMP_NUM_THREADS={cores}"
    # Elsewhere hardware threads and slow cores count as cores, and torch is right to use fewer.
    if threads < cores and here.system.startswith("Linux"):
        idle = f"{cores - threads} of {cores} cores idle in training"
        if named:
            leaves = "leaves" if len(named) == 1 else "leave"
            lines.append(f"{settings} {leaves} {idle}: unset {' '.join(named)}")
        else:
            lines.append(f"torch uses {threads} threads, {idle}: {remedy}")
    elif threads > (max(cores, here.threads) if here.quota is None else cores):
        whose = "this process has" if here.quota is None else "its control group grants"
        lines.append(f"torch starts {threads} threads, and {cores} cores is all {whose}: {remedy}")
    if here.nvidia and not here.torch.devices:
        if here.torch.build == "CPU":
            remedy = "install the CUDA build (https://pytorch.org/get-started/locally/)"
            lines.append(f"there is an NVIDIA GPU, and torch is the CPU build: {remedy}")
        elif here.variables.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
            lines.append("CUDA_VISIBLE_DEVICES hides the GPU: unset it")
        else:
            why = here.torch.problem or "nvidia-smi should show it"
            lines.append(f"torch cannot use the NVIDIA GPU: update its driver ({why})")
    return lines


def _kernel_advice(here: Environment) -> list[str]:
    if here.numba is None:
        if any(name == "numba" for name, _, _ in here.outdated):
            return []  # told already
        return ["the compiled engine needs 64 bits and a POSIX system: the NumPy engine writes"]
    if here.compiled:
        return []
    if here.variables.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return ["NUMBA_DISABLE_JIT keeps the decoding loop from being compiled: unset it"]
    if not here.cache_writable:
        return [
            f"{here.cache} cannot be written to, so each start compiles the decoding loop: "
            "set MYGPT_CACHE to a folder that can"
        ]
    return ["the decoding loop is not compiled: `mygpt warmup` does that once, in ten seconds"]


def _room_advice(here: Environment) -> list[str]:
    lines = []
    free = here.free_memory_bytes
    if free is not None and free < _LEAST_MEMORY_BYTES:
        remedy = "close other programs, or use a smaller model"
        lines.append(f"{gib(free)} of memory is free: {remedy}")
    if here.disk_free_bytes < _LEAST_DISK_BYTES:
        lines.append(
            f"{gib(here.disk_free_bytes)} is free where runs/ lies: make room, or train with "
            "--output elsewhere"
        )
    return lines


def _speed_advice(here: Environment, probe: dict[str, Any]) -> list[str]:
    """A warning only where a product is several times slower than any working machine's."""
    rate = probe.get("float32_gflop_per_s")
    if rate is None or here.torch is None:
        return []
    cores = min(here.cores, here.torch.threads)
    least = _LEAST_GFLOP_PER_S if "avx2" in here.vectors else _LEAST_WITHOUT_AVX2
    if rate >= least * cores:
        return []
    slow = f"{rate:.1f} GFLOP/s is far too little for {cores:g} cores"
    if not set(_BLAS.values()) & set(here.torch.libraries):
        return [f"{slow}: install torch from pytorch.org, whose builds have a fast BLAS"]
    load = "" if here.load is None else f" (load {here.load:.1f} in the last minute)"
    return [f"{slow}: other programs keep them busy{load}, so look again later"]


def gib(count: int) -> str:
    """Bytes as GiB."""
    return f"{count / _GIB:.1f} GiB"
