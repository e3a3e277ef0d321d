"""`device_stats`: memory of the device and of the process, and how busy the process is."""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from purestep.arguments import Name, checked
from purestep.callbacks.base import Reducer
from purestep.errors import ConfigError
from purestep.loop.cadence import Every, every
from purestep.loop.events import Event, LoopState
from purestep.loop.input import device_of
from purestep.loop.roles import Moments, Observer, Recurring

_STATM = Path("/proc/self/statm")


@dataclasses.dataclass(frozen=True)
class DeviceStats(Recurring, Reducer, Observer):
    """See `device_stats`."""

    every: Every
    name: str

    def identity(self) -> None:
        """Return None: it only looks at the machine."""

    def open_sink(self, run_dir: Path | None, length: int | None) -> _Stats:
        return _Stats(self, length)


class _Stats:
    """Reads the counters of the process and of the device when a row is due."""

    def __init__(self, settings: DeviceStats, length: int | None) -> None:
        self._name, self._moments = settings.name, Moments(settings.every, length)
        self._cpu, self._time = _cpu_seconds(), time.monotonic()

    def receive(self, event: Event, loop: LoopState) -> Mapping[str, float] | None:
        if not self._moments.due(event, loop):
            return None
        row = {**self._process(), **_device(device_of(loop.train))}
        return {f"{self._name}/{what}": float(value) for what, value in row.items()}

    def _process(self) -> dict[str, float]:
        cpu, now = _cpu_seconds(), time.monotonic()
        busy = (cpu - self._cpu) / max(now - self._time, 1e-9)
        self._cpu, self._time = cpu, now
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        row = {"cpus_busy": busy, "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
        if _STATM.exists():
            row["process_bytes"] = int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return row

    def close(self) -> None:
        """Nothing is held open."""


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _device(device: torch.device) -> dict[str, int]:
    if device.type not in ("cuda", "xpu"):
        return {}
    stats = torch.get_device_module(device).memory_stats(device)
    return {
        "allocated_bytes": stats["allocated_bytes.all.current"],
        "peak_bytes": stats["allocated_bytes.all.peak"],
        "reserved_bytes": stats["reserved_bytes.all.current"],
        "retries": stats.get("num_alloc_retries", 0),
    }


@checked(ConfigError)
def device_stats(*, every: Every = every.steps(50), name: Name = "device") -> DeviceStats:  # noqa: B008
    """Log what the run takes of its machine: `device/process_bytes`, `device/cpus_busy`, `device/allocated_bytes`, ...

    Rows go to the loggers and into no state. They are of the process of rank 0. The allocator's counters of CUDA and
    XPU are read on the host, which does not wait for the device; `retries` counts how often memory had to be freed
    first.

    Args:
        every: when.
        name: of the callback, and prefix of the rows.

    Reference: `lightning.pytorch.callbacks.DeviceStatsMonitor`.
    """
    return DeviceStats(every, name)
