"""Facts about this machine: devices and number formats, memory, cores, and measured speeds."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mygpt.errors import InputError, OutOfMemoryError

if TYPE_CHECKING:
    import torch

QUANTIZED = ("int8", "int4")  # number formats of weights that the cpu engine alone has
DTYPES = ("auto", "float32", "bfloat16", "float16", *QUANTIZED)

# The instruction set extensions that matrix products use.
_VECTOR_EXTENSIONS = (
    "sse4_2", "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16",
    "amx_bf16", "amx_int8", "asimd", "asimddp", "sve", "sve2", "i8mm",
)  # fmt: skip
_LOADED = time.monotonic()
_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


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

    "auto" is bfloat16 on a CUDA device that supports it in hardware, else float32.

    Raises:
        InputError: for a format that is not one of `DTYPES`, or not torch's.
    """
    import torch

    if name not in DTYPES:
        raise InputError(f"dtype={name!r} is not known: choose {', '.join(DTYPES)}")
    if name in QUANTIZED:
        raise InputError(
            f"dtype={name} works only with the cpu engine: use --engine cpu, or float32"
        )
    if name == "auto":
        # Older GPUs emulate bfloat16, which is slower than float32.
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if native else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def free_memory_bytes() -> int | None:
    """Main memory in bytes that a program can still allocate; None if that is unknown.

    The smaller of the system's available memory and what the limits of this process's control
    groups leave.
    """
    found = (_meminfo("MemAvailable"), *(left for _, left in _control_groups()))
    return min((size for size in found if size is not None), default=None)


def require_memory(name: object, needed: int) -> None:
    """Raise `OutOfMemoryError` if the file or folder `name` needs more memory than is free."""
    free = free_memory_bytes()
    if free is not None and needed > free:
        raise OutOfMemoryError(
            f"{name} needs {needed:,} bytes, and only {free:,} bytes of memory are free: close "
            "other programs, or use a machine with more memory"
        )


def bytes_text(count: float) -> str:
    """A size with its unit, rounded down, so that what is named as fitting fits."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{math.floor(10 * count / scale) / 10:,.1f} {unit}"
    return f"{math.floor(count)} bytes"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = round(min(seconds, 1e12))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def total_memory_bytes() -> int | None:
    """Main memory of this machine in bytes, or this process's control group's limit if smaller."""
    found = (_meminfo("MemTotal"), *(limit for limit, _ in _control_groups()))
    return min((size for size in found if size is not None), default=None)


def available_cores() -> int:
    """The number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(proc: Path = _PROC, root: Path = _GROUPS) -> float | None:
    """The CPU limit of this process's control groups, in cores; None if there is no limit."""
    quotas: list[float] = []
    for version, folder in _group_folders("cpu", proc, root):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        found = _numbers_in(folder, names)
        if found and min(found) > 0:
            quotas.append(found[0] / found[1])
    return min(quotas, default=None)


def cpu_name(cpuinfo: Path = _PROC / "cpuinfo") -> str:
    """The processor's model name, or its architecture if the system does not report the name."""
    import platform

    name = _cpuinfo(cpuinfo).get("model name")
    if name is None and sys.platform == "darwin":
        import subprocess

        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        name = done.stdout.strip()
    return name or platform.processor() or platform.machine() or "unknown"


def vector_extensions(cpuinfo: Path = _PROC / "cpuinfo") -> tuple[str, ...]:
    """The processor's vector and matrix extensions, by Linux's names; empty if unknown."""
    facts = _cpuinfo(cpuinfo)
    has = set(facts.get("flags", facts.get("Features", "")).split())
    return tuple(name for name in _VECTOR_EXTENSIONS if name in has)


def memory_bandwidth(budget_s: float = 1.0) -> float:
    """Measure the bandwidth of reading main memory in GB/s (10^9 bytes) with all torch threads.

    The median over repeated sums of one float32 array that is larger than any cache: 512 MiB, or
    a quarter of the free memory.

    Args:
        budget_s: seconds of repeating; at least three repeats are made, however long they take.
    """
    import torch

    free = free_memory_bytes()
    size = 2**29 if free is None else min(2**29, max(2**20, free // 4))
    array = torch.ones(size // 4)  # written, so that every page is backed by physical memory
    return 4 * len(array) / _median_s(array.sum, budget_s) / 1e9


def gemm_rate(device: str = "cpu", dtype: str = "float32", budget_s: float = 1.0) -> float:
    """Measure torch's matrix products in GFLOP/s (10^9 floating-point operations a second).

    The median over repeated products of two square matrices. Their size is the largest power of
    two, up to 2048 on a CPU and 8192 elsewhere, of which about five products fit in the budget.

    Args:
        device: "cpu", "cuda" or "cuda:<number>".
        dtype: torch's name of a number format.
        budget_s: seconds of repeating; at least three repeats are made, however long they take.
    """
    import torch

    where = torch.device(device)
    generator = torch.Generator(where).manual_seed(0)  # leaves torch's global generator unchanged

    def product(size: int) -> Callable[[], None]:
        one, other = (
            torch.rand(size, size, generator=generator, device=where).to(getattr(torch, dtype))
            for _ in range(2)
        )

        def multiply() -> None:
            torch.mm(one, other)
            if where.type == "cuda":
                torch.cuda.synchronize(where)

        return multiply

    size, largest = 256, 2048 if where.type == "cpu" else 8192
    multiply = product(size)
    multiply()  # the first product loads libraries
    while size < largest and 8 * _seconds(multiply) < budget_s / 5:
        size *= 2
        multiply = product(size)
    return 2 * size**3 / _median_s(multiply, budget_s) / 1e9


def _median_s(action: Callable[[], object], budget_s: float) -> float:
    """The median time of an action in seconds, after one call that is not measured."""
    import statistics

    action()
    ends = time.perf_counter() + budget_s
    times: list[float] = []
    while len(times) < 3 or (time.perf_counter() < ends and len(times) < 100):
        times.append(_seconds(action))
    return statistics.median(times)


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return max(1e-9, time.perf_counter() - began)


def _meminfo(field: str) -> int | None:
    try:
        lines = (_PROC / "meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        try:  # not Linux: use the total memory instead of the free memory
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return None
    kib = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), None)
    return None if kib is None else 1024 * int(kib)


def _cpuinfo(path: Path) -> dict[str, str]:
    """The entries of /proc/cpuinfo for the first processor."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.strip().split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _control_groups(proc: Path = _PROC, root: Path = _GROUPS) -> list[tuple[int, int]]:
    """The limit and the free memory, in bytes, of each control group of this process."""
    found: list[tuple[int, int]] = []
    for version, folder in _group_folders("memory", proc, root):
        names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
        numbers = _numbers_in(folder, [f"memory.{name}" for name in names])
        if numbers is not None:
            limit, used = numbers
            found.append((limit, max(0, limit - max(0, used - _page_cache_bytes(folder)))))
    return found


def _numbers_in(folder: Path, names: Sequence[str]) -> list[int] | None:
    """The two numbers in some files; None if there is no limit."""
    try:
        words = " ".join((folder / name).read_text(encoding="ascii") for name in names).split()
        one, other = map(int, words)
    except (OSError, ValueError):  # the file does not exist, or it contains "max"
        return None
    return [one, other]


def _page_cache_bytes(group: Path) -> int:
    """Bytes of a group's page cache: counted as used, but freed when programs need memory."""
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        facts = {name: int(value) for name, value in map(str.split, lines)}
    except (OSError, ValueError):
        return 0
    # In version 1 the fields without "total_" do not include the groups below this one.
    lists = ("inactive_file", "active_file")
    return sum(facts.get(f"total_{name}", facts.get(name, 0)) for name in lists)


def _group_folders(controller: str, proc: Path, root: Path) -> Iterator[tuple[int, Path]]:
    """The control groups of this process (version 1 or 2), with folders, innermost first."""
    try:
        groups = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers == "":
            version, base = 2, root
        elif controller in controllers.split(","):
            version, base = 1, root / controller
        else:
            continue
        here = base / path.strip("/")
        for folder in (here, *here.parents):
            if not folder.is_relative_to(base):
                break
            yield version, folder


def process_age_s() -> float:
    """Seconds since this process started; without /proc, since this module was imported."""
    try:
        with open("/proc/self/stat", encoding="ascii") as stat, open("/proc/uptime") as uptime:
            began = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
            return max(0.0, float(uptime.read().split()[0]) - began)
    except (OSError, ValueError, IndexError):
        return time.monotonic() - _LOADED
