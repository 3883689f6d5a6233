"""Facts about this machine and its software for `mygpt doctor`, with advice on problems."""

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
# A core with AVX2 reaches 20 GFLOP/s or more in matrix products, even if it is old and shared.
# Without a BLAS library torch uses plain loops, at 1 to 4 GFLOP/s.
_LEAST_GFLOP_PER_S, _LEAST_WITHOUT_AVX2 = 6.0, 0.5
_VARIABLES = (
    "OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "ATEN_", "NUMBA_", "TORCH_", "PYTORCH_", "CUDA_",
    "LD_PRELOAD", "MALLOC_", "MYGPT_",
)  # fmt: skip
_BLAS = {"mkl": "MKL", "open": "OpenBLAS", "accelerate": "Accelerate"}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Torch:
    """The installed torch.

    Attributes:
        version: its version.
        build: "CPU", or the platform it was built for, such as "CUDA 12.8".
        libraries: the library for matrix products on a CPU, and the one for threads.
        capability: the vector instructions that torch's kernels use.
        threads: how many threads it uses.
        devices: name and memory in bytes of each usable GPU; None for memory if it is unknown.
        problem: torch's message on why no GPU is usable; empty if there was none.
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
    """Facts about this machine and the installed software; nothing here is a measured speed.

    Attributes:
        python: Python's version.
        system: the operating system and the processor's architecture.
        cpu: the processor's name.
        vectors: its vector extensions.
        threads: hardware threads that this process may run on.
        cores: cores that this process can use; a fraction if a control group's quota says so.
        quota: the control group's limit in cores; None without one.
        load: the load average of the last minute; None if the system does not report it.
        memory_bytes: main memory; None if the system does not report it.
        free_memory_bytes: the part of it that is free.
        mygpt: mygpt's version.
        torch: the installed torch; None if it cannot be imported.
        torch_error: why it cannot be imported.
        numba: its version; None if it is missing or cannot be used on this machine.
        compiled: whether the decoding loop's machine code is in the cache.
        cache: the folder of that cache.
        cache_writable: whether it can be written to.
        disk_free_bytes: free space on the disk of `runs/`.
        nvidia: whether an NVIDIA driver is loaded.
        variables: environment variables that affect speed or locations.
        outdated: (package, installed version, minimum version) of what is too old or missing.
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


def inspect_environment(runs: Path = Path("runs")) -> Environment:
    """Collect the facts. Imports torch and changes nothing."""
    from mygpt import __version__, machine
    from mygpt.cpu.common.build import cache_folder, has_machine_code
    from mygpt.cpu.common.workers import usable_cores
    from mygpt.decode.choice import cpu_engine_available, may_have_gpu

    # Read before torch is imported, since the import itself adds to the load.
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    available, quota = cpu_engine_available(), machine.cpu_quota()
    torch, problem = _inspect_torch()
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
        torch=torch,
        torch_error=problem,
        numba=metadata.version("numba") if available else None,
        compiled=available and has_machine_code(),
        cache=str(cache_folder()),
        cache_writable=_is_writable(cache_folder()),
        disk_free_bytes=shutil.disk_usage(_existing(runs)).free,
        nvidia=sys.platform != "darwin" and may_have_gpu(),
        variables={
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)
        },
        outdated=tuple(_outdated()),
    )


def _inspect_torch() -> tuple[Torch | None, str]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch is missing
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
    with warnings.catch_warnings(record=True) as caught:  # torch warns if the driver is too old
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            for number in range(torch.cuda.device_count()):
                device = torch.cuda.get_device_properties(number)
                devices.append((device.name, device.total_memory))
        if torch.backends.mps.is_available():
            devices.append(("MPS", None))
    problem = "" if devices or not caught else str(caught[0].message).splitlines()[0]
    found = Torch(
        version=torch.__version__,
        build=build,
        libraries=tuple(libraries),
        capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        devices=tuple(devices),
        problem=problem,
    )
    return found, ""


def _hardware_threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if os.path.exists(place))


def _is_writable(folder: Path) -> bool:
    place = _existing(folder)
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def _outdated() -> list[tuple[str, str, str]]:
    """The packages that pyproject.toml requires in a newer version than is installed."""
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
    """One line for each problem, with its remedy.

    Args:
        here: the facts.
        probe: measured speeds by name (see `mygpt.cli.doctor`); empty if nothing was measured.
    """
    return [
        *(
            f"{name} {version} is older than {least}, the minimum for mygpt: "
            f"pip install --upgrade {name}"
            if version != "missing"
            else f"{name} is missing: pip install {name}"
            for name, version, least in here.outdated
        ),
        *_torch_advice(here),
        *_kernel_advice(here),
        *_capacity_advice(here),
        *_speed_advice(here, probe),
    ]


def _torch_advice(here: Environment) -> list[str]:
    if here.torch is None:
        return [f"torch cannot be imported ({here.torch_error}): reinstall it"]
    lines = []
    threads, cores = here.torch.threads, max(1, math.ceil(here.cores))
    named = [name for name in _THREAD_VARIABLES if name in here.variables]
    settings = " and ".join(f"{name}={here.variables[name]}" for name in named)
    remedy = f"export OMP_NUM_THREADS={cores}"
    # On other systems the count includes hardware threads and slow cores; torch uses fewer.
    if threads < cores and here.system.startswith("Linux"):
        idle = f"{cores - threads} of {cores} cores idle during training"
        if named:
            leaves = "leaves" if len(named) == 1 else "leave"
            lines.append(f"{settings} {leaves} {idle}: unset {' '.join(named)}")
        else:
            lines.append(f"torch uses {threads} threads and leaves {idle}: {remedy}")
    elif threads > (max(cores, here.threads) if here.quota is None else cores):
        whose = "this process" if here.quota is None else "its control group"
        lines.append(f"torch starts {threads} threads, but {whose} has {cores} cores: {remedy}")
    if here.nvidia and not here.torch.devices:
        if here.torch.build == "CPU":
            remedy = "install the CUDA build (https://pytorch.org/get-started/locally/)"
            lines.append(f"there is an NVIDIA GPU, but torch is the CPU build: {remedy}")
        elif here.variables.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
            lines.append("CUDA_VISIBLE_DEVICES hides the GPU: unset it")
        else:
            why = here.torch.problem or "check that nvidia-smi lists the GPU"
            lines.append(f"torch cannot use the NVIDIA GPU: update its driver ({why})")
    return lines


def _kernel_advice(here: Environment) -> list[str]:
    if here.numba is None:
        if any(name == "numba" for name, _, _ in here.outdated):
            return []  # reported above
        return [
            "the machine-code engine needs a 64-bit POSIX system: the NumPy engine is used instead"
        ]
    if here.compiled:
        return []
    if here.variables.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return ["NUMBA_DISABLE_JIT prevents compiling the decoding loop: unset it"]
    if not here.cache_writable:
        return [
            f"{here.cache} is not writable, so each start compiles the decoding loop: "
            "set MYGPT_CACHE to a writable folder"
        ]
    return ["the decoding loop is not compiled: run `mygpt warmup` once, it takes ten seconds"]


def _capacity_advice(here: Environment) -> list[str]:
    lines = []
    free = here.free_memory_bytes
    if free is not None and free < _LEAST_MEMORY_BYTES:
        remedy = "close other programs, or use a smaller model"
        lines.append(f"{gib(free)} of memory is free: {remedy}")
    if here.disk_free_bytes < _LEAST_DISK_BYTES:
        lines.append(
            f"{gib(here.disk_free_bytes)} of disk is free where runs/ is: delete files, or train "
            "with --output on another disk"
        )
    return lines


def _speed_advice(here: Environment, probe: dict[str, Any]) -> list[str]:
    """A warning only if matrix products are several times slower than on any working machine."""
    rate = probe.get("float32_gflop_per_s")
    if rate is None or here.torch is None:
        return []
    cores = min(here.cores, here.torch.threads)
    least = _LEAST_GFLOP_PER_S if "avx2" in here.vectors else _LEAST_WITHOUT_AVX2
    if rate >= least * cores:
        return []
    slow = f"{rate:.1f} GFLOP/s is very slow for {cores:g} cores"
    if not set(_BLAS.values()) & set(here.torch.libraries):
        return [f"{slow}: install torch from pytorch.org, whose builds include a fast BLAS"]
    load = "" if here.load is None else f" (load {here.load:.1f} in the last minute)"
    return [f"{slow}: other programs may use them{load}; measure again later"]


def gib(count: int) -> str:
    """A number of bytes as text in GiB."""
    return f"{count / _GIB:.1f} GiB"
