"""What `fit` costs over a bare loop of the same step, a step and a metric key. One process, in turns."""

from __future__ import annotations

import gc
import time
from typing import Any

from benchmarks.training import Say, spread

KEYS = (1, 5)


def run(settings: Any, say: Say) -> dict[str, Any]:
    """Measure with the compiled, donating step of the MLP, which itself takes a fraction of a millisecond."""
    import torch

    import purestep as ps

    torch.set_num_threads(1)
    subjects = {keys: _subject(keys) for keys in KEYS}
    steps = settings.loop_steps
    for subject in subjects.values():
        _bare(subject, steps)
        _fitted(subject, steps, ps)
    differences: dict[int, list[float]] = {keys: [] for keys in KEYS}
    bare: dict[int, list[float]] = {keys: [] for keys in KEYS}
    starts: list[float] = []
    gc.collect()
    for _ in range(settings.loop_rounds):
        for keys, subject in subjects.items():
            without = _bare(subject, steps)
            fitted, start = _fitted(subject, steps, ps)
            differences[keys].append(fitted - without)
            starts.append(start)
            bare[keys].append(without)
    few, many = KEYS
    extra = [(b - a) / (many - few) for a, b in zip(differences[few], differences[many], strict=True)]
    say(f"loop: fit costs {spread(differences[few])[0]:.1f} us a step, {spread(extra)[0]:.2f} us a further key")
    return {
        "step_us": spread(differences[few]),
        "key_us": spread(extra),
        "bare_us": spread(bare[few]),
        "start_ms": spread(starts),
        "steps": steps,
        "rounds": settings.loop_rounds,
    }


def _subject(keys: int) -> dict[str, Any]:
    """A step that returns so many metrics, its state and batches. `loss` is one of the metrics."""
    import purestep as ps
    from benchmarks import workloads
    from benchmarks.peers.loops import tensors
    from benchmarks.peers.ours import loss_fn

    work = workloads.ALL["mlp"]

    def with_metrics(net: Any, batch: Any) -> Any:
        loss = loss_fn(net, batch)
        return loss, {f"metric{i}": loss.detach() * i for i in range(keys - 1)}

    tx = ps.optim.adamw(workloads.LEARNING_RATE)
    step = ps.jit(ps.make_step(with_metrics, tx), donate=True)
    batches = [{"x": x, "y": y} for x, y in tensors(work)]
    return {"step": step, "state": ps.init(workloads.module(work), tx, seed=0), "batches": batches}


def _bare(subject: dict[str, Any], steps: int) -> float:
    """Microseconds a step of `for batch in batches: state, metrics = step(state, batch)`, metrics kept."""
    step, state, batches = subject["step"], subject["state"], subject["batches"]
    cycle = [batches[i % len(batches)] for i in range(steps)]
    began = time.perf_counter()
    for batch in cycle:
        state, metrics = step(state, batch)
    float(metrics["loss"].compute())
    wall = time.perf_counter() - began
    subject["state"] = state
    return wall / steps * 1e6


def _fitted(subject: dict[str, Any], steps: int, ps: Any) -> tuple[float, float]:
    """Microseconds a step of `fit` over the same batches, and the milliseconds until its first steps are done.

    What `fit` does once (looking for snapshots, the check of the first batch) is in the second number only.
    """
    batches = subject["batches"]
    cycle = [batches[i % len(batches)] for i in range(steps)]
    began = time.perf_counter()
    events = ps.run(subject["step"], subject["state"], cycle, until=ps.epochs(1))
    first, skipped = 0.0, 0
    for event in events:
        if isinstance(event, ps.loop.StepsDone) and not skipped:
            first, skipped = time.perf_counter(), event.count
    wall = time.perf_counter() - first
    subject["state"] = events.loop.train
    return wall / (steps - skipped) * 1e6, (first - began) * 1e3
