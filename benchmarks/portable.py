"""Step time with portable bits, as a ratio to native bits: one process of each, in turns."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.training import Say, spread, start
from benchmarks.worker import Worker

BITS = ("native", "portable")


def run(settings: Any, say: Say) -> dict[str, Any]:
    """Return `{workload: {trainer: {"native", "portable": us a step, "ratio": (median, quartiles)}}}`.

    Times are CPU time of one thread: a process waits for nothing but the processor.
    """
    found: dict[str, Any] = {}
    for workload, trainers in settings.portable.items():
        found[workload] = {}
        for trainer in trainers:
            found[workload][trainer] = _in_turns(workload, trainer, settings, say)
            say(f"portable bits, {workload}, {trainer}: {found[workload][trainer]['ratio'][0]:.2f} of native")
    return found


def _in_turns(workload: str, trainer: str, settings: Any, say: Say) -> dict[str, Any]:
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(settings.cache)}
    workers: dict[str, Worker] = {}
    try:
        for bits in BITS:
            started, failed = start([trainer], say, cache | {"PURESTEP_BITS": bits})
            if failed:
                raise RuntimeError(failed[trainer])
            workers[bits] = started[trainer]
            workers[bits].ask("build", workload)
            workers[bits].answer()
        steps = dict.fromkeys(BITS, 2)
        for bits in BITS:  # the first run compiles, the second says how many steps fill a round
            workers[bits].run(2)
            steps[bits] = max(1, round(settings.round_seconds / (workers[bits].run(2)["cpu"] / 2)))
        each: dict[str, list[float]] = {bits: [] for bits in BITS}
        for _ in range(settings.rounds):
            for bits in BITS:
                each[bits].append(workers[bits].run(steps[bits])["cpu"] / steps[bits] * 1e6)
    finally:
        for worker in workers.values():
            worker.close()
    ratios = [portable / native for native, portable in zip(each["native"], each["portable"], strict=True)]
    return {bits: statistics.median(each[bits]) for bits in BITS} | {"ratio": spread(ratios)}
