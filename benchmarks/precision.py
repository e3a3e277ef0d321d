"""Step time and peak memory of every precision policy, eager, on a GPT and on an MLP of 12 M parameters."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.training import Say, spread, start
from benchmarks.worker import Failure


def run(settings: Any, say: Say) -> dict[str, Any]:
    """Return `{workload: {policy: {"us", "ratio", "peak", "grown"}}, "failed": {...}}`; ratios are to policy 32."""
    workers, failed = start([f"policy-{policy}" for policy in settings.policies], say)
    results: dict[str, Any] = {"failed": failed}
    try:
        for workload in settings.policy_workloads:
            found = results[workload] = _timed(workers, workload, settings, failed)
            say(f"policies on {workload}: " + ", ".join(f"{p} {v['ratio'][0]:.2f}" for p, v in found.items()))
    finally:
        for worker in workers.values():
            worker.close()
    return results


def _timed(workers: dict[str, Any], workload: str, settings: Any, failed: dict[str, str]) -> dict[str, Any]:
    each: dict[str, list[float]] = {}
    losses: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for name, worker in list(workers.items()):
        try:
            worker.ask("build", workload)
            worker.answer()
            losses[name] = worker.run(2)["loss"]
            each[name], peaks[name] = [], 0.0
        except Failure as failure:
            failed[name.removeprefix("policy-")] = str(failure)
            workers.pop(name).close()
    for _ in range(settings.policy_rounds):
        for name in each:
            steps = settings.policy_steps
            reply = workers[name].run(steps)
            each[name].append(reply["wall"] / steps * 1e6)
            peaks[name] = max(peaks[name], reply["peak"])
    for name in each:
        workers[name].ask("end")
        workers[name].answer()
    base = each.get("policy-32", [])
    return {
        name.removeprefix("policy-"): {
            "us": statistics.median(times),
            "ratio": spread([t / b for t, b in zip(times, base, strict=True)]),
            "loss": losses[name],
            "peak": peaks[name],
            "grown": peaks[name] - workers[name].loaded,
        }
        for name, times in each.items()
    }
