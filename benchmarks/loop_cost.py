"""What `fit` costs over a bare loop of the same step: a step, a metric key, and a call.

A run that is drained a burst at a time takes turns with bare loops of as many steps, a few milliseconds each, so that
whatever disturbs the machine disturbs both. Times are CPU time of the one process; differences are taken turn by turn.
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

from benchmarks.training import Say, spread

KEYS = (1, 5)


def run(settings: Any, say: Say) -> dict[str, Any]:
    """Measure with the compiled, donating step of the MLP, which itself takes a fraction of a millisecond."""
    import torch

    torch.set_num_threads(1)
    subjects = {keys: _Subject(keys, settings.loop_steps * (settings.loop_rounds + 1)) for keys in KEYS}
    turns = [(kind, keys) for keys in KEYS for kind in ("bare", "fit")]
    times: dict[tuple[str, int], list[float]] = {turn: [] for turn in turns}
    for number in range(settings.loop_rounds + 1):
        if number == 1:
            gc.collect()
        for i in range(len(turns)):
            kind, keys = turns[(number + i) % len(turns)]
            seconds = getattr(subjects[keys], kind)(settings.loop_steps)
            if number:
                times[kind, keys].append(seconds / settings.loop_steps * 1e6)
    added = {k: [a - b for a, b in zip(times["fit", k], times["bare", k], strict=True)] for k in KEYS}
    few, many = KEYS
    extra = [(b - a) / (many - few) for a, b in zip(added[few], added[many], strict=True)]
    calls = [subjects[few].call() for _ in range(9)][2:]
    say(f"loop: fit costs {spread(added[few])[0]:.1f} us a step, {spread(extra)[0]:.2f} us a further key")
    return {
        "step_us": spread(added[few]),
        "key_us": spread(extra),
        "bare_us": spread(times["bare", few]),
        "call_ms": spread(calls),
        "steps": settings.loop_steps,
        "rounds": settings.loop_rounds,
    }


class _Subject:
    """A step that returns so many metrics, `loss` among them. Its bare loop and its run have states of their own."""

    def __init__(self, keys: int, steps: int) -> None:
        import purestep as ps
        from benchmarks import workloads
        from benchmarks.peers.loops import tensors
        from benchmarks.peers.ours import loss_fn

        work = workloads.ALL["mlp"]

        def with_metrics(net: Any, batch: Any) -> Any:
            loss = loss_fn(net, batch)
            return loss, {f"metric{i}": loss.detach() * i for i in range(keys - 1)}

        tx = ps.optim.adamw(workloads.LEARNING_RATE)
        self.step = ps.jit(ps.make_step(with_metrics, tx), donate=True)
        self.state = ps.init(workloads.module(work), tx, seed=0)
        self.batches = [{"x": x, "y": y} for x, y in tensors(work)]
        events = ps.run(self.step, ps.init(workloads.module(work), tx, seed=0), self._cycle(steps), until=ps.epochs(1))
        self.events, self.done = iter(events), ps.loop.StepsDone

    def _cycle(self, steps: int) -> list[Any]:
        return [self.batches[i % len(self.batches)] for i in range(steps)]

    def bare(self, steps: int) -> float:
        """Seconds of `for batch in batches: state, metrics = step(state, batch)`."""
        step, state, cycle = self.step, self.state, self._cycle(steps)
        began = time.process_time()
        for batch in cycle:
            state, metrics = step(state, batch)  # noqa: RUF059  kept until the next step, as loops do
        seconds = time.process_time() - began
        self.state = state
        return seconds

    def fit(self, steps: int) -> float:
        """Seconds of the run for its next steps, with all that lies between two bursts: it logs after each.

        Raises:
            ValueError: a burst of the run is not of that length.
        """
        began = time.process_time()
        count = next(event.count for event in self.events if isinstance(event, self.done))
        seconds = time.process_time() - began
        if count != steps:
            raise ValueError(f"a burst had {count} steps, not {steps}")
        return seconds

    def call(self) -> float:
        """Milliseconds of a call of `fit` for one step, over those of the step."""
        import purestep as ps

        step = statistics.median(self.bare(1) for _ in range(5))
        began = time.process_time()
        self.state = ps.fit(self.step, self.state, self.batches[:1], until=ps.steps(1)).state
        return (time.process_time() - began - step) * 1e3
