"""Time of a step: all peers on one workload, each in its process, in turns.

First all peers take the same few steps from the same weights and their losses are compared; one that computes something
else is not timed. Then every round asks each peer once, in another order each time, so that noise hits all alike. It is
done with several sets of processes, because two processes that do the same differ.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.worker import Failure, Worker
from benchmarks.workloads import ALL

CHECK_STEPS = 10
# Losses after CHECK_STEPS, relative. Peers round differently, and Adam divides small gradients by themselves.
TOLERANCE = 1e-3

Say = Callable[[str], None]


def measure(workers: Mapping[str, Any], workload: str, *, rounds: int, seconds: float, say: Say) -> dict[str, Any]:
    """Build the workload in every worker, compare losses, time in turns, and take it down again.

    Args:
        workers: handles by name of peer (`Worker`, or anything with `ask`, `answer` and `run`).
        workload: name of a workload.
        rounds: how many rounds.
        seconds: how long one round of one peer shall take, about.
        say: told what is going on.

    Returns:
        `{"peers": {name: {"us", "us_min", "us_max", "us_rounds", "us_processes", "cpu_us", "cpu_us_rounds", "cores",
        "loss", "steps"}}, "failed": {name: why}}`, times in microseconds a step.
    """
    failed: dict[str, str] = {}
    alive = dict(workers)
    began = time.perf_counter()
    losses = _built(alive, workload, failed)
    _compare(losses, failed)
    for name in failed:
        alive.pop(name, None)
    say(f"{workload}: {len(alive)} peers built and agreed in {time.perf_counter() - began:.0f} s")
    steps = {name: _calibrated(worker, seconds) for name, worker in alive.items()}
    replies: dict[str, list[dict[str, float]]] = {name: [] for name in alive}
    names = list(alive)
    for number in range(rounds):
        turn = number * 5 % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            replies[name].append(alive[name].run(steps[name]))
    for worker in alive.values():
        worker.ask("end")
        worker.answer()
    peers = {name: _summary(replies[name], steps[name], losses[name]) for name in names}
    return {"title": ALL[workload].title, "peers": peers, "failed": failed}


def _built(alive: dict[str, Any], workload: str, failed: dict[str, str]) -> dict[str, float]:
    """Build two at a time (compilers use both cores anyway), and return the loss after the first steps."""
    losses: dict[str, float] = {}
    waiting = list(alive)
    for pair in zip(waiting[::2], [*waiting[1::2], None], strict=False):
        going = []
        for name in filter(None, pair):
            alive[name].ask("build", workload)
            going.append(name)
        for name in going:
            try:
                alive[name].answer()
                alive[name].ask("run", CHECK_STEPS)
            except Failure as failure:
                failed[name] = str(failure)
        for name in going:
            if name not in failed:
                try:
                    losses[name] = alive[name].answer()["loss"]
                except Failure as failure:
                    failed[name] = str(failure)
    return losses


def _compare(losses: Mapping[str, float], failed: dict[str, str]) -> None:
    """Reject peers whose loss is not that of the others; the first peer is the reference."""
    if not losses:
        return
    expected = losses.get("loop", statistics.median(losses.values()))
    for name, loss in losses.items():
        if not abs(loss - expected) <= TOLERANCE * abs(expected):
            failed[name] = f"its loss after {CHECK_STEPS} steps is {loss:.6f}, and that of the others {expected:.6f}"


def _calibrated(worker: Any, seconds: float) -> int:
    """Return how many steps of a worker take about so many seconds."""
    steps = 3
    while True:
        wall = worker.run(steps)["wall"]
        if wall >= seconds / 4 or steps >= 20_000:
            return max(2, min(20_000, round(steps * seconds / wall)))
        steps = min(20_000, max(2 * steps, round(steps * seconds / 2 / max(wall, 1e-6))))


def _summary(replies: list[dict[str, float]], steps: int, loss: float) -> dict[str, Any]:
    wall, cpu = ([reply[clock] / steps * 1e6 for reply in replies] for clock in ("wall", "cpu"))
    return {**_spread(wall, cpu), "us_processes": [statistics.median(wall)], "loss": loss, "steps": steps}


def _spread(wall: list[float], cpu: list[float]) -> dict[str, Any]:
    return {
        "us": statistics.median(wall),
        "us_min": min(wall),
        "us_max": max(wall),
        "us_rounds": wall,
        "cpu_us": statistics.median(cpu),
        "cpu_us_rounds": cpu,
        "cores": statistics.median(c / w for c, w in zip(cpu, wall, strict=True)),
    }


def together(sets: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the results of several sets of processes as one: all rounds, and the median of each process.

    A peer that failed in one of them failed.
    """
    failed: dict[str, str] = {}
    for found in sets:
        failed |= found["failed"]
    peers = {}
    for name, first in sets[0]["peers"].items():
        if name not in failed:
            each = [found["peers"][name] for found in sets]
            wall, cpu = ([x for peer in each for x in peer[clock]] for clock in ("us_rounds", "cpu_us_rounds"))
            peers[name] = first | _spread(wall, cpu) | {"us_processes": [peer["us"] for peer in each]}
    return {"title": sets[0]["title"], "peers": peers, "failed": failed}


def ratio(results: Mapping[str, Any], a: str, b: str) -> tuple[float, float, float]:
    """Return the ratio of two peers: the median of the ratios of each round, their lowest and their highest quartile.

    Raises:
        KeyError: one of them was not measured.
    """
    pairs = zip(results["peers"][a]["us_rounds"], results["peers"][b]["us_rounds"], strict=True)
    return spread([x / y for x, y in pairs])


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """Return the median, the first and the third quartile."""
    ordered = sorted(values)
    if len(ordered) == 1:
        return ordered[0], ordered[0], ordered[0]
    low, middle, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return middle, low, high


def start(names: Iterable[str], say: Say, environment: dict[str, str] | None = None) -> tuple[dict[str, Worker], dict]:
    """Start a process for each peer and import its libraries, two at a time.

    Returns:
        The workers, and why some did not start.
    """
    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}
    waiting = list(names)
    for at in range(0, len(waiting), 2):
        pair = waiting[at : at + 2]
        for name in pair:
            workers[name] = Worker(name, environment)
            workers[name].ask("load")
        for name in pair:
            try:
                workers[name].loaded = workers[name].answer()["memory"]
            except Failure as failure:
                failed[name] = str(failure)
                workers.pop(name).close()
                say(f"{name} is left out: {str(failure).strip().splitlines()[-1]}")
    return workers, failed


def run(settings: Any, say: Say) -> dict[str, Any]:
    """Measure all workloads, with several processes of each peer, one set of them after the other."""
    sets: dict[str, list[dict[str, Any]]] = {workload: [] for workload in settings.training}
    for number in range(settings.processes):
        say(f"processes, set {number + 1} of {settings.processes}")
        for workload, found in _one_set(settings, say).items():
            sets[workload].append(found)
    return {workload: together(found) for workload, found in sets.items()}


def _one_set(settings: Any, say: Say) -> dict[str, dict[str, Any]]:
    """Measure all workloads with one process of each peer."""
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(settings.cache)}
    everybody = dict.fromkeys(name for names in settings.training.values() for name in names)
    workers, failed = start(everybody, say, environment)
    results: dict[str, Any] = {}
    try:
        for workload, names in settings.training.items():
            chosen = {name: workers[name] for name in names if name in workers}
            results[workload] = measure(
                chosen, workload, rounds=settings.rounds, seconds=settings.round_seconds, say=say
            )
            results[workload]["failed"] |= {name: why for name, why in failed.items() if name in names}
            for name in results[workload]["failed"]:
                # Whatever state it is in, it is not asked again.
                if name in workers:
                    workers.pop(name).close()
    finally:
        for worker in workers.values():
            worker.close()
    return results
