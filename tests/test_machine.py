"""What the machine is said to have, from files as Linux writes them, and how fast it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mygpt import machine

GIB = 2**30


class Fake:
    """A system's folders: /proc and /sys/fs/cgroup."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.root = folder / "proc", folder / "groups"

    def write(self, **files: object) -> None:
        """Write `groups` to /proc/self/cgroup, and each other file to its place below the root."""
        (self.proc / "self").mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            path = self.proc / "self/cgroup" if name == "groups" else self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    def limits(self) -> list[tuple[int, int]]:
        return machine._control_groups(self.proc, self.root)

    def quota(self) -> float | None:
        return machine.cpu_quota(self.proc, self.root)


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


MEMORY = {
    "version 2: a group without a limit of its own has those of the groups around it": (
        "0::/user/job",
        {
            "user/job/memory.max": "max",
            "user/job/memory.current": 5,
            "user/memory.max": 8 * GIB,
            "user/memory.current": 3 * GIB,
            "memory.max": 6 * GIB,
            "memory.current": 7 * GIB,
        },
        [(8 * GIB, 5 * GIB), (6 * GIB, 0)],
    ),
    "version 1: those of the memory controller": (
        "5:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/job",
        {
            "memory/job/memory.limit_in_bytes": 4 * GIB,
            "memory/job/memory.usage_in_bytes": GIB,
            "memory/memory.limit_in_bytes": 2**63 - 4096,
            "memory/memory.usage_in_bytes": 9 * GIB,
            "cpu/job/memory.limit_in_bytes": 1,
            "cpu/job/memory.usage_in_bytes": 1,
        },
        [(4 * GIB, 3 * GIB), (2**63 - 4096, 2**63 - 4096 - 9 * GIB)],
    ),
    "in a container the path is the host's, and what is mounted here is that group": (
        "4:memory:/docker/0123",
        {"memory/memory.limit_in_bytes": 2 * GIB, "memory/memory.usage_in_bytes": GIB},
        [(2 * GIB, GIB)],
    ),
    "no group": ("0::/gone", {"memory.max": "nonsense", "memory.current": "1"}, []),
}


@pytest.mark.parametrize("case", MEMORY)
def test_memory_limits_are_those_of_the_control_groups(fake: Fake, case: str) -> None:
    assert fake.limits() == []
    groups, files, limits = MEMORY[case]
    fake.write(groups=groups, **files)
    assert fake.limits() == limits


@pytest.mark.parametrize("fields", ["inactive_file {}\nactive_file {}\nanon 7", None])
def test_files_kept_in_memory_for_speed_count_as_free(fake: Fake, fields: str | None) -> None:
    """After a large text was read, a group's usage is nearly its limit; nothing is lacking."""
    fake.write(
        groups="0::/", **{"memory.max": 8 * GIB, "memory.current": 7 * GIB}
    )  # fmt: skip
    assert fake.limits() == [(8 * GIB, GIB)]
    if fields is None:  # version 1 has separate fields for sums over all groups below
        fields = "inactive_file 1\nactive_file 1\ntotal_inactive_file {}\ntotal_active_file {}"
    fake.write(**{"memory.stat": fields.format(4 * GIB, 2 * GIB)})
    assert fake.limits() == [(8 * GIB, 7 * GIB)]


def test_the_quota_of_cores_is_the_tightest(fake: Fake) -> None:
    assert fake.quota() is None
    for group, files, quota in (
        ("0::/a", {"a/cpu.max": "max 100000"}, None),
        ("0::/a", {"a/cpu.max": "400000 100000", "cpu.max": "150000 100000"}, 1.5),
        ("2:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": -1}, None),
        ("2:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": 250_000}, 2.5),
    ):
        fake.write(groups=group, **{"cpu/a/cpu.cfs_period_us": 100_000}, **files)
        assert fake.quota() == quota


def test_memory_is_what_the_group_leaves_where_that_is_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has = {"MemTotal": 16 * GIB, "MemAvailable": 10 * GIB}
    monkeypatch.setattr(machine, "_meminfo", has.get)
    for limits, total, free in (
        ([], 16, 10),
        ([(8 * GIB, 3 * GIB), (12 * GIB, 1 * GIB)], 8, 1),
        ([(64 * GIB, 60 * GIB)], 16, 10),
    ):
        monkeypatch.setattr(machine, "_control_groups", lambda limits=limits: limits)
        assert machine.total_memory_bytes() == total * GIB
        assert machine.free_memory_bytes() == free * GIB


def test_this_machines_memory_is_plausible() -> None:
    total, free = machine.total_memory_bytes(), machine.free_memory_bytes()
    assert total is not None
    assert free is not None
    assert 2**27 < free <= total < 2**46


def test_the_processor_by_its_name(tmp_path: Path) -> None:
    intel, arm = tmp_path / "intel", tmp_path / "arm"
    intel.write_text(
        "processor\t: 0\nmodel name\t: A CPU @ 2 GHz\nflags\t\t: fpu avx2 avx fma avx512f_not\n\n"
        "processor\t: 1\nmodel name\t: Another\nflags\t\t: amx_bf16\n"
    )
    arm.write_text("processor\t: 0\nFeatures\t: fp asimd sve2 i8mm\nCPU part\t: 0xd40\n\n")
    assert machine.cpu_name(intel) == "A CPU @ 2 GHz"
    assert machine.vector_extensions(intel) == ("avx", "avx2", "fma")
    assert machine.vector_extensions(arm) == ("asimd", "sve2", "i8mm")
    assert machine.cpu_name(arm)
    assert machine.vector_extensions(tmp_path / "nothing") == ()


def test_speeds_are_plausible_and_draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a tenth of any machine that runs torch to ten times the largest."""
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 2**28)  # a small array
    generator = torch.get_rng_state()
    assert 0.1 < machine.memory_bandwidth(budget_s=0.05) < 1e5
    assert 0.01 < machine.gemm_rate(budget_s=0.05) < 1e6
    assert 0.01 < machine.gemm_rate("cpu", "bfloat16", budget_s=0.01) < 1e6
    assert torch.equal(torch.get_rng_state(), generator)


class Clock:
    """Time that only passes when an action takes it."""

    def __init__(self, *durations: float) -> None:
        self.now, self.durations = 0.0, list(durations)

    def act(self) -> None:
        self.now += self.durations.pop(0)


def test_a_speed_is_the_median_and_the_first_try_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(100.0, 1.0, 9.0, 2.0, 50.0)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock.now)
    assert machine._median_s(clock.act, budget_s=4.0) == 2.0
    assert clock.durations == [50.0], "three repeats, though the budget was spent after two"
    clock = Clock(*[0.5] * 10)
    machine._median_s(clock.act, budget_s=4.0)
    assert clock.durations == [0.5], "one that does not count, and eight in four seconds"


@pytest.mark.parametrize(("rate", "rows"), [(1e6, 256), (4e8, 256), (1e9, 512), (1e15, 2048)])
def test_a_slow_machine_multiplies_smaller_matrices(
    monkeypatch: pytest.MonkeyPatch, rate: float, rows: int
) -> None:
    """The rate is found whatever the size; a size is only taken when five products fit."""
    clock, sizes = Clock(), []

    def multiply(one: torch.Tensor, other: torch.Tensor) -> None:
        sizes.append(len(one))
        clock.now += 2 * len(one) ** 3 / rate

    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(torch, "mm", multiply)
    assert machine.gemm_rate(budget_s=2.0) == pytest.approx(rate / 1e9, rel=0.01)
    assert sizes[-1] == rows


def test_sizes_are_rounded_down_to_one_digit() -> None:
    sizes = (0, 999, 1000, 26.95e9, 2e15)
    texts = ["0 bytes", "999 bytes", "1.0 kB", "26.9 GB", "2,000.0 TB"]
    assert [machine.bytes_text(size) for size in sizes] == texts
