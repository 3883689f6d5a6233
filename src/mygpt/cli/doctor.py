"""`mygpt doctor`: this machine's set-up and speed, and whether a run's files are intact.

`mygpt warmup` is the remedy that it advises most: compile the kernels before their first use.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mygpt.cli import options
from mygpt.cli.terminal import at_words, say, to_json
from mygpt.errors import InputError
from mygpt.machine import bytes_text

if TYPE_CHECKING:
    from mygpt.training.checkup import Finding

_LEAST_DISK_BYTES, _LEAST_MEMORY_BYTES = 10**9, 5 * 10**8  # torch alone takes most of the memory
_VARIABLES = (
    "OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "ATEN_", "NUMBA_", "TORCH_", "PYTORCH_", "CUDA_",
    "LD_PRELOAD", "MALLOC_", "MYGPT_",
)  # fmt: skip
_UNITS = {
    "memory_gb_per_s": "memory bandwidth (GB/s)",
    "float32_gflop_per_s": "float32 matrix products (GFLOP/s)",
    "cuda_bfloat16_gflop_per_s": "bfloat16 matrix products on the GPU (GFLOP/s)",
}


@dataclass(frozen=True)
class Torch:
    """The installed torch."""

    version: str
    build: str  # "CPU", or the platform it was built for, such as "CUDA 12.8"
    capability: str  # the vector instructions that its kernels use
    threads: int  # how many it uses
    devices: tuple[tuple[str, int | None], ...]  # name and memory in bytes of each usable GPU
    problem: str  # torch's message on why no GPU is usable; empty if there was none


@dataclass(frozen=True)
class Environment:
    """Facts about this machine and the installed software; nothing here is a measured speed."""

    python: str
    system: str  # the operating system and the processor's architecture
    cpu: str
    vectors: tuple[str, ...]  # the processor's vector extensions
    threads: int  # hardware threads that this process may run on
    cores: float  # that this process can use; a fraction if a control group's quota says so
    quota: float | None  # the control group's limit in cores; None without one
    load: float | None  # average of the last minute; None if the system does not report it
    memory_bytes: int | None
    free_memory_bytes: int | None
    mygpt: str
    torch: Torch | None  # None if it cannot be imported
    torch_error: str  # why
    numba: str | None  # None if it is missing or cannot be used on this machine
    compiled: bool  # whether the decoding loop's machine code is in the cache
    cache: str  # its folder
    cache_writable: bool
    disk_free_bytes: int  # on the disk of `runs/`
    nvidia: bool  # whether an NVIDIA driver is loaded
    variables: dict[str, str]  # environment variables that affect speed or locations


def doctor(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN|CKPT",
            help="A run's folder or a checkpoint. Its files are checked too.",
            show_default=False,
        ),
    ] = None,
    probe: Annotated[
        bool,
        typer.Option("--probe/--no-probe", help="Measure the speed; takes up to five seconds."),
    ] = True,
    json: options.Json = False,
) -> int:
    """Show this machine's set-up and speed, and how to fix what is wrong.

    With a run or a checkpoint, all its files are read and checked; none is changed. The exit
    code is 2 if one is damaged, else 0.

    Example: mygpt doctor runs/poems
    """
    here = inspect_environment()
    findings = _check(path, here)  # before anything is printed, since the path may be wrong
    lines = list(advice(here))
    code = 2 if any(found.verdict == "damaged" for found in findings) else 0
    if json:
        values = {
            "environment": asdict(here),
            "probe": _measure(here) if probe else {},
            "advice": lines,
            "files": [{**asdict(found), "file": str(found.file)} for found in findings],
        }
        say(to_json(values, indent=2))
        return code
    for name, text in _lines(here):
        say(at_words(f"{name:<13}{text}", sys.stdout, 13))
    if probe and (measured := _measure(here)):
        speeds = ", ".join(f"{_UNITS[name]} {value:,.1f}" for name, value in measured.items())
        say(at_words(f"{'speed:':<13}{speeds}", sys.stdout, 13))
    say("\n" * bool(findings), end="")
    for found in findings:
        line = f"{found.file.name or found.file!s:<28}{found.verdict:<9}{found.text}"
        say(at_words(line, sys.stdout, 37))
        if found.remedy:
            say(at_words(f"{'':<37}{found.remedy}", sys.stdout, 37))
    say("\n" * bool(lines), end="")
    for line in lines:
        say(at_words(f"{'advice:':<13}{line}", sys.stdout, 13))
    if not lines and all(found.verdict == "ok" for found in findings):
        say("\nno problems found")
    return code


def inspect_environment(runs: Path = Path("runs")) -> Environment:
    """Collect the facts. Imports torch and changes nothing."""
    from mygpt import __version__, machine
    from mygpt.cpu.common.build import has_machine_code
    from mygpt.cpu.common.workers import usable_cores
    from mygpt.decode.choice import cpu_engine_available, may_have_gpu
    from mygpt.file_access import cache_folder

    # Read before torch is imported, since the import itself adds to the load.
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    available, quota = cpu_engine_available(), machine.cpu_quota()
    torch, problem = _inspect_torch()
    cache = _existing(cache_folder())
    return Environment(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        cpu=machine.cpu_name(),
        vectors=machine.vector_extensions(),
        threads=machine.available_cores(),
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
        cache_writable=cache.is_dir() and os.access(cache, os.W_OK | os.X_OK),
        disk_free_bytes=shutil.disk_usage(_existing(runs)).free,
        nvidia=sys.platform != "darwin" and may_have_gpu(),
        variables={
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)
        },
    )


def _inspect_torch() -> tuple[Torch | None, str]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch is missing
        return None, (str(error).splitlines() or [type(error).__name__])[0]
    build = "CPU"
    if torch.version.cuda or torch.version.hip:
        cuda = torch.version.cuda
        build = f"CUDA {cuda}" if cuda else f"ROCm {torch.version.hip}"
    devices: list[tuple[str, int | None]] = []
    with warnings.catch_warnings(record=True) as caught:  # torch warns if the driver is too old
        warnings.simplefilter("always")
        for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            device = torch.cuda.get_device_properties(number)
            devices.append((device.name, device.total_memory))
        if torch.backends.mps.is_available():
            devices.append(("MPS", None))
    problem = "" if devices or not caught else str(caught[0].message).splitlines()[0]
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return Torch(torch.__version__, build, capability, threads, tuple(devices), problem), ""


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if os.path.exists(place))


def _check(path: Path | None, here: Environment) -> list[Finding]:
    if path is None:
        return []
    if here.torch is None:
        raise InputError(
            f"{path} is not checked, because torch cannot be imported ({here.torch_error}): "
            "reinstall it"
        )
    from mygpt.training.checkup import check

    return check(path)


def _measure(here: Environment) -> dict[str, float]:
    """Speeds by the names of `_UNITS`, within five seconds."""
    from mygpt.machine import gemm_rate, memory_bandwidth

    if here.torch is None:
        return {}
    speeds = {
        "memory_gb_per_s": memory_bandwidth(budget_s=0.8),
        "float32_gflop_per_s": gemm_rate(budget_s=1.0),
    }
    if here.torch.devices and not here.torch.build.startswith("CPU"):
        speeds["cuda_bfloat16_gflop_per_s"] = gemm_rate("cuda", "bfloat16", budget_s=0.5)
    return speeds


def _lines(here: Environment) -> Iterator[tuple[str, str]]:
    """The facts, name and value."""
    yield "python:", f"{here.python} on {here.system}"
    yield "cpu:", f"{here.cpu} ({', '.join(here.vectors) or 'vector extensions unknown'})"
    load = "" if here.load is None else f"; load {here.load:.1f}"
    yield "cores:", f"{here.cores:g} usable, {here.threads} hardware threads{load}"
    if here.memory_bytes is not None and here.free_memory_bytes is not None:
        yield (
            "memory:",
            f"{bytes_text(here.memory_bytes)}, {bytes_text(here.free_memory_bytes)} free",
        )
    yield "mygpt:", here.mygpt
    if here.torch is None:
        yield "torch:", f"cannot be imported: {here.torch_error}"
    else:
        torch = here.torch
        parts = f"{torch.build} build, {torch.capability}, {torch.threads} threads"
        yield "torch:", f"{torch.version} ({parts})"
        for name, memory_bytes in torch.devices or (("only the CPU", None),):
            yield "device:", name if memory_bytes is None else f"{name}, {bytes_text(memory_bytes)}"
    loop = f"decoding loop {'compiled' if here.compiled else 'not compiled'}"
    yield "numba:", f"{here.numba}, {loop}" if here.numba else "not used on this machine"
    yield "cache:", f"{here.cache} ({'writable' if here.cache_writable else 'not writable'})"
    yield "disk:", f"{bytes_text(here.disk_free_bytes)} free where runs/ is"
    for number, (name, value) in enumerate(here.variables.items()):
        yield "" if number else "variables:", f"{name}={value}"


def advice(here: Environment) -> Iterator[str]:
    """One line for each problem, with its remedy."""
    if here.torch is None:
        yield f"torch cannot be imported ({here.torch_error}): reinstall it"
    else:
        yield from _torch_advice(here, here.torch)
    if here.numba is None:
        yield (
            "the NumPy engine is used instead of machine code, which needs Numba on a 64-bit "
            "POSIX system (on Windows: WSL): pip install numba"
        )
    elif not here.compiled and here.cache_writable:
        yield "the decoding loop is not compiled: run `mygpt warmup` once, it takes 15 seconds"
    elif not here.compiled:
        yield (
            f"{here.cache} is not writable, so each start compiles the decoding loop: set "
            "MYGPT_CACHE to a writable folder"
        )
    free = here.free_memory_bytes
    if free is not None and free < _LEAST_MEMORY_BYTES:
        yield f"{bytes_text(free)} of memory is free: close other programs, or use a smaller model"
    if here.disk_free_bytes < _LEAST_DISK_BYTES:
        yield (
            f"{bytes_text(here.disk_free_bytes)} of disk is free where runs/ is: delete files, or "
            "train with --output on another disk"
        )


def _torch_advice(here: Environment, torch: Torch) -> Iterator[str]:
    cores = max(1, math.ceil(here.cores))
    # On other systems the count includes hardware threads and slow cores; torch uses fewer.
    few = torch.threads < cores and here.system.startswith("Linux")
    # Two hardware threads on a core do no harm, more threads than a quota grants do.
    if few or torch.threads > (max(cores, here.threads) if here.quota is None else cores):
        yield (
            f"threads of torch: {torch.threads}, cores of this process: {cores}: "
            f"export OMP_NUM_THREADS={cores}"
        )
    if not here.nvidia or torch.devices:
        return
    if torch.build == "CPU":
        remedy = "install the CUDA build (https://pytorch.org/get-started/locally/)"
        yield f"there is an NVIDIA GPU, but torch is the CPU build: {remedy}"
    elif here.variables.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        yield "CUDA_VISIBLE_DEVICES hides the GPU: unset it"
    else:
        why = torch.problem or "check that nvidia-smi lists the GPU"
        yield f"torch cannot use the NVIDIA GPU: update its driver ({why})"


def warmup() -> None:
    """Compile the decoding loop and the training step now, so that their first use is fast.

    Once after installing or upgrading is enough. The machine code is kept in the user's cache
    folder, or in the folder that MYGPT_CACHE names.

    Example: mygpt warmup
    """
    from mygpt.decode.choice import cpu_engine_available
    from mygpt.errors import StorageError

    if not cpu_engine_available():
        raise InputError(
            "the machine-code engine needs Numba and a 64-bit POSIX system (on Windows: WSL): "
            "install numba"
        )
    from mygpt.cpu.common.build import (
        DECODING,
        TRAINING,
        compile_now,
        has_machine_code,
        unusable_cache,
    )
    from mygpt.file_access import cache_folder

    if (why := unusable_cache()) is not None:
        raise StorageError(f"machine code cannot be kept in the cache: {why}")
    for program in (DECODING, TRAINING):
        if has_machine_code(program):
            say(f"{program.purpose} is already compiled, in {cache_folder()}")
            continue
        say(f"compiling {program.purpose}: about {program.seconds} seconds", file=sys.stderr)
        began = time.monotonic()
        compile_now(program)
        seconds = time.monotonic() - began
        say(f"compiled {program.purpose} in {seconds:.1f} s, kept in {cache_folder()}")
