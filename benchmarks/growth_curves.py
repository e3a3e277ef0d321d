"""What `growth` measures: one function for each curve, which returns the cost at a size."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

STEPS = 200  # of a run whose cost a step is measured
ON_DISK = 1000  # MB of a state from which on its snapshots lie on the disk


@dataclasses.dataclass(frozen=True)
class Curve:
    """What is measured at which sizes.

    Attributes:
        what: the cost.
        against: the size.
        sizes: growing.
        cost: returns seconds, or bytes, at a size.
        unit: of the cost.
    """

    what: str
    against: str
    sizes: tuple[int, ...]
    cost: Callable[[int], float]
    unit: str = "seconds"

    @property
    def name(self) -> str:
        return f"{self.what} / {self.against}"

    def shown(self, value: float) -> str:
        """Return a cost with its unit, to three digits."""
        scales = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))
        if self.unit == "bytes":
            scales = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))
        for unit, scale in scales:
            if value >= scale or unit == scales[-1][0]:
                return f"{value / scale:.3g} {unit}"
        raise AssertionError(value)


def _least(call: Callable[[], Any], repeats: int = 3, clock: Callable[[], float] = time.process_time) -> float:
    times = []
    for _ in range(repeats + 1):
        began = clock()
        call()
        times.append(clock() - began)
    return min(times[1:])


def _eager_step(tensors: int, batch: int = 4, microbatches: int = 1) -> Callable[[], Any]:
    import torch
    from torch import nn

    import purestep as ps

    class Scales(nn.Module):
        """Every tensor is used by an operator of its own, as in a network."""

        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(tensors)])

        def forward(self, x: Any) -> Any:
            for scale in self.scales:
                x = x * scale
            return x

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
    """A directory of so many; they are written a hundred at a time, because each save looks at those that are there."""
    import torch

    from purestep import snapshot

    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        for first in range(0, count, 100):
            with tempfile.TemporaryDirectory(dir=_memory()) as part:
                store = snapshot.Store(part, keep=snapshot.all_())
                for step in range(first, min(first + 100, count)):
                    store.save(step, {"w": torch.zeros(4)})
                store.close()
                for step in range(first, min(first + 100, count)):
                    os.rename(Path(part) / str(step), Path(folder) / str(step))
        found = _least(lambda: snapshot.Store(folder).latest())
        if snapshot.Store(folder).latest() != count - 1:
            raise RuntimeError("not all snapshots were found")
        return found


@functools.cache
def _save(megabytes: int) -> tuple[float, float]:
    """Seconds that a save blocks, and bytes of memory while it is written, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.growth_curves", str(megabytes)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds, nbytes = json.loads(done.stdout.splitlines()[-1])
    return seconds, nbytes


def saved(megabytes: int) -> tuple[float, float]:
    """Measure what a save of a state costs in this process."""
    import torch

    from benchmarks.plan_memory import held
    from purestep import snapshot

    torch.set_num_threads(1)
    value = {f"w{i}": torch.zeros(megabytes * 2**20 // 16) for i in range(4)}
    for leaf in value.values():
        leaf.fill_(1.0)  # memory of zeros may be one page
    with tempfile.TemporaryDirectory(dir=None if megabytes >= ON_DISK else _memory()) as folder:
        with snapshot.Store(Path(folder) / "small") as small:
            small.save(0, {"w": torch.zeros(4)})  # imports, and threads
        gc.collect()
        before = held("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        store = snapshot.Store(Path(folder) / "large", keep=snapshot.latest(1))
        times = []
        for step in range(3):
            began = time.perf_counter()
            store.save(step, value)
            times.append(time.perf_counter() - began)
            store.wait()
        store.close()
    return min(times[1:]), float(held("VmHWM") - before)


def _blocking(megabytes: int) -> float:
    return _save(megabytes)[0]


def _copying(megabytes: int) -> float:
    return _save(megabytes)[1]


# --- ranks ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _step_of(plan: str, ranks: int) -> Iterator[Callable[[], Any]]:
    """A step of rank 0 under a plan; its first call is made."""
    import torch
    from torch import nn

    import purestep as ps
    from benchmarks import fake_ranks
    from purestep.parallel import microbatches

    with fake_ranks.job(ranks), patch.object(microbatches, "compare_sizes", lambda heard: None):
        tx, made = ps.optim.adamw(1e-3), getattr(ps.sharding, plan)()
        state = made.place(ps.init(lambda: nn.Sequential(nn.Linear(4096, 4), nn.ReLU(), nn.Linear(4, 4096)), tx))
        step = ps.make_step(lambda net, batch: net(batch).square().mean(), tx, plan=made, microbatches=ranks)
        fake_ranks.agreed(made, ranks)
        batch = ps.sharding.LocalBatch(torch.ones(2, 4096), samples=2 * ranks, microbatches=ranks)
        step(state, batch)
        yield lambda: step(state, batch)


def _ranks(plan: str, ranks: int) -> float:
    with _step_of(plan, ranks) as call:
        return _least(call)


def _first(ranks: int) -> float:
    """Placing a state and the first step: groups of ranks, and who computes what."""
    times = []
    for _ in range(2):
        began = time.process_time()
        with _step_of("fsdp", ranks):
            times.append(time.process_time() - began)
    return times[-1]


def _dry_run(ranks: int) -> float:
    import torch

    import purestep as ps

    plan = ps.sharding.fsdp(ranks)
    with torch.device("meta"):
        state = ps.init(lambda: torch.nn.Linear(4096, 4096), ps.optim.adamw(1e-3))
    return _least(lambda: plan.dry_run(state))


def _joining(clients: int) -> float:
    """CPU time of so many clients that connect to the store of a rendezvous and tell their number, and of the store."""
    import torch.distributed as dist

    began = time.process_time()
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    joined = []
    for number in range(clients):
        joined.append(dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False))
        joined[-1].set(str(number), "here")
    server.wait([str(number) for number in range(clients)])
    return time.process_time() - began


_RANKS = (1, 4, 16, 64, 256, 1024, 4096)
CURVES = (
    Curve("an eager step, AdamW", "tensors of the parameters", (10, 100, 1000, 10_000), _tensors),
    Curve("the indices of a batch, shuffled", "samples", (10**3, 10**5, 10**7, 10**9), _samples),
    Curve("a step of a run", "callbacks", (1, 10, 50), _callbacks),
    Curve("a step of a run", "metrics", (1, 10, 50, 200), _metrics),
    Curve("an eager step", "microbatches", (1, 4, 16, 64), _microbatches),
    Curve("opening metrics.csv at a resume", "rows", (10**3, 10**4, 10**5, 10**6, 10**7), _rows),
    Curve("an eager step, ddp", "ranks", _RANKS, functools.partial(_ranks, "ddp")),
    Curve("an eager step, fsdp", "ranks", _RANKS, functools.partial(_ranks, "fsdp")),
    Curve("placing a state, and its first step, fsdp", "ranks", _RANKS, _first),
    Curve("a dry run of a plan", "ranks", (1, 64, 4096), _dry_run),
    Curve("joining a rendezvous, one after the other", "clients", (1, 16, 64, 256), _joining),
    Curve("finding the latest snapshot, in a new store", "snapshots", (1, 10, 100, 1000), _snapshots),
    Curve("what a save blocks, wall time", "MB of state", (1, 10, 100, 1000), _blocking),
    Curve("memory while a save is written", "MB of state", (1, 10, 100, 1000), _copying, "bytes"),
)

if __name__ == "__main__":
    print(json.dumps(saved(int(sys.argv[1]))))
