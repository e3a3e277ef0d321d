"""What of the machine this process may really use: CPUs and memory within the limits of its cgroup.

Owns the reading of `proc` and of cgroups (v2 and v1). Defaults of workers and of threads come from here, and what is
known of free memory.
"""

from __future__ import annotations

import math
import os
from pathlib import Path


def available_cpus(*, root: str | Path = "/") -> int:
    """Return the number of CPUs this process can keep busy, 1 or more.

    It is the least of the affinity mask, the CPU quota of the cgroup (v2 or v1, and of the cgroups it lies in) and
    `os.cpu_count()`; what cannot be read does not count.

    Args:
        root: where `proc` and `sys` are looked for.

    Examples:
        >>> available_cpus() >= 1
        True
    """
    counts = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    counts.extend(max(1, math.ceil(quota)) for quota in _quotas(Path(root)))
    return max(1, min(counts))


def available_memory(*, root: str | Path = "/") -> int | None:
    """Return how many bytes of memory this process can still take; None where the system does not say.

    It is the least of what the system calls available and of what the cgroups it lies in (v2 or v1) leave.

    Args:
        root: where `proc` and `sys` are looked for.
    """
    root = Path(root)
    system = [line.split()[1] for line in _read(root / "proc/meminfo").splitlines() if line.startswith("MemAvailable:")]
    free = [int(kilobytes) * 1024 for kilobytes in system]
    for folder, unified in _cgroups(root, "memory"):
        names = ("memory.max", "memory.current") if unified else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (_read(folder / name).strip() for name in names)
        if limit.isdigit() and used.isdigit():
            free.append(max(0, int(limit) - int(used)))
    return min(free, default=None)


def _cgroups(root: Path, controller: str) -> list[tuple[Path, bool]]:
    """The folders of this process's cgroup and of those it lies in, and whether they are of version 2."""
    folders = []
    base = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        unified = controllers == ""
        if not unified and controller not in controllers.split(","):
            continue
        mounts = [base] if unified else dict.fromkeys([base / controllers, base / controller])
        inner = Path(path.lstrip("/"))
        folders += [(mount / folder, unified) for mount in mounts for folder in (inner, *inner.parents)]
    return folders


def _quotas(root: Path) -> list[float]:
    """CPU quotas, in CPUs, of this process's cgroup and of those it lies in."""
    quotas = [_unified_quota(f) if unified else _legacy_quota(f) for f, unified in _cgroups(root, "cpu")]
    return [quota for quota in quotas if quota is not None]


def _unified_quota(folder: Path) -> float | None:
    words = _read(folder / "cpu.max").split()
    return _ratio(words[0], words[1]) if len(words) == 2 else None


def _legacy_quota(folder: Path) -> float | None:
    return _ratio(_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip())


def _ratio(quota: str, period: str) -> float | None:
    # "max" (v2) and -1 (v1) mean no limit.
    if not (quota.isdigit() and period.isdigit()) or int(quota) == 0 or int(period) == 0:
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
