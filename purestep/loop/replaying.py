"""A run that is executed again from some position, in memory: through the same machine, step and data.

It takes no snapshot, writes no log and answers no signal. `record` iterates it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from purestep import data, metrics, snapshot
from purestep.loop import resume as resume_
from purestep.loop.events import (
    Callback,
    Effect,
    Event,
    Horizon,
    LoopState,
    Save,
    Saved,
    StepsDone,
    View,
)
from purestep.loop.identity import Identity, check_resumed, warmup_of
from purestep.loop.options import RunArguments
from purestep.loop.run import Run
from purestep.step_protocol import warmed_up

_NAME = "purestep.replay"


@dataclasses.dataclass(frozen=True)
class _EachStep:
    """Asks for a snapshot after every batch: the moment at which nothing of the loop state is out of date."""

    name: str = _NAME

    def init(self) -> None:
        return None

    def identity(self) -> None:
        """Return None: it does not change the run."""

    def react(self, own: Any, event: Event, view: View) -> tuple[Any, tuple[Effect, ...]]:
        return own, ((Save(),) if isinstance(event, StepsDone) else ())

    def horizon(self, view: View) -> Horizon:
        return Horizon(1)


class Replaying(Run):
    """A run as an iterator of events, in which a `Saved` event follows each batch: there a snapshot would be taken.

    Args:
        arguments: those of the run; `run_dir` and `loggers` are not used.
        start: the loop of the snapshot to begin at, None for the beginning.
        manifest: of that snapshot; at the beginning, that of any snapshot of the run. None does not compare.
        warn: say what is other than the snapshot records, on the first rank; `arguments.strict` refuses it.

    Attributes:
        batch: the last batch.
    """

    _speaks: ClassVar[bool] = False

    def __init__(
        self,
        arguments: RunArguments,
        start: LoopState | None = None,
        manifest: snapshot.Manifest | None = None,
        *,
        warn: bool = True,
    ) -> None:
        self._start, self._manifest, self._warns = start, manifest, warn
        self._refuses = arguments.strict
        callbacks: tuple[Callback, ...] = (*arguments.callbacks, _EachStep())
        super().__init__(dataclasses.replace(arguments, callbacks=callbacks, run_dir=None, loggers=()))
        self.batch: Any = None

    def _begin(self, store: snapshot.Store | None, identity: Identity) -> tuple[LoopState, int | None]:
        loop = self.machine.init(self._given)
        at = None if self._start is None else self._start.cursor.batches
        if self._start is not None:
            loop = resume_.adopt(loop, self._start, self.machine)
            self._start = None  # its train state may be large, and donated
        if self._manifest is not None:
            self._step = self._guard.step = resume_.settled(self._step, self._manifest)
            silent = not (self._warns and self._ranks.first)
            length = self._feed.length
            check_resumed(self._manifest, identity, loop.cursor, length, strict=self._refuses, silent=silent)
        return loop, at

    def _warm_up(self, store: snapshot.Store | None) -> None:
        """Switch where the run did; what it trained before it had decided is computed uncompiled."""
        counter = None if self._manifest is None else warmup_of(self._manifest.info)
        if counter is not None:
            self._step = self._guard.step = warmed_up(self._step, counter)

    def _chunk(
        self, state: Any, batches: Iterator[Any], elapsed: float | None
    ) -> tuple[Any, metrics.Recorder, bool, Any]:
        chunk = super()._chunk(state, batches, elapsed)
        self.batch = chunk[3]
        return chunk

    def _perform(self, effect: Effect) -> Iterator[Event]:
        if isinstance(effect, Save):
            yield Saved(self.loop.cursor.batches)
        else:
            yield from super()._perform(effect)

    @property
    def source(self) -> data.Source:
        """The source that it reads."""
        return self._feed.source

    def savable(self) -> LoopState:
        """Return the loop as a snapshot of this position holds it.

        Raises:
            DataError: the data has a state that no snapshot can hold.
        """
        callbacks = {name: own for name, own in self.loop.callbacks.items() if name != _NAME}
        cursor = self.loop.cursor.replace(loader=self._feed.loader_state())
        return self.loop.replace(cursor=cursor, callbacks=callbacks)
