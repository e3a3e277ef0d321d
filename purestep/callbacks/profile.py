"""`profile`: torch's profiler over some steps of a run, and the files that come of it.

The reducer decides which steps, from the run's own position, so a resume does not shift them. The instrument starts
torch's profiler right before the first of them and stops it right after the last. A profiler that still records when
the interpreter exits crashes the process (torch 2.11 to 2.14), so one that was left open is stopped there.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from purestep import _cells
from purestep.arguments import Count, Location, Name, checked
from purestep.callbacks import _torch
from purestep.callbacks.base import Reaction, Reducer
from purestep.errors import ConfigError, explain
from purestep.loop.cadence import Every, every
from purestep.loop.events import Event, Horizon, LoopState, View
from purestep.loop.input import device_of
from purestep.loop.roles import Instrument, Recurring

_ROWS = 100  # of the table
_END = object()


@dataclasses.dataclass(frozen=True)
class Profile(Recurring, Reducer, Instrument):
    """See `profile`."""

    every: Every
    steps: int
    repeat: int | None
    dir: Path | None
    shapes: bool
    stack: bool
    memory: bool
    on_trace: Callable[[torch.profiler.profile], None] | None = dataclasses.field(repr=False)
    name: str

    def identity(self) -> None:
        """Return None: it only measures the run."""

    def init(self) -> tuple[int, int]:
        """Return the batch before which the latest window ends, and the number of windows so far."""
        return 0, 0

    def react(self, own: tuple[int, int], event: Event, view: View) -> Reaction:
        end, windows = own
        free = end <= view.cursor.batches and (self.repeat is None or windows < self.repeat)
        if free and self.every.due(event, view):
            return (view.cursor.batches + self.steps, windows + 1), ()
        return own, ()

    def horizon(self, view: View) -> Horizon:
        end, windows = view.loop.callbacks.get(self.name, self.init())
        if end > view.cursor.batches:
            return Horizon(end - view.cursor.batches)
        return Horizon() if self.repeat is not None and windows >= self.repeat else self.every.horizon(view)

    def open_instrument(self, run_dir: Path | None, rank: int) -> _Profiler:
        place = self.dir if self.dir is not None else None if run_dir is None else run_dir / "profile"
        if place is None and self.on_trace is None:
            raise ConfigError(
                explain(
                    "a profile needs a place",
                    where=f"{self.name!r}: run_dir=None, dir=None",
                    instead='ps.fit(..., run_dir="runs/name"), or ps.callbacks.profile(dir="profiles")',
                )
            )
        return _Profiler(self, place, rank)


class _Profiler:
    """The windows of one rank: at most one is open."""

    def __init__(self, settings: Profile, place: Path | None, rank: int) -> None:
        self._settings, self._place, self._rank = settings, place, rank
        self._window: _Window | None = None

    @contextlib.contextmanager
    def around(self, loop: LoopState, batches: Iterator[Any]) -> Iterator[Iterator[Any]]:
        end, _ = loop.callbacks[self._settings.name]
        at = loop.cursor.batches
        if end <= at:
            yield batches
            return
        if self._window is None:
            self._window = _Window(self._settings, at, device_of(loop.train))
        marked = self._window.marked(batches)
        try:
            yield marked
        finally:
            marked.close()
            if self._window.next >= end:
                self._write()

    def _write(self) -> None:
        window, self._window = self._window, None
        if window is None:
            return
        profiler = window.stop()
        if self._place is not None:
            window.write(self._place, self._rank)
        if self._settings.on_trace is not None:
            self._settings.on_trace(profiler)

    def close(self) -> None:
        """Write what there is of a window that the end of the run has cut."""
        self._write()


class _Window:
    """torch's profiler over some steps, from the moment it is made; not yet stopped."""

    def __init__(self, settings: Profile, first: int, device: torch.device) -> None:
        self.first = self.next = first
        self._sort = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
        self._history = settings.memory and device.type == "cuda"
        if _torch.profiling():
            raise ConfigError(
                explain(
                    "another profiler of torch records already",
                    why="torch has one at a time, and a second one would end the first",
                    instead="the steps outside of `with torch.profiler.profile()`, or without the callback",
                )
            )
        self._profiler = torch.profiler.profile(
            record_shapes=settings.shapes, profile_memory=settings.memory, with_stack=settings.stack
        )
        if self._history:
            _torch.record_memory(True)
        self._profiler.start()
        atexit.register(self._profiler.stop)

    def marked(self, batches: Iterator[Any]) -> Generator[Any, None, None]:
        """Yield the batches, and mark in the trace the wait for each and its step."""
        while True:
            with torch.profiler.record_function("purestep data"):
                batch = next(batches, _END)
            if batch is _END:
                return
            with torch.profiler.record_function(f"purestep step {self.next}"):
                self.next += 1
                yield batch
                del batch

    def stop(self) -> torch.profiler.profile:
        """Stop the profiler, which waits for the device, and return it."""
        atexit.unregister(self._profiler.stop)
        self._profiler.stop()
        if self._history:
            _torch.record_memory(False)
        return self._profiler

    def write(self, place: Path, rank: int) -> None:
        """Write the trace and the table of a stopped profiler."""
        place.mkdir(parents=True, exist_ok=True)
        stem = str(place / f"steps-{self.first}-{self.next - 1}.rank{rank}")
        self._profiler.export_chrome_trace(f"{stem}.pt.trace.json.gz")
        table = self._profiler.key_averages().table(sort_by=self._sort, row_limit=_ROWS)
        Path(f"{stem}.txt").write_text(table + "\n")
        if self._history:
            _torch.dump_memory(f"{stem}.memory.pickle")


@checked(ConfigError)
def profile(
    *,
    every: Every = every.steps(10),  # noqa: B008
    steps: Count = 3,
    repeat: Count | None = 1,
    dir: Location | None = None,
    shapes: bool = False,
    stack: bool = False,
    memory: bool = False,
    on_trace: Callable[[torch.profiler.profile], None] | None = None,
    name: Name = "profile",
) -> Profile:
    """Record some steps of a run with torch's profiler: a Chrome trace and a table of the operations, on every rank.

    The run has the bits that it has without it. In the trace the steps are the spans `purestep step <n>`, counted from
    0 over the whole run, and the waits for batches `purestep data`. What happens between two chunks of steps, such as
    an evaluation, is in it only if it falls between two of the recorded steps. A run that is resumed records the rest
    of its windows. A dry run records nothing, nor does a run that ends before the first window.

    Args:
        every: a window of recorded steps begins behind each of these moments; not at the first step, which checks and
            compiles.
        steps: number of steps of a window.
        repeat: number of windows, None for no limit.
        dir: directory of the files; by default `profile` in the run directory. They are
            `steps-<first>-<last>.rank<rank>.pt.trace.json.gz` for chrome://tracing, Perfetto or TensorBoard's plugin,
            and the table `steps-<first>-<last>.rank<rank>.txt`.
        shapes: record the shapes of inputs.
        stack: record Python's stacks, which slows the steps down.
        memory: record allocations. On CUDA also their timeline, as `steps-<first>-<last>.rank<rank>.memory.pickle` for
            https://pytorch.org/memory_viz.
        on_trace: called with each stopped profiler, after its files are written.
        name: of the callback.

    Raises:
        ConfigError: when a run begins without a `run_dir`, and there is no `dir` and no `on_trace`.

    Examples:
        >>> import purestep as ps
        >>> import torch
        >>> tx = ps.optim.sgd(0.1)
        >>> step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        >>> state = ps.init(lambda: torch.nn.Linear(2, 1), tx)
        >>> train = ps.data.batches({"x": torch.ones(8, 2)}, 2)
        >>> names = []
        >>> look = lambda p: names.extend(e.key for e in p.key_averages() if e.key.startswith("purestep step"))
        >>> profiled = profile(every=ps.every.steps(2), steps=2, on_trace=look)
        >>> _ = ps.fit(step, state, train, until=ps.epochs(2), callbacks=[profiled])
        >>> sorted(names)
        ['purestep step 2', 'purestep step 3']

    Reference: `torch.profiler.profile`; `lightning.pytorch.profilers.PyTorchProfiler`.
    """
    place = None if dir is None else _cells.located(dir)
    return Profile(every, steps, repeat, place, shapes, stack, memory, on_trace, name)
