"""The pure machine: `transition(loop, event) -> (loop, effects)`.

It decides everything and does nothing. It is total (every event is allowed in every state) and deterministic, so a run
replays from its events. It knows neither torch nor files; the interpreter in `run.py` performs the effects.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

from purestep import metrics as metrics_
from purestep.errors import ConfigError, explain
from purestep.loop.cadence import Until
from purestep.loop.events import (
    Callback,
    Copied,
    CopyLost,
    Effect,
    EpochDone,
    Evaluate,
    Evaluated,
    Event,
    Failed,
    Interrupted,
    Log,
    LoopState,
    Resumed,
    Save,
    Saved,
    SaveLost,
    Started,
    StepsDone,
    Stop,
    Stopped,
    Switched,
    Ticked,
    Train,
    Transform,
    Transformed,
    View,
)
from purestep.loop.roles import Transformer

# A chunk of steps without any boundary ends here, so that metrics waiting to be read stay few. That changes no bit.
LONGEST_CHUNK = 1000
# Facts whose moment depends on the disk, the compiler or the clock. Callbacks do not hear of them: their states are
# functions of the data.
_TIMING = (Saved, SaveLost, Copied, CopyLost, Ticked, Switched, Failed, Stopped)


@dataclasses.dataclass(frozen=True)
class Machine:
    """The decisions of a run.

    Attributes:
        callbacks: in any order; names must differ.
        until: where the run ends.
        length: batches an epoch, None when unknown.
    """

    callbacks: tuple[Callback, ...]
    until: Until
    length: int | None = None

    def __post_init__(self) -> None:
        names = [callback.name for callback in self.callbacks]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    explain(
                        f"two callbacks are named {name!r}",
                        where="; ".join(repr(callback) for callback in self.callbacks if callback.name == name),
                        why="a callback's state is stored under its name",
                        instead=f"give one of them another: name='{name}2'",
                    )
                )

    @functools.cached_property
    def _by_name(self) -> tuple[Callback, ...]:
        return tuple(sorted(self.callbacks, key=lambda callback: callback.name))

    def init(self, train: object) -> LoopState:
        """Return the loop at the start of a run."""
        return LoopState(train, callbacks={c.name: c.init() for c in self.callbacks})

    def transition(self, loop: LoopState, event: Event) -> tuple[LoopState, tuple[Effect, ...]]:
        """Return the loop after an event, and the effects that follow.

        A snapshot comes only when every other effect of that moment was fed back, so that it holds no stale state.
        """
        if isinstance(event, Ticked):
            return loop.replace(elapsed=event.seconds), ()
        if isinstance(event, _TIMING):
            return loop, ()
        event = self.completed(loop, event)
        loop = self._record(loop, event)
        loop, effects = self._ask(loop, event)
        if isinstance(event, StepsDone):
            loop = loop.replace(status=loop.status.replace(boundary=loop.elapsed))
        return self._decide(loop, event, effects)

    def completed(self, loop: LoopState, event: Event) -> Event:
        """Return an event with what only the loop before it knows: the number of an epoch, and its weighted means."""
        if not isinstance(event, EpochDone) or event.epoch:
            return event
        means = metrics_.compute(loop.status.sums)
        return EpochDone(loop.cursor.epoch + 1, {f"train/{name}_epoch": value for name, value in means.items()})

    # --- what the event says --------------------------------------------------------------------------------------

    def _record(self, loop: LoopState, event: Event) -> LoopState:
        cursor, status = loop.cursor, loop.status
        if isinstance(event, Resumed):
            status = status.replace(stop=None)
        elif isinstance(event, StepsDone):
            cursor = cursor.replace(batch=cursor.batch + event.count, batches=cursor.batches + event.count)
            status = status.replace(sums=metrics_.fold(status.sums, event.metrics))
        elif isinstance(event, EpochDone):
            cursor = cursor.replace(epoch=event.epoch, batch=0)
            status = status.replace(sums={}, metrics=status.metrics | dict(event.row))
        elif isinstance(event, Evaluated):
            status = status.replace(due=_without(status.due, event.name), metrics=status.metrics | dict(event.row))
        elif isinstance(event, Transformed):
            status = status.replace(due=_without(status.due, event.name))
            loop = loop.replace(train=event.train)
        elif isinstance(event, Interrupted):
            status = status.replace(stop=event.signal)
        return loop.replace(cursor=cursor, status=status)

    # --- what the callbacks say -----------------------------------------------------------------------------------

    def _ask(self, loop: LoopState, event: Event) -> tuple[LoopState, list[Effect]]:
        view, owns = View(loop, self.length), dict(loop.callbacks)
        asked: list[Effect] = []
        for callback in self._by_name:
            owns[callback.name], effects = callback.react(owns[callback.name], event, view)
            asked.extend(effects)
        return loop.replace(callbacks=owns), asked

    # --- what follows ---------------------------------------------------------------------------------------------

    def _decide(self, loop: LoopState, event: Event, effects: Sequence[Effect]) -> tuple[LoopState, tuple[Effect, ...]]:
        status = loop.status
        out: list[Effect] = []
        new: list[Evaluate | Transform] = []
        latest, due, save, stop = status.metrics, status.due, status.save, status.stop
        for effect in effects:
            if isinstance(effect, Log):
                latest = latest | dict(effect.row)
                out.append(effect)
            elif isinstance(effect, (Evaluate, Transform)):
                if effect.name not in status.due:
                    new.append(effect)
                    due = (*due, effect.name)
            elif isinstance(effect, Stop):
                stop = stop or effect.reason
            elif isinstance(effect, Save):
                save = True
        status = status.replace(metrics=latest, due=due, save=save, stop=stop)
        if isinstance(event, StepsDone) and event.epoch_end:
            return loop.replace(status=status), tuple(out)  # EpochDone follows; everything waits for it
        if isinstance(event, Interrupted):
            return loop.replace(status=status), (*out, Save(), Stop(event.signal))
        if due:
            ask = self._due(due) if isinstance(event, EpochDone | StepsDone | Started | Resumed) else tuple(new)
            return loop.replace(status=status), (*out, *ask)
        if stop is None and self.until.reached(View(loop, self.length)):
            stop = f"reached {self.until}"
        status = status.replace(save=False, stop=stop)
        loop = loop.replace(status=status)
        if stop is not None:
            return loop, (*out, Save(), Stop(stop))
        return loop, (*out, *([Save()] if save else []), self._train(loop))

    def _due(self, due: Iterable[str]) -> tuple[Effect, ...]:
        transforms = {c.name for c in self.callbacks if isinstance(c, Transformer)}
        effects: list[Effect] = [Transform(n) if n in transforms else Evaluate(n) for n in due]
        return tuple(sorted(effects, key=lambda e: isinstance(e, Evaluate)))

    def _train(self, loop: LoopState) -> Train:
        view = View(loop, self.length)
        horizons = [self.until.horizon(view), *[callback.horizon(view) for callback in self.callbacks]]
        batches = [h.batches for h in horizons if h.batches is not None]
        if self.length is not None:
            batches.append(self.length - loop.cursor.batch)
        seconds = [h.elapsed for h in horizons if h.elapsed is not None]
        return Train(max(min([LONGEST_CHUNK, *batches]), 1), min(seconds, default=None))


def _without(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(n for n in names if n != name)
