"""What a callback may be besides a reducer of events: each role is a base class, and none is guessed from a name.

`machine` and `run` ask `isinstance(callback, Evaluator)` and so on, so that a field or method of a user's callback
means what its author meant, whatever it is called.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from purestep.loggers.base import Media
from purestep.loop.events import Event, Horizon, LoopState, StepsDone, View

if TYPE_CHECKING:
    from purestep.loop.cadence import Every
    from purestep.snapshot import Keep


@dataclasses.dataclass(frozen=True)
class Peers:
    """What an evaluation is told about the other ranks.

    Attributes:
        plan: the plan of the step.
        meet: `meet(what, value)` returns the values of all ranks; every rank calls it.
    """

    plan: Any
    meet: Callable[[str, Any], list[Any]]


class Watcher:
    """A callback that waits for metrics by their names."""

    def watches(self) -> Sequence[str]:
        """Name the metrics that it waits for, as they are logged: `val/loss`. A run refuses names that never come."""
        return ()


class Evaluator(abc.ABC):
    """A callback that performs the effect `Evaluate` of its name."""

    @abc.abstractmethod
    def evaluate(
        self, train: Any, interrupted: Callable[[], bool], peers: Peers | None = None
    ) -> Mapping[str, float] | None:
        """Return the row of metrics, named `<name>/<metric>`, or None when a signal cut it off.

        Args:
            train: the train state, which it must leave as it is.
            interrupted: tells, between two batches, whether to give up.
            peers: the other ranks under a plan, None in a run of one process. Every rank returns the same row.
        """

    def check_first(self, train: Any) -> Sequence[str] | None:
        """Check before the first step what can be checked, and return the names of the metrics; None if not known."""
        return None

    def rereads(self) -> bool:
        """Tell whether its data can be read once more, for a trial before the run, without disturbing anything."""
        return False

    def limited(self, batches: int) -> Evaluator | None:
        """Return the same evaluation of the first batches only, for a trial before the run; None if there is none."""
        return None


class Transformer(abc.ABC):
    """A callback that performs the effect `Transform` of its name."""

    @abc.abstractmethod
    def transform(self, train: Any) -> Any:
        """Return the train state that takes the place of this one: a pure function, on every rank the same."""


class SnapshotPolicy(abc.ABC):
    """A callback that says which snapshots stay on the disk; of several, what any of them preserves."""

    @abc.abstractmethod
    def preserves(self) -> Keep:
        """Return the preservation policy."""


Row = Mapping[str, "float | Media"]


class EventSink(Protocol):
    """What an observer opens: it is shown every event, after the machine."""

    def receive(self, event: Event, loop: LoopState) -> Row | None:
        """Take an event and the loop after it. A row that is returned goes to the loggers and nowhere else: what was
        measured with a clock would make states, and metrics that callbacks wait for, differ between two runs. It may
        hold images, histograms and texts (`ps.loggers.Image`, `Histogram`, `Text`)."""

    def close(self) -> None: ...


class Moments:
    """Tells an observer, which is shown events without a view, at which of them `every` is due.

    Args:
        every: when.
        length: batches of an epoch, None where it is not known.
    """

    def __init__(self, every: Every, length: int | None) -> None:
        self._every, self._length, self._boundary = every, length, 0.0

    def due(self, event: Event, loop: LoopState) -> bool:
        """Tell whether `every` is due at an event; to be asked at each."""
        status = loop.status.replace(boundary=self._boundary)
        due = self._every.due(event, View(loop.replace(status=status), self._length))
        if isinstance(event, StepsDone):
            self._boundary = loop.elapsed
        return due


class RowSink(abc.ABC):
    """An event sink that is shown the rows of the log, too."""

    @abc.abstractmethod
    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Take a row, at the step that the loggers write it at."""


class Observer(abc.ABC):
    """A callback that shows a run to the outside. It cannot change the run; one that raises is left out."""

    @abc.abstractmethod
    def open_sink(self, run_dir: Path | None, length: int | None) -> EventSink:
        """Open what is shown the events.

        Args:
            run_dir: run directory, None without one.
            length: batches of an epoch, None where it is not known.
        """


class StepContext(Protocol):
    """What an instrument opens: it surrounds each chunk of steps, on every rank."""

    def around(self, loop: LoopState, batches: Iterator[Any]) -> AbstractContextManager[Iterator[Any]]:
        """Return a context for a chunk of steps; what it yields is iterated in place of `batches`.

        Args:
            loop: before the chunk.
            batches: of the chunk, in order; the same batches have to come of what is yielded.
        """

    def close(self) -> None: ...


class Instrument(abc.ABC):
    """A callback that measures the steps of a run, on every rank, and nothing else of it.

    Like an observer it cannot change the run, and one that raises is left out.
    """

    @abc.abstractmethod
    def open_instrument(self, run_dir: Path | None, rank: int) -> StepContext:
        """Open what surrounds the steps of this rank.

        Raises:
            ConfigError: it has no place to write to, say; the run does not begin.
        """


class Recurring:
    """A callback that acts at the moments of its field `every`."""

    every: Every

    def horizon(self, view: View) -> Horizon:
        """Announce the next of these moments."""
        return self.every.horizon(view)
