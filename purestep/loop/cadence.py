"""When things happen: the algebra of `every` (recurring) and `until` (the end of a run).

Frozen values over the run's own cursor and clock. They answer two questions: is it now, and how far is it at most
until the next time. Combine them with `|` (either) and, for `until`, `&` (both).
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from purestep.arguments import checked
from purestep.errors import ConfigError, explain
from purestep.loop.events import EpochDone, Event, Horizon, StepsDone, View


def _positive(value: float, call: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(explain("a cadence is a positive number", where=call.format(repr(value))))


def _whole(value: int, call: str) -> None:
    _positive(value, call)
    if not isinstance(value, int):
        raise ConfigError(explain("steps and epochs are counted in a whole number", where=call.format(repr(value))))


def _same_kind(a: object, b: object, kind: type, instead: str) -> None:
    if not isinstance(b, kind):
        where = f"{a} with {b!r}"
        raise ConfigError(explain("a cadence is combined with a cadence of its own kind", where=where, instead=instead))


# --- every --------------------------------------------------------------------------------------------------------


class Every:
    """A recurring moment of the run."""

    argument_hint: ClassVar[str] = "ps.every.steps(100), ps.every.epoch() or ps.every.seconds(60)"

    def due(self, event: Event, view: View) -> bool:
        """Tell whether the moment is at this event."""
        raise ConfigError(explain(f"{type(self).__name__} does not say when it is due"))

    def horizon(self, view: View) -> Horizon:
        """Tell how far it is until the next moment."""
        return Horizon()

    def __or__(self, other: Every) -> Every:
        _same_kind(self, other, Every, "ps.every.steps(100) | ps.every.epoch()")
        return EitherEvery(self, other)


@dataclasses.dataclass(frozen=True)
class EverySteps(Every):
    """Every n batches, counted over the whole run."""

    n: int

    def due(self, event: Event, view: View) -> bool:
        return isinstance(event, StepsDone) and event.count > 0 and view.cursor.batches % self.n == 0

    def horizon(self, view: View) -> Horizon:
        return Horizon(self.n - view.cursor.batches % self.n)


@dataclasses.dataclass(frozen=True)
class EveryEpoch(Every):
    """At the end of every n-th epoch."""

    n: int = 1

    def due(self, event: Event, view: View) -> bool:
        return isinstance(event, EpochDone) and event.epoch % self.n == 0


@dataclasses.dataclass(frozen=True)
class EverySeconds(Every):
    """Every s seconds of training, at the first boundary after them. When exactly depends on the machine's speed."""

    s: float

    def due(self, event: Event, view: View) -> bool:
        return isinstance(event, StepsDone) and view.elapsed // self.s > view.boundary // self.s

    def horizon(self, view: View) -> Horizon:
        return Horizon(None, (math.floor(view.boundary / self.s) + 1) * self.s)


@dataclasses.dataclass(frozen=True)
class EitherEvery(Every):
    """Whenever either of two is due."""

    a: Every
    b: Every

    def due(self, event: Event, view: View) -> bool:
        return self.a.due(event, view) or self.b.due(event, view)

    def horizon(self, view: View) -> Horizon:
        return self.a.horizon(view) & self.b.horizon(view)


class every:
    """Recurring moments: `every.steps(n)`, `every.epoch(n=1)`, `every.seconds(s)`; combine with `|`.

    Examples:
        >>> every.steps(100) | every.epoch()
        EitherEvery(a=EverySteps(n=100), b=EveryEpoch(n=1))
    """

    @staticmethod
    def steps(n: int) -> Every:
        """Every n batches, counted over the whole run (a resume does not shift them)."""
        _whole(n, "every.steps({})")
        return EverySteps(n)

    @staticmethod
    def epoch(n: int = 1) -> Every:
        """At the end of every n-th epoch."""
        _whole(n, "every.epoch({})")
        return EveryEpoch(n)

    @staticmethod
    def seconds(s: float) -> Every:
        """Every s seconds of training."""
        _positive(s, "every.seconds({})")
        return EverySeconds(s)


# --- until --------------------------------------------------------------------------------------------------------


class Until:
    """The end of a run."""

    def reached(self, view: View) -> bool:
        """Tell whether the run is at its end, or past it."""
        raise ConfigError(explain(f"{type(self).__name__} does not say when it is reached"))

    def horizon(self, view: View) -> Horizon:
        """Tell how far it is at most."""
        return Horizon()

    @property
    def epochs(self) -> int | None:
        """Number of epochs, where the end is known in epochs."""
        return None

    @property
    def steps(self) -> int | None:
        """Number of batches, where the end is known in batches."""
        return None

    def __or__(self, other: Until) -> Until:
        _same_kind(self, other, Until, "ps.epochs(2) | ps.steps(100)")
        return EitherUntil(self, other)

    def __and__(self, other: Until) -> Until:
        _same_kind(self, other, Until, "ps.epochs(2) & ps.seconds(60)")
        return BothUntil(self, other)


@dataclasses.dataclass(frozen=True)
class UntilSteps(Until):
    n: int

    def reached(self, view: View) -> bool:
        return view.cursor.batches >= self.n

    def horizon(self, view: View) -> Horizon:
        return Horizon(max(self.n - view.cursor.batches, 0))

    @property
    def steps(self) -> int | None:
        return self.n

    def __str__(self) -> str:
        return f"{self.n} steps"


@dataclasses.dataclass(frozen=True)
class UntilEpochs(Until):
    n: int

    def reached(self, view: View) -> bool:
        return view.cursor.epoch >= self.n

    @property
    def epochs(self) -> int | None:
        return self.n

    def __str__(self) -> str:
        return f"{self.n} epochs"


@dataclasses.dataclass(frozen=True)
class UntilSeconds(Until):
    s: float

    def reached(self, view: View) -> bool:
        return view.elapsed >= self.s

    def horizon(self, view: View) -> Horizon:
        return Horizon(None, self.s)

    def __str__(self) -> str:
        short = f"{self.s:g}"
        return f"{short if float(short) == self.s else repr(self.s)} seconds"


@dataclasses.dataclass(frozen=True)
class EitherUntil(Until):
    a: Until
    b: Until

    def reached(self, view: View) -> bool:
        return self.a.reached(view) or self.b.reached(view)

    def horizon(self, view: View) -> Horizon:
        return self.a.horizon(view) & self.b.horizon(view)

    @property
    def epochs(self) -> int | None:
        return self.a.epochs if self.b.epochs is None else self.b.epochs

    @property
    def steps(self) -> int | None:
        return self.a.steps if self.b.steps is None else self.b.steps

    def __str__(self) -> str:
        return f"{self.a} or {_grouped(self.b, EitherUntil)}"


@dataclasses.dataclass(frozen=True)
class BothUntil(Until):
    a: Until
    b: Until

    def reached(self, view: View) -> bool:
        return self.a.reached(view) and self.b.reached(view)

    def horizon(self, view: View) -> Horizon:
        open_ = [u.horizon(view) for u in (self.a, self.b) if not u.reached(view)]
        return open_[0] & open_[-1] if open_ else Horizon()

    def __str__(self) -> str:
        return f"{_grouped(self.a, EitherUntil)} and {_grouped(self.b, EitherUntil, BothUntil)}"


def _grouped(end: Until, *kinds: type[Until]) -> str:
    """An end as part of another one, in parentheses where `ps.until` would read the whole differently without."""
    return f"({end})" if isinstance(end, kinds) else str(end)


@checked(ConfigError)
def steps(n: int) -> Until:
    """End after n batches.

    Examples:
        >>> print(steps(1000) | seconds(60))
        1000 steps or 60 seconds
    """
    _whole(n, "steps({})")
    return UntilSteps(n)


@checked(ConfigError)
def epochs(n: int) -> Until:
    """End after n epochs."""
    _whole(n, "epochs({})")
    return UntilEpochs(n)


@checked(ConfigError)
def seconds(s: float) -> Until:
    """End at the first batch after s seconds of training, over all processes that took part, with a snapshot.

    Which batch that is depends on the speed of the machine: no bit of the run up to there does.
    """
    _positive(s, "seconds({})")
    return UntilSeconds(s)


@checked(ConfigError)
def minutes(n: float) -> Until:
    """End after n minutes of training, as `seconds(60 * n)`.

    Examples:
        >>> print(epochs(5) | minutes(30))
        5 epochs or 1800 seconds
    """
    _positive(n, "minutes({})")
    return UntilSeconds(60 * n)


@checked(ConfigError)
def hours(n: float) -> Until:
    """End after n hours of training, as `seconds(3600 * n)`.

    Examples:
        >>> hours(1.5) == minutes(90)
        True
    """
    _positive(n, "hours({})")
    return UntilSeconds(3600 * n)
