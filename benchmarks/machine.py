"""Where numbers come from: CPU, cores, memory, system, versions, and how busy the machine was."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = "torch torchao lightning accelerate jax jaxlib flax optax numpy orbax-checkpoint purestep".split()


def describe() -> dict[str, Any]:
    """Return the description that goes into the results."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "compiler": _compiler(),
        "versions": _versions(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": 1,
    }


def slug(cpu: str) -> str:
    """Return a short name of a processor for the name of a file.

    Example:
        >>> slug("AMD EPYC (family 25, model 17; avx2)"), slug("Intel(R) Xeon(R) CPU @ 2.60GHz (family 6, model 85; )")
        ('amd-epyc-25-17', 'intel-xeon-6-85')
    """
    words = re.findall(r"[a-z]{3,}", cpu.partition("(family")[0].partition("@")[0].lower())
    named = [word for word in words if word not in ("cpu", "processor")][:2]
    numbers = re.search(r"family (\d+), model (\d+)", cpu)
    return "-".join([*named, *(numbers.groups() if numbers else ())])


def _cpu() -> str:
    with contextlib.suppress(OSError):
        fields: dict[str, str] = {}
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
        flags = fields.get("flags", "").split()
        wide = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
        family = f"family {fields.get('cpu family')}, model {fields.get('model')}"
        return f"{fields.get('model name', platform.processor())} ({family}; {', '.join(wide)})"
    return platform.processor() or platform.machine()


def _memory() -> float:
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return 0.0


def _compiler() -> str:
    with contextlib.suppress(OSError, IndexError, subprocess.SubprocessError):
        done = subprocess.run([os.environ.get("CXX", "g++"), "--version"], capture_output=True, text=True, timeout=10)
        return done.stdout.splitlines()[0]
    return "none"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
