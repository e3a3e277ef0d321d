"""Step time and peak memory of every precision policy, eager, on a GPT and on an MLP of 12 M parameters."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.memory import peak
from benchmarks.peers import POLICIES
from benchmarks.training import Say, spread, start
from benchmarks.worker import Failure

WORKLOADS = ("mid", "gpt")


def run(settings: Any, say: Say) -> dict[str, Any]:
    """Return `{workload: {policy: {"us", "ratio", "peak", "grown"}}, "failed": {...}}`; ratios are to policy 32."""
    names = [f"policy-{policy}" for policy in POLICIES]
    workers, failed = start(names, say)
    results: dict[str, Any] = {"failed": failed}
    try:
        for workload in WORKLOADS:
            results[workload] = _timed(workers, workload, settings, failed)
    finally:
        for worker in workers.values():
            worker.close()
    for workload in WORKLOADS:
        for policy, values in results[workload].items():
            try:
                values |= peak(f"policy-{policy}", workload, {})
            except Failure as failure:
                failed[policy] = str(failure)
        say(f"policies on {workload}: " + ", ".join(f"{p} {v['ratio'][0]:.2f}" for p, v in results[workload].items()))
    return results


def _timed(workers: dict[str, Any], workload: str, settings: Any, failed: dict[str, str]) -> dict[str, Any]:
    each: dict[str, list[float]] = {}
    losses: dict[str, float] = {}
    for name, worker in list(workers.items()):
        try:
            worker.ask("build", workload)
            worker.answer()
            losses[name] = worker.run(3)["loss"]
            each[name] = []
        except Failure as failure:
            failed[name.removeprefix("policy-")] = str(failure)
            workers.pop(name).close()
    for _ in range(settings.policy_rounds):
        for name in each:
            steps = settings.policy_steps
            each[name].append(workers[name].run(steps)["wall"] / steps * 1e6)
    for name in each:
        workers[name].ask("end")
        workers[name].answer()
    base = each.get("policy-32", [])
    return {
        name.removeprefix("policy-"): {
            "us": statistics.median(times),
            "ratio": spread([t / b for t, b in zip(times, base, strict=True)]),
            "loss": losses[name],
        }
        for name, times in each.items()
    }
