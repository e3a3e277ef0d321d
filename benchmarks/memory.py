"""Peak resident memory while training 50 M parameters, each trainer alone in a process of its own."""

from __future__ import annotations

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
    for name in settings.memory:
        try:
            found[name] = peak(name, "wide", {"TORCHINDUCTOR_CACHE_DIR": str(settings.cache)})
        except Failure as failure:
            failed[name] = str(failure)
    say("peak memory: " + ", ".join(f"{name} {values['peak']:.0f} MB" for name, values in found.items()))
    return {"peers": found, "failed": failed}


def peak(name: str, workload: str, environment: dict[str, str]) -> dict[str, float]:
    """Train a little in a new process, and return what it needed.

    Raises:
        Failure: the peer cannot be imported, built or run.
    """
    worker = Worker(name, environment)
    try:
        worker.ask("load")
        loaded = worker.answer()["memory"]
        worker.ask("build", workload)
        worker.answer()
        worker.run(3)
        reply = worker.run(4)
        return {"loaded": loaded, "peak": reply["peak"], "grown": reply["peak"] - loaded, "wall": reply["wall"]}
    finally:
        worker.close()
