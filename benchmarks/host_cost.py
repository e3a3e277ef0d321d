"""What surrounds a step, on the host: loaders, lists of samples, evaluations, the eager step, the first batch.

Two loops that differ in one thing take turns in one process; times are CPU time of its one thread, and differences and
ratios are taken turn by turn. Only `first_batch` measures new processes.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.training import Say, spread
from benchmarks.worker import ENVIRONMENT

SAMPLES = 32  # a batch
Turn = Callable[[int], float]
# Trains on one batch in a process that has imported torch; both numbers are CPU time.
FIRST_BATCH = """
import time, torch
from torch.nn.functional import cross_entropy
began = time.process_time()
import purestep as ps
imported = time.process_time()
torch.set_num_threads(1)
def loss_fn(net, batch):
    return cross_entropy(net(batch["x"]), batch["y"])
def model():
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
tx = ps.optim.adamw(1e-3)
data = ps.data.batches({"x": torch.zeros(32, 64), "y": torch.zeros(32, dtype=torch.int64)}, 32)
ps.fit(ps.make_step(loss_fn, tx), ps.init(model, tx, seed=0), data, until=ps.steps(1))
print(time.process_time() - began, imported - began)
"""


def run(settings: Any, say: Say) -> dict[str, Any]:
    """Return a spread for each row: microseconds added a batch or a sample, ratios of a step, seconds of the first."""
    import torch

    torch.set_num_threads(1)
    rounds, found = settings.loop_rounds // 4, {}
    for name, pair in (
        ("loader_us", _loader(settings.loop_steps, rounds)),
        ("batches_us", _batches(settings.loop_steps, rounds)),
        ("evaluate_us", _evaluation()),
        ("samples_us", _samples()),
    ):
        found[name] = spread([(a - b) * 1e6 for a, b in in_turns(*pair, settings.loop_steps, rounds)])
        say(f"{name}: {found[name][0]:.1f}")
    found["samples_us"] = tuple(us / SAMPLES for us in found["samples_us"])
    for kind in ("foreach", "fused"):
        found[kind] = spread([a / b for a, b in in_turns(*_eager(kind), settings.loop_steps, rounds)])
        say(f"eager / {kind} loop: {found[kind][0]:.2f}")
    firsts = [first_batch() for _ in range(4)][1:]  # the first one compiles modules to bytecode
    found["first_batch_s"] = spread([seconds for seconds, _ in firsts])
    found["first_import_s"] = spread([imported for _, imported in firsts])
    say(f"first batch: {found['first_batch_s'][0]:.2f} s")
    return found


def in_turns(ours: Turn, theirs: Turn, steps: int, rounds: int) -> list[tuple[float, float]]:
    """Return (ours, theirs), seconds a step of each round; the first round is not counted."""
    times = []
    for number in range(rounds + 1):
        if number == 1:
            gc.collect()
        pair = (ours(steps), theirs(steps)) if number % 2 else (theirs(steps), ours(steps))[::-1]
        if number:
            times.append((pair[0] / steps, pair[1] / steps))
    return times


def first_batch() -> tuple[float, float]:
    """Return seconds from before `import purestep` to one batch trained, and to the end of that import."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_BATCH],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **ENVIRONMENT},
    )
    seconds, imported = map(float, done.stdout.split()[-2:])
    return seconds, imported


def _timed(call: Callable[[], Any]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


def _training() -> tuple[Any, Any]:
    """The compiled, donating step of the MLP, and its first state."""
    import purestep as ps
    from benchmarks import workloads
    from benchmarks.peers.ours import loss_fn

    tx = ps.optim.adamw(workloads.LEARNING_RATE)
    step = ps.jit(ps.make_step(loss_fn, tx), donate=True)
    return step, ps.init(workloads.module(workloads.ALL["mlp"]), tx, seed=0)


def _columns(samples: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(samples, 64, generator=generator),
        "y": torch.randint(10, (samples,), generator=generator),
    }


def _fit_over(data: Any, epochs: int) -> Turn:
    """A run of which each turn is an epoch."""
    import purestep as ps

    step, state = _training()
    events = iter(ps.run(step, state, data, until=ps.epochs(epochs)))

    def turn(steps: int) -> float:
        def burst() -> None:
            count = next(event.count for event in events if isinstance(event, ps.loop.StepsDone))
            if count != steps:
                raise ValueError(f"a burst had {count} steps, not {steps}")

        return _timed(burst)

    return turn


def _bare_over(epoch: Callable[[int], Iterator[Any]]) -> Turn:
    step, state = _training()
    number = 0

    def turn(steps: int) -> float:
        nonlocal number

        def loop() -> None:
            nonlocal state
            for batch in epoch(number):
                state, _ = step(state, batch)

        number += 1
        return _timed(loop)

    return turn


def _loader(steps: int, rounds: int) -> tuple[Turn, Turn]:
    """`fit` over torch's loader, and a bare loop over one like it."""
    from torch.utils.data import DataLoader

    class Rows:
        def __init__(self) -> None:
            self.columns = _columns(SAMPLES * steps)

        def __len__(self) -> int:
            return SAMPLES * steps

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {name: column[i] for name, column in self.columns.items()}

    def loader() -> Any:
        return DataLoader(Rows(), batch_size=SAMPLES, shuffle=True)  # type: ignore[arg-type]

    bare = loader()
    return _fit_over(loader(), rounds + 1), _bare_over(lambda number: iter(bare))


def _batches(steps: int, rounds: int) -> tuple[Turn, Turn]:
    """`fit` over `ps.data.batches`, and a bare loop over the same."""
    import purestep as ps

    data = ps.data.batches(_columns(SAMPLES * steps), SAMPLES)
    return _fit_over(data, rounds + 1), _bare_over(data.epoch)


def _evaluation() -> tuple[Turn, Turn]:
    """`ps.evaluate` over so many batches, and a bare loop of its compiled step which reads the sums at the end."""
    import purestep as ps
    from benchmarks.peers.ours import loss_fn

    _, state = _training()
    step = ps.jit(ps.make_eval(loss_fn))
    columns = _columns(SAMPLES)

    def bare(steps: int) -> float:
        batches = [columns] * steps

        def loop() -> None:
            sums: Any = None
            for batch in batches:
                metrics = step(state, batch)
                sums = metrics if sums is None else ps.metrics.merge(sums, metrics)
            ps.metrics.compute(sums)

        return _timed(loop)

    return (lambda steps: _timed(lambda: ps.evaluate(state, step, [columns] * steps))), bare


def _samples() -> tuple[Turn, Turn]:
    """Batches of a list of samples, and the same lists collated by torch."""
    from torch.utils.data import default_collate

    import purestep as ps

    columns = _columns(2048)
    samples = [{name: column[i] for name, column in columns.items()} for i in range(2048)]
    data = ps.data.batches(samples, SAMPLES)
    indices = [data.indices(0, batch).tolist() for batch in range(len(data))]

    def ours(steps: int) -> float:
        batches = data.epoch(0)
        return _timed(lambda: [next(batches) for _ in range(steps)])

    def theirs(steps: int) -> float:
        return _timed(lambda: [default_collate([samples[i] for i in rows]) for rows in indices[:steps]])

    return ours, theirs


def _eager(kind: str) -> tuple[Turn, Turn]:
    """The eager step of the MLP, and the loop that is written by hand."""
    from benchmarks import workloads
    from benchmarks.peers.loops import Loop
    from benchmarks.peers.ours import Ours

    work = workloads.ALL["mlp"]
    ours, loop = Ours(work, fused=kind == "fused"), Loop(work, kind)
    return (lambda steps: _timed(lambda: ours.train(steps))), (lambda steps: _timed(lambda: loop.train(steps)))
