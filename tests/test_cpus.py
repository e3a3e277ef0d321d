"""Memory, affinity, quotas of cgroups v1 and v2, and an unknown CPU count all bound what is available."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from purestep._cpus import available_memory
from purestep.data import available_cpus, batches


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)

    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return tmp_path, write


def test_affinity_bounds_the_count(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    root, _ = machine
    assert available_cpus(root=root) == 12
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cpus(root=root) == 16


def test_an_unknown_count_is_one(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    root, _ = machine
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cpus(root=root) == 1


@pytest.mark.parametrize(
    ("quota", "cpus"), [("max 100000", 12), ("350000 100000", 4), ("20000 100000", 1), ("junk", 12)]
)
def test_cgroup_v2(machine, quota: str, cpus: int) -> None:
    root, write = machine
    write("proc/self/cgroup", "0::/pod/app\n")
    write("sys/fs/cgroup/pod/app/cpu.max", quota + "\n")
    assert available_cpus(root=root) == cpus


def test_an_outer_cgroup_counts_too(machine) -> None:
    root, write = machine
    write("proc/self/cgroup", "0::/pod/app\n")
    write("sys/fs/cgroup/pod/cpu.max", "200000 100000\n")
    write("sys/fs/cgroup/pod/app/cpu.max", "max 100000\n")
    assert available_cpus(root=root) == 2


@pytest.mark.parametrize(("quota", "cpus"), [("-1", 12), ("300000", 3)])
@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_cgroup_v1(machine, quota: str, cpus: int, mount: str) -> None:
    root, write = machine
    write("proc/self/cgroup", "5:memory:/x\n4:cpu,cpuacct:/docker/abc\n")
    write(f"sys/fs/cgroup/{mount}/cpu.cfs_quota_us", quota)
    write(f"sys/fs/cgroup/{mount}/cpu.cfs_period_us", "100000")
    assert available_cpus(root=root) == cpus


def test_auto_leaves_one_cpu_to_the_run(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, workers in ((12, 11), (1, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cpus: set(range(n)), raising=False)
        assert batches([1, 2], 1, num_workers="auto")._pool_options().workers <= workers


def test_memory_is_what_the_tightest_cgroup_leaves(machine) -> None:
    root, write = machine
    assert available_memory(root=root) is None
    write("proc/meminfo", "MemTotal: 100 kB\nMemAvailable:    50 kB\n")
    assert available_memory(root=root) == 50 * 1024
    write("proc/self/cgroup", "0::/pod/app\n")
    write("sys/fs/cgroup/pod/memory.max", "30000\n")
    write("sys/fs/cgroup/pod/memory.current", "10000\n")
    write("sys/fs/cgroup/pod/app/memory.max", "max\n")
    write("sys/fs/cgroup/pod/app/memory.current", "5000\n")
    assert available_memory(root=root) == 20000
    write("sys/fs/cgroup/pod/memory.current", "40000\n")
    assert available_memory(root=root) == 0


def test_memory_of_a_legacy_cgroup(machine) -> None:
    root, write = machine
    write("proc/meminfo", "MemAvailable:    50 kB\n")
    write("proc/self/cgroup", "5:memory:/job\n4:cpu,cpuacct:/job\n")
    write("sys/fs/cgroup/memory/job/memory.limit_in_bytes", "30000\n")
    write("sys/fs/cgroup/memory/job/memory.usage_in_bytes", "10000\n")
    assert available_memory(root=root) == 20000
