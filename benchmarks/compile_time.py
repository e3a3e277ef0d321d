"""Seconds of the first step: cold (an empty compiler cache) and warm (a new process, the cache of the cold one).

Every measurement has a process of its own, which has imported torch but none of its compiler; the clock runs from the
first call of the step to its loss. CPU seconds, compilers included, are less noisy and are kept too.
"""

from __future__ import annotations

import tempfile
from typing import Any

from benchmarks.training import Say
from benchmarks.worker import Failure, Worker

PEERS = ("compile-all", "ps-donate", "jax")


def run(settings: Any, say: Say) -> dict[str, Any]:
    """Return `{workload: {"seconds": {peer: {"cold": [...], "warm": [...], "cold_cpu": [...], ...}}, "failed"}}`."""
    results: dict[str, Any] = {}
    for workload, rounds in settings.compile_rounds.items():
        kinds = ("cold", "warm", "cold_cpu", "warm_cpu")
        found: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in kinds} for name in PEERS}
        failed: dict[str, str] = {}
        for _ in range(rounds):
            for name in PEERS:
                try:
                    with tempfile.TemporaryDirectory(prefix="purestep-bench-") as cache:
                        for kind in ("cold", "warm"):
                            reply = _first_step(name, workload, cache)
                            found[name][kind].append(reply["wall"])
                            found[name][f"{kind}_cpu"].append(reply["cpu"])
                except Failure as failure:
                    failed[name] = str(failure)
        results[workload] = {"seconds": found, "failed": failed}
        shown = (f"{n} {min(s['cold']):.1f} / {min(s['warm']):.1f} s" for n, s in found.items() if s["warm"])
        say(f"first step of {workload}, cold / warm: " + ", ".join(shown))
    return results


def _first_step(name: str, workload: str, cache: str) -> dict[str, float]:
    worker = Worker(name, {"TORCHINDUCTOR_CACHE_DIR": cache})
    try:
        worker.ask("load")
        worker.answer()
        worker.ask("build", workload)
        worker.answer()
        return worker.run(1)
    finally:
        worker.close()
