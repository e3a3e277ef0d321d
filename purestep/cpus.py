"""How many CPUs this process may really use: its affinity mask and its cgroup's quota, not what the machine has.

Owns `available_cpus`. Defaults of workers and of threads come from here.
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

    Example:
        >>> available_cpus() >= 1
        True
    """
    counts = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    counts.extend(max(1, math.ceil(quota)) for quota in _quotas(Path(root)))
    return max(1, min(counts))


def _quotas(root: Path) -> list[float]:
    """CPU quotas, in CPUs, of this process's cgroup and of those it lies in."""
    found = []
    base = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        unified = controllers == ""
        if not unified and "cpu" not in controllers.split(","):
            continue
        mounts = [base] if unified else [base / controllers, base / "cpu"]
        inner = Path(path.lstrip("/"))
        for mount in mounts:
            for folder in (inner, *inner.parents):
                quota = _unified_quota(mount / folder) if unified else _legacy_quota(mount / folder)
                if quota is not None:
                    found.append(quota)
    return found


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
