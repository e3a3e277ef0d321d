"""Peak resident memory while training 50 M parameters, each trainer in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.training import Say
from benchmarks.worker import Failure, Worker


def run(settings: Any, say: Say) -> dict[str, Any]:
    """Return `{"peers": {name: {"loaded", "peak", "grown"}}, "failed": {...}}`, in MB.

    `peak` is the largest resident memory of the process in some steps after the first ones, `grown` that without what
    the process held when it had only imported its libraries.
    """
    found: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for at in range(0, len(settings.memory), 2):
        _measure(settings.memory[at : at + 2], {"TORCHINDUCTOR_CACHE_DIR": str(settings.cache)}, found, failed)
    say("peak memory: " + ", ".join(f"{name} {values['peak']:.0f} MB" for name, values in found.items()))
    return {"peers": found, "failed": failed}


# Steps, so that a peak is that of training and not of the first call.
_STAGES: tuple[tuple[Any, ...], ...] = (("load",), ("build", "wide"), ("run", 3), ("run", 4))


def _measure(
    names: Sequence[str], environment: dict[str, str], found: dict[str, dict[str, float]], failed: dict[str, str]
) -> None:
    """Train a little in new processes, side by side: how much memory they need does not depend on each other."""
    workers = {name: Worker(name, environment) for name in names}
    replies: dict[str, list[Any]] = {name: [] for name in names}
    try:
        for stage in _STAGES:
            going = [name for name in names if name not in failed]
            for name in going:
                workers[name].ask(*stage)
            for name in going:
                try:
                    replies[name].append(workers[name].answer())
                except Failure as failure:
                    failed[name] = str(failure)
        for name in [name for name in names if name not in failed]:
            loaded, peak = replies[name][0]["memory"], replies[name][-1]["peak"]
            found[name] = {"loaded": loaded, "peak": peak, "grown": peak - loaded, "wall": replies[name][-1]["wall"]}
    finally:
        for worker in workers.values():
            worker.close()
