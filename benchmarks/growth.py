"""How host cost grows with what a run is made of: `python -m benchmarks.growth [--resume]`.

Writes `results/growth.json`, and from it `growth.md` and `growth.png`; `--resume` measures the curves that are missing.

Each curve is the cost of one thing at growing sizes, CPU time of
the process (of a save, wall time until `save` returns), the least of a few repeats. The exponent is the slope of the
last two sizes on logarithmic axes: 0 where the cost does not depend on the size, 1 where it is linear.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.report import table

FOLDER = Path(__file__).parent / "results"
STEPS = 200  # of a run whose cost a step is measured
NOTE = (
    "Of the eager step with 10,000 tensors, torch's backward pass over one `torch.stack` of them all grows faster than "
    "their number, and so may binding the parameters to the model. What concerns snapshots is measured in a directory "
    "in memory (`/dev/shm`), where there is one."
)
WORST = 1.15  # exponent that still counts as linear


@dataclasses.dataclass(frozen=True)
class Curve:
    """What is measured at which sizes.

    Attributes:
        what: the cost.
        against: the size.
        sizes: growing.
        cost: returns seconds at a size.
    """

    what: str
    against: str
    sizes: tuple[int, ...]
    cost: Callable[[int], float]

    @property
    def name(self) -> str:
        return f"{self.what} / {self.against}"


def main() -> int:
    """Measure all curves, write table and plot, and return how many grow faster than linearly."""
    import torch

    torch.set_num_threads(1)
    file = FOLDER / "growth.json"
    kept: dict[str, list[float]] = json.loads(file.read_text()) if "--resume" in sys.argv and file.exists() else {}
    for curve in CURVES:
        if curve.name not in kept:
            kept[curve.name] = [curve.cost(size) for size in curve.sizes]
            file.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"{curve.name}: {', '.join(map(_time, kept[curve.name]))}", file=sys.stderr, flush=True)
    found = [kept[curve.name] for curve in CURVES]
    (FOLDER / "growth.md").write_text(report(found))
    plot(found, FOLDER / "growth.png")
    return sum(exponent(curve.sizes, seconds) > WORST for curve, seconds in zip(CURVES, found, strict=True))


def exponent(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """Return the slope between the last two sizes on logarithmic axes.

    Example:
        >>> exponent((1, 10, 100), [1.0, 1.0, 10.0])
        1.0
    """
    return math.log(seconds[-1] / seconds[-2]) / math.log(sizes[-1] / sizes[-2])


def report(found: list[list[float]]) -> str:
    """Return the table in Markdown."""
    rows = []
    for curve, seconds in zip(CURVES, found, strict=True):
        shown = ", ".join(f"{size:,}: {_time(s)}" for size, s in zip(curve.sizes, seconds, strict=True))
        each = (seconds[-1] - seconds[0]) / (curve.sizes[-1] - curve.sizes[0])
        rows.append([curve.what, curve.against, shown, _time(max(each, 0.0)), f"{exponent(curve.sizes, seconds):.2f}"])
    about = machine.describe()
    where = f"{about['cpu']}, {about['cores']} cores, load {about['load']:.1f}, Python {about['python']}"
    head = ["what", "against", "cost at each size", "for one more", "exponent at the end"]
    about_curves = (__doc__ or "").strip().rpartition("\n\n")[2]
    return f"# How host cost grows\n\n{where}. {about_curves}\n\n{table(head, rows)}\n\n{NOTE}\n"


def plot(found: list[list[float]], path: Path) -> None:
    """Draw each curve on logarithmic axes, with a line of slope 1 beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = 3
    figure, axes = plt.subplots(math.ceil(len(CURVES) / columns), columns, figsize=(12, 9), squeeze=False)
    for axis, curve, seconds in zip(axes.flat, CURVES, found, strict=False):
        axis.loglog(curve.sizes, seconds, "o-", color="#2a6f97")
        linear = [seconds[-1] * size / curve.sizes[-1] for size in curve.sizes]
        axis.loglog(curve.sizes, linear, ":", color="#888888")
        axis.set_ylim(min(seconds) / 3, max(seconds) * 3)
        axis.set_title(curve.what, fontsize=8)
        axis.set_xlabel(curve.against, fontsize=8)
        axis.set_ylabel("seconds", fontsize=8)
    for axis in list(axes.flat)[len(CURVES) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.2g} ns"


def _least(call: Callable[[], Any], repeats: int = 3, clock: Callable[[], float] = time.process_time) -> float:
    times = []
    for _ in range(repeats + 1):
        began = clock()
        call()
        times.append(clock() - began)
    return min(times[1:])


# --- what is measured ------------------------------------------------------------------------------------------------


def _eager_step(tensors: int, batch: int = 4, microbatches: int = 1) -> Callable[[], Any]:
    import torch
    from torch import nn

    import purestep as ps

    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.ParameterList([nn.Parameter(torch.ones(4)) for _ in range(tensors)])

        def forward(self, x: Any) -> Any:
            return x * torch.stack(list(self.scales)).sum()

    def loss_fn(net: Any, batch: Any) -> Any:
        return net(batch).mean()

    tx = ps.optim.adamw(1e-3)
    step, state = ps.make_step(loss_fn, tx, microbatches=microbatches), ps.init(Scales, tx, seed=0)
    data = torch.ones(batch, 2)
    return lambda: step(state, data)


def _memory() -> str | None:
    """A directory in memory, where a thousand saves do not wait for a disk; None where there is none."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _tensors(count: int) -> float:
    return _least(_eager_step(count))


def _microbatches(count: int) -> float:
    return _least(_eager_step(8, batch=64, microbatches=count))


def _samples(count: int) -> float:
    import torch

    import purestep as ps

    data = ps.data.batches(torch.zeros(1).expand(count), 32, seed=1)
    numbers = iter(range(10**9))

    def fifty() -> None:
        for _ in range(50):
            data.indices(0, next(numbers) % len(data))

    return _least(fifty) / 50


def _run(metrics: int, callbacks: int) -> float:
    """Seconds a step of a run whose step computes nothing."""
    import torch

    import purestep as ps

    values = {f"metric{i}": ps.metrics.mean(torch.tensor(1.0), 4) for i in range(metrics)}
    state = ps.init(lambda: torch.nn.Linear(1, 1), ps.optim.sgd(0.1))

    @dataclasses.dataclass(frozen=True)
    class Watching(ps.callbacks.Reducer):
        name: str

    own = [Watching(f"watching{i}") for i in range(callbacks)]
    data = [torch.ones(4, 1)] * STEPS

    def step(state: Any, batch: Any) -> Any:
        return state, values

    def epochs() -> Iterator[float]:
        began = time.process_time()
        for event in ps.run(step, state, data, callbacks=own, until=ps.epochs(5)):
            if isinstance(event, ps.loop.EpochDone):
                yield (time.process_time() - began) / STEPS
                began = time.process_time()

    return min(list(epochs())[1:])  # the first one has the checks


def _metrics(count: int) -> float:
    return _run(count, 0)


def _callbacks(count: int) -> float:
    return _run(1, count)


def _rows(count: int) -> float:
    from purestep import loggers

    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "metrics.csv").open("w") as file:
            file.write("step,train/loss,learning_rate\n")
            file.writelines(f"{i},{1 / (i + 1)},0.001\n" for i in range(count))

        def resume() -> None:
            loggers.csv().open(Path(folder), resume_step=count - 50).close()

        return _least(resume)


def _snapshots(count: int) -> float:
    import torch

    from purestep import snapshot

    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        store = snapshot.Store(folder, keep=snapshot.all_())
        for step in range(count):
            store.save(step, {"w": torch.zeros(4)})
        store.close()
        return _least(lambda: snapshot.Store(folder).latest())


def _state(megabytes: int) -> float:
    import torch

    from purestep import snapshot

    value = {f"w{i}": torch.zeros(megabytes * 2**20 // 16) for i in range(4)}
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        store = snapshot.Store(folder, keep=snapshot.latest(1))
        times = []
        for step in range(3):
            began = time.perf_counter()
            store.save(step, value)
            times.append(time.perf_counter() - began)
            store.wait()
        store.close()
    return min(times[1:])


CURVES = (
    Curve("an eager step, AdamW", "tensors of the parameters", (10, 100, 1000, 10_000), _tensors),
    Curve("the indices of a batch, shuffled", "samples", (10**3, 10**5, 10**7, 10**9), _samples),
    Curve("a step of a run", "callbacks", (1, 10, 50), _callbacks),
    Curve("a step of a run", "metrics", (1, 10, 50, 200), _metrics),
    Curve("an eager step", "microbatches", (1, 4, 16, 64), _microbatches),
    Curve("opening metrics.csv at a resume", "rows", (10**3, 10**4, 10**5, 10**6, 10**7), _rows),
    Curve("finding the latest snapshot, in a new store", "snapshots", (1, 10, 100), _snapshots),
    Curve("what a save blocks, wall time", "MB of state", (1, 10, 100, 500), _state),
)

if __name__ == "__main__":
    sys.exit(min(main(), 1))
