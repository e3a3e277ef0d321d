"""`observe`: what a function of the train state returns goes to the loggers: sample images, histograms, texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from purestep.arguments import Name, checked
from purestep.callbacks.base import Reducer
from purestep.errors import ConfigError
from purestep.loop.cadence import Every
from purestep.loop.events import Event, LoopState
from purestep.loop.roles import Moments, Observer, Recurring, Row


@dataclasses.dataclass(frozen=True)
class Observe(Recurring, Reducer, Observer):
    """See `observe`."""

    function: Callable[[Any], Row] = dataclasses.field(repr=False)
    every: Every
    name: str

    def identity(self) -> None:
        """Return None: it cannot change the run."""

    def open_sink(self, run_dir: Path | None, length: int | None) -> _Rows:
        return _Rows(self, length)


class _Rows:
    def __init__(self, settings: Observe, length: int | None) -> None:
        self._function, self._moments = settings.function, Moments(settings.every, length)

    def receive(self, event: Event, loop: LoopState) -> Row | None:
        return self._function(loop.train) if self._moments.due(event, loop) else None

    def close(self) -> None:
        """Nothing is held open."""


@checked(ConfigError)
def observe(function: Callable[[Any], Row], *, every: Every, name: Name = "observe") -> Observe:
    """Log what a function of the train state returns: numbers, images, histograms and texts.

    The row goes to the loggers and into no state, so the run keeps its bits, and each logger writes the kinds that it
    takes. If the function raises, it is reported and left out, and training goes on. It is called on rank 0 alone:
    under a plan that shards the state it sees the shards of that rank, and must not gather.

    Args:
        function: `function(state) -> row`: values by name, each a number, or an `Image`, `Histogram` or `Text` of
            `ps.loggers`.
        every: when.
        name: of the callback.

    Examples:
        >>> import torch
        >>> import purestep as ps
        >>> observe(lambda state: {"weights": ps.loggers.Histogram(state.params["weight"])}, every=ps.every.epoch())
        Observe(every=EveryEpoch(n=1), name='observe')
    """
    return Observe(function, every, name)
