"""The vocabulary of the loop: its state, the facts it is told (events) and what is to be done (effects).

Everything here is a value. The machine turns events into effects, the interpreter turns effects into events.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from purestep.metrics import Metric
from purestep.tree import pytree, replaced

# --- the whole run in one value -----------------------------------------------------------------------------------


@pytree(eq=True)
class Cursor:
    """How far the run has come in the data.

    Attributes:
        epoch: epochs completed.
        batch: batches consumed of the current epoch.
        batches: batches consumed in all.
        loader: the state of a third-party loader that keeps its own; None otherwise. Where `batch` is 0 it is that of
            the end of the epoch before.
    """

    epoch: int = 0
    batch: int = 0
    batches: int = 0
    loader: Any = None
    replace = replaced


@pytree
class Status:
    """What the machine remembers between two events.

    Attributes:
        metrics: the latest value of everything that was logged or evaluated, by name.
        sums: metrics of the current epoch so far.
        due: names of the evaluations and transforms that were asked for and are not done yet.
        save: whether a snapshot was asked for and is not taken yet.
        stop: why the run is to stop, None while it is not.
        boundary: seconds elapsed when the last batches were done.
    """

    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    sums: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    due: tuple[str, ...] = ()
    save: bool = False
    stop: str | None = None
    boundary: float = 0.0
    replace = replaced


@pytree
class LoopState:
    """The whole run in one value.

    Attributes:
        train: the train state, any pytree.
        cursor: position in the data.
        callbacks: each callback's own state by its name.
        status: what the machine remembers.
        elapsed: seconds of training so far, over all processes that took part.
    """

    train: Any
    cursor: Cursor = dataclasses.field(default_factory=Cursor)
    callbacks: dict[str, Any] = dataclasses.field(default_factory=dict)
    status: Status = dataclasses.field(default_factory=Status)
    elapsed: float = 0.0
    replace = replaced


# --- events: what happened ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Event:
    """A fact."""


@dataclasses.dataclass(frozen=True)
class Started(Event):
    """The run begins at its beginning."""


@dataclasses.dataclass(frozen=True)
class Resumed(Event):
    """The run continues from a snapshot."""

    step: int


@dataclasses.dataclass(frozen=True)
class StepsDone(Event):
    """Some batches were trained on.

    Attributes:
        count: number of batches.
        metrics: the metrics of each batch, read to the host.
        epoch_end: whether they were the last of their epoch; then EpochDone follows.
    """

    count: int
    metrics: Sequence[Mapping[str, Metric]] = ()
    epoch_end: bool = False


@dataclasses.dataclass(frozen=True)
class EpochDone(Event):
    """An epoch is complete. The machine fills in its number, from 1, and the row of its weighted means.

    Attributes:
        epoch: number of epochs that are complete.
        row: weighted means over the epoch, by `train/<metric>_epoch`.
    """

    epoch: int = 0
    row: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Evaluated(Event):
    """An evaluation is complete; row holds `<name>/<metric>`."""

    name: str
    row: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Transformed(Event):
    """The train state was replaced by a named pure function of itself."""

    name: str
    train: Any


@dataclasses.dataclass(frozen=True)
class Saved(Event):
    """A snapshot became durable. When that is depends on the disk, so callbacks are not told."""

    step: int


@dataclasses.dataclass(frozen=True)
class SaveLost(Event):
    """A snapshot could not be written; earlier ones are untouched and the next one is tried as planned."""

    error: str


@dataclasses.dataclass(frozen=True)
class Copied(Event):
    """The snapshot of a step is complete in the remote copy of the run directory. Callbacks are not told."""

    step: int


@dataclasses.dataclass(frozen=True)
class CopyLost(Event):
    """The remote copy could not be brought up to date; what is there is untouched, and it is tried again."""

    error: str


@dataclasses.dataclass(frozen=True)
class Ticked(Event):
    """So many seconds of training have elapsed."""

    seconds: float


@dataclasses.dataclass(frozen=True)
class Switched(Event):
    """A step of `warmup="eager"` was compiled: it runs compiled where `state.step` is this counter or more.

    When that is depends on the compiler, so callbacks are not told; snapshots record it.
    """

    counter: int


@dataclasses.dataclass(frozen=True)
class Interrupted(Event):
    """A signal asked the run to end."""

    signal: str


@dataclasses.dataclass(frozen=True)
class Failed(Event):
    """An exception ends the run."""

    error: str


@dataclasses.dataclass(frozen=True)
class Stopped(Event):
    """The run has ended; always the last event."""

    reason: str


# --- effects: what is to be done ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Effect:
    """Something the interpreter is to do."""


@dataclasses.dataclass(frozen=True)
class Train(Effect):
    """Train on up to `n` batches, and no longer than until `elapsed` seconds (None: no limit)."""

    n: int
    elapsed: float | None = None


@dataclasses.dataclass(frozen=True)
class Evaluate(Effect):
    """Run the evaluation of the callback of this name."""

    name: str


@dataclasses.dataclass(frozen=True)
class Transform(Effect):
    """Replace the train state by the pure function of the callback of this name."""

    name: str


@dataclasses.dataclass(frozen=True)
class Save(Effect):
    """Take a snapshot of the whole loop state."""


@dataclasses.dataclass(frozen=True)
class Log(Effect):
    """Write a row to the loggers, at `state.step`."""

    row: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Stop(Effect):
    """End the run."""

    reason: str


# --- what features look like --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Horizon:
    """How far the loop may run before someone wants to be asked: in batches, and in seconds elapsed. None: no limit."""

    batches: int | None = None
    elapsed: float | None = None

    def __and__(self, other: Horizon) -> Horizon:
        """Return the nearer of two horizons, in each measure."""
        return Horizon(_nearer(self.batches, other.batches), _nearer(self.elapsed, other.elapsed))


def _nearer(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else min(a, b)


@dataclasses.dataclass(frozen=True)
class View:
    """What a callback may look at: the loop after the event, and the length of an epoch. Read-only."""

    loop: LoopState
    length: int | None = None

    @property
    def cursor(self) -> Cursor:
        return self.loop.cursor

    @property
    def train(self) -> Any:
        return self.loop.train

    @property
    def metrics(self) -> Mapping[str, float]:
        return self.loop.status.metrics

    @property
    def elapsed(self) -> float:
        return self.loop.elapsed

    @property
    def boundary(self) -> float:
        """Seconds elapsed when the batches before the latest were done."""
        return self.loop.status.boundary


@runtime_checkable
class Callback(Protocol):
    """A feature of the loop: a frozen value with a name, and a pure reducer of its own state.

    It sees a read-only view, owns only its own state, and never sees other callbacks, so their order does not matter.
    """

    @property
    def name(self) -> str: ...

    def init(self) -> Any:
        """Return the own state at the start of a run: a pytree."""

    def react(self, own: Any, event: Event, view: View) -> tuple[Any, tuple[Effect, ...]]:
        """Return the own state after an event, and effects. Pure: same inputs, same outputs."""
        ...

    def horizon(self, view: View) -> Horizon:
        """Announce the next boundary at which this callback wants to be asked."""
        ...
