"""`tap` and `transform`: your own functions in the loop, one that looks and one that changes the train state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from purestep.arguments import Name, checked
from purestep.callbacks.base import Reaction, Reducer
from purestep.errors import ConfigError
from purestep.loop.cadence import Every
from purestep.loop.events import Event, Horizon, LoopState, Transform, View
from purestep.loop.roles import Observer, Recurring, Transformer


@dataclasses.dataclass(frozen=True)
class Tap(Reducer, Observer):
    """See `tap`."""

    function: Callable[[Event, LoopState], None] = dataclasses.field(repr=False)
    every: Every | None
    name: str

    def identity(self) -> None:
        """Return None: it cannot change the run."""

    def horizon(self, view: View) -> Horizon:
        return Horizon() if self.every is None else self.every.horizon(view)

    def open_sink(self, run_dir: Path | None, length: int | None) -> _TapSink:
        return _TapSink(self.function)


@dataclasses.dataclass(frozen=True)
class _TapSink:
    function: Callable[[Event, LoopState], None]

    def receive(self, event: Event, loop: LoopState) -> None:
        self.function(event, loop)

    def close(self) -> None:
        """Nothing is held open."""


@checked(ConfigError)
def tap(function: Callable[[Event, LoopState], None], *, every: Every | None = None, name: str = "tap") -> Tap:
    """Call a function with every event and the loop state after it: to print, to plot, to collect.

    It cannot change the run; if it raises, it is reported and left out, and training goes on.

    Args:
        function: `function(event, loop)`.
        every: have a boundary (a `StepsDone` event) at these moments too.
        name: of the callback.
    """
    return Tap(function, every, name)


@dataclasses.dataclass(frozen=True)
class TransformCallback(Recurring, Reducer, Transformer):
    """See `transform`."""

    function: Callable[[Any], Any] = dataclasses.field(repr=False)
    every: Every
    name: str

    def react(self, own: object, event: Event, view: View) -> Reaction:
        return own, ((Transform(self.name),) if self.every.due(event, view) else ())

    def transform(self, train: object) -> Any:
        return self.function(train)


@checked(ConfigError)
def transform(function: Callable[[Any], Any], *, every: Every, name: Name) -> TransformCallback:
    """Replace the train state by a pure function of it at certain moments: reset an optimizer state, prune weights.

    It is done before the evaluations of the same moment.

    Args:
        function: `function(state) -> state`, pure; it returns the structure, shapes and dtypes it is given.
        every: when.
        name: of the callback.
    """
    return TransformCallback(function, every, name)
