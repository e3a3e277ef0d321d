"""The interpreter: the only impure room of the loop.

It performs the machine's effects (trains, evaluates, saves, logs), reads the clock and the signals, and feeds facts
back. `Run` is an iterator of events; `purestep.fit` makes and drains it.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from purestep import data, loggers, metrics, snapshot, tree
from purestep.errors import ConfigError, SaveFailed, explain
from purestep.jit import donate as donate_
from purestep.loop import resume as resume_
from purestep.loop.agree import Alone
from purestep.loop.arguments import check_arguments
from purestep.loop.cadence import Until
from purestep.loop.events import (
    Callback,
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
    Ticked,
    Train,
    Transform,
    Transformed,
)
from purestep.loop.feed import Feed, device_of
from purestep.loop.guard import Guard
from purestep.loop.machine import Machine
from purestep.loop.outlets import Outlets
from purestep.loop.precheck import check_callbacks
from purestep.loop.ranks import Ranks
from purestep.loop.result import Result
from purestep.loop.signals import Lock, Signals

# A snapshot that is due waits so long at most for the one before it; on a slower disk it is left out.
SLOW_DISK_SECONDS = 30.0
StepFn = Callable[[Any, Any], tuple[Any, Any]]


class Run:
    """A run as an iterator of events. Made by `run`; iterate it once.

    Attributes:
        loop: the whole run in one value, as of the last event.
        run_dir: the run directory, None without one.
    """

    loop: LoopState

    def __init__(
        self,
        step: StepFn,
        state: Any,
        train: Any,
        *,
        until: Until,
        callbacks: Sequence[Callback] = (),
        loggers: Sequence[loggers.Logger] | None = None,
        run_dir: str | Path | None = None,
        resume: resume_.Resume = "auto",
        on_save_error: Literal["continue", "stop"] = "continue",
        strict: bool = False,
        grace_seconds: float | None = None,
        donate: bool = False,
    ) -> None:
        check_arguments(step, until, on_save_error)
        step = donate_(step) if donate else step
        resume_.check_resume_argument(resume)
        check_callbacks(callbacks)
        self._guard = Guard(step)
        self._step, self._given, self._resume, self._strict = step, state, resume, strict
        self._on_save_error, self._grace = on_save_error, grace_seconds
        self._skipped, self._abandoned, self._unsaved = 0, False, False
        self.run_dir = None if run_dir is None else Path(run_dir).absolute()
        self._signals = Signals()
        self._ranks = Ranks.of(step)
        self._outside: Alone = self._ranks.outside(self._signals)
        source = self._ranks.share(data.as_source(train))
        self._feed = Feed(source, device_of(state), lambda: self._signals.unread, alone=self._ranks.alone)
        self.callbacks = tuple(callbacks)
        self._by_name = {c.name: c for c in self.callbacks}
        self.machine = Machine(self.callbacks, until, self._feed.length)
        self._outlets = Outlets(loggers, self.run_dir, silent=not self._ranks.first, hurry=self._grace_left)
        self._lock: Lock | None = None
        self._store: snapshot.Store | None = None
        self._saved: Any = None
        self._checked = False
        self.loop = self.machine.init(state)
        self.reason: str | None = None
        self._events: Iterator[Event] | None = None

    # --- iterating ------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Event]:
        if self._events is None:
            self._events = self._run()
        return self._events

    def __next__(self) -> Event:
        return next(iter(self))

    def result(self) -> Result:
        """Return what the run has come to; complete once the iteration is over."""
        reason = self.reason or "not finished"
        return Result(self.loop.train, self.loop.status.metrics, reason, self.run_dir, self.loop, self._unsaved)

    def _run(self) -> Iterator[Event]:
        with contextlib.ExitStack() as stack:
            stack.callback(self._feed.close)
            stack.enter_context(self._ranks)
            self._open_store(stack)
            self.loop, at = resume_.begin(
                self.machine,
                self._given,
                self._store,
                self._resume,
                step=self._step,
                strict=self._strict,
                silent=not self._ranks.first,
            )
            if at is not None and self._store is not None:
                self._step = self._guard.step = resume_.settled(self._step, self._store.read_manifest(at))
            self._ranks.compare(self._step, self.machine, self.loop, at, self._feed.source)
            if self._store is not None:
                self._store.check(self.loop)
            if at is None and getattr(self._step, "donate", False):
                # A donating step consumes the state it is given; the one that was given to us is not ours to give.
                self.loop = self.loop.replace(train=tree.map(_copied, self.loop.train))
            self._given = None
            self._saved = None if at is None else _position(self.loop)
            stack.enter_context(self._signals)
            stack.enter_context(self._outlets)
            self._outlets.open(self.callbacks, self.loop, self._feed.length, resumed=at is not None)
            try:
                yield from self._interpret(Started() if at is None else Resumed(at))
            except GeneratorExit:
                raise
            except BaseException as error:
                self._ranks.tell(error)
                self._outlets.event(Failed(f"{type(error).__name__}: {error}"), self.loop)
                raise

    def _open_store(self, stack: contextlib.ExitStack) -> None:
        if self.run_dir is not None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if self._ranks.first:
                self._lock = stack.enter_context(Lock(self.run_dir))
                # What a process that was killed left half-written.
                snapshot.disk.clean(resume_.store_root(self.run_dir))
            root, keep = resume_.store_root(self.run_dir), _keep(self.callbacks)
            self._store = snapshot.Store(root, keep=keep, ranks=self._ranks.for_store())
            stack.push(self._leave_store)
        elif any(hasattr(c, "keep") for c in self.callbacks):
            raise ConfigError(
                explain("snapshots need a place", where="run_dir=None", instead='ps.fit(..., run_dir="runs/name")')
            )

    def _leave_store(self, *error: Any) -> None:
        if self._store is None:
            return
        if not self._abandoned:
            self._store.__exit__(*error)
        elif self._lock is not None:
            self._lock.keep_while(self._store.busy)

    def _interpret(self, first: Event) -> Iterator[Event]:
        outside = self._outside
        outside.begin(self.loop.elapsed, self.loop.cursor.batches)
        queue: collections.deque[Effect] = collections.deque()
        yield from self._tell(first, queue)
        while queue or outside.unread:
            if outside.unread:
                kept = [e for e in queue if isinstance(e, Log)]
                queue.clear()
                queue.extend(kept)
                yield from self._tell(Interrupted(outside.read()), queue)
                continue
            wished = queue.popleft()
            effect = wished if isinstance(wished, Log) else outside.wish(wished)
            if effect is None:
                continue
            if isinstance(effect, Stop):
                yield from self._finish(effect.reason, queue)
                return
            for event in self._perform(effect):
                yield from self._tell(event, queue)

    def _tell(self, event: Event, queue: collections.deque[Effect]) -> Iterator[Event]:
        self.loop, effects = self.machine.transition(self.loop, event)
        queue.extend(effects)
        self._outlets.event(event, self.loop)
        yield event

    # --- performing effects ---------------------------------------------------------------------------------------

    def _perform(self, effect: Effect) -> Iterator[Event]:
        if isinstance(effect, Train):
            yield from self._train(effect)
        elif isinstance(effect, Evaluate):
            row = self._ranks.evaluate(self._performer(effect), self.loop.train, self._outside)
            yield Ticked(self._outside.elapsed())
            if row is not None:
                yield Evaluated(effect.name, row)
        elif isinstance(effect, Transform):
            yield Transformed(effect.name, self._performer(effect).transform(self.loop.train))
        elif isinstance(effect, Save):
            yield from self._save()
        elif isinstance(effect, Log):
            self._outlets.log(resume_.applied_steps(self.loop), {"epoch": self.loop.cursor.epoch, **effect.row})

    def _performer(self, effect: Evaluate | Transform) -> Any:
        """The callback that wished it also knows how it is done."""
        return self._by_name[effect.name]

    def _train(self, effect: Train) -> Iterator[Event]:
        cursor = self.loop.cursor
        state, record, cut = self._burst(self.loop.train, self._feed.take(cursor, effect.n), effect.elapsed)
        steps = record.series()
        short = len(steps) < effect.n and not cut and not self._outside.unread
        end = self._feed.at_end(cursor.batch + len(steps), short)
        self.loop = self.loop.replace(train=state)
        self._outside.done(len(steps))
        yield Ticked(self._outside.elapsed())
        yield StepsDone(len(steps), steps, end)
        if end:
            self._feed.end_epoch()
            yield EpochDone()
        yield from self._durable()

    def _burst(self, state: Any, batches: Iterator[Any], elapsed: float | None) -> tuple[Any, metrics.Recorder, bool]:
        """Train on the batches of one burst, and tell whether it was cut. Nothing is read from the device here."""
        record, index = metrics.Recorder(), self.loop.cursor.batches
        if not self._checked:
            for batch in itertools.islice(batches, 1):
                state = self._first_step(state, batch, index, record)
                index += 1
                if self._outside.stop(elapsed):
                    return state, record, True
        step, stop, same, add = self._step, self._outside.stop, self._guard.same, record.add
        plain = None
        for batch in batches:
            same(batch, index)
            try:
                returned = step(state, batch)
            except Exception as error:
                self._explain(error, state, batch, index)
                raise
            state, values = returned
            if plain is None:
                plain = metrics.are_plain(values)
            add(metrics.as_metrics(values, self._ranks.samples(batch)) if plain else values)
            index += 1
            if stop(elapsed):
                return state, record, True
        return state, record, False

    def _first_step(self, state: Any, batch: Any, index: int, record: metrics.Recorder) -> Any:
        """Check all that can be checked before and after the first real step, and return the state after it."""
        contract = self._guard.first(state, batch)
        self._step = self._guard.step  # the step's own microbatches are settled by its first batch
        if self._ranks.alone:
            for callback in self.callbacks:
                if hasattr(callback, "check_first"):
                    callback.check_first(state)
        try:
            returned = self._step(state, batch)
        except Exception as error:
            self._explain(error, state, batch, index)
            raise
        contract.check(returned)
        self._checked = True
        state, values = returned
        plain = metrics.are_plain(values)
        record.add(metrics.as_metrics(values, self._ranks.samples(batch)) if plain else values)
        return state

    def _explain(self, error: Exception, state: Any, batch: Any, index: int) -> None:
        """Raise what there is to say of an error of the step besides itself."""
        explained = self._guard.explained(error, state, batch, index)
        if explained is not error:
            raise explained from error

    # --- snapshots ------------------------------------------------------------------------------------------------

    def _save(self) -> Iterator[Event]:
        if self._store is None or self._saved == _position(self.loop):
            return
        loop = self.loop.replace(cursor=self.loop.cursor.replace(loader=self._feed.loader_state()))
        if self._ranks.alone and self._store.busy(self._patience()):
            yield from self._behind()
            return
        number = loop.cursor.batches
        info = {"epoch": loop.cursor.epoch, "batch": loop.cursor.batch, "step": resume_.identity(self._step)}
        self._outlets.flush()
        try:
            latest = self._store.latest()
            if latest is not None and latest >= number:
                # The same position once more, with an evaluation that was cut off before: it takes the place of the
                # other.
                self._store.wait()
                self._store.delete_after(number - 1)
            self._store.save(number, loop, metrics=loop.status.metrics, info=info)
            self._saved = _position(self.loop)
        except SaveFailed as error:
            yield self._lost(error)

    def _patience(self) -> float:
        """How many seconds to wait for the disk: a bound while training, the grace period after a signal."""
        return min(self._grace_left(), SLOW_DISK_SECONDS if self.loop.status.stop is None else math.inf)

    def _grace_left(self) -> float:
        """How many seconds are left of the grace period; without a signal, or without a period, no end is near."""
        if self._signals.since is None or self._grace is None:
            return math.inf
        return max(0.0, self._grace - (time.monotonic() - self._signals.since))

    def _behind(self) -> Iterator[Event]:
        """The disk is still busy with the snapshot before: leave this one out, and say so once."""
        self._skipped += 1
        text = f"the disk is slower than the snapshots: that of batch {self.loop.cursor.batches} is left out"
        if self._skipped == 1:
            warnings.warn(f"{text}; the next is tried as planned", stacklevel=2)
        yield SaveLost(text)

    def _durable(self) -> Iterator[Event]:
        if self._store is None:
            return
        try:
            for number in self._store.poll():
                yield Saved(number)
        except SaveFailed as error:
            yield self._lost(error)

    def _lost(self, error: SaveFailed) -> SaveLost:
        if self._on_save_error == "stop":
            raise error
        self._saved = None
        if self._ranks.first:
            warnings.warn(f"{error}\n  training goes on; the next snapshot is tried as planned", stacklevel=2)
        return SaveLost(str(error))

    def _finish(self, reason: str, queue: collections.deque[Effect]) -> Iterator[Event]:
        if self._store is not None and self._ranks.alone and self._store.busy(self._patience()):
            self._abandoned = self._unsaved = True
            yield SaveLost(
                f"the grace period of {self._grace:g} s is over, and the last snapshot is still being written"
            )
        elif self._store is not None:
            try:
                self._store.wait()
            except SaveFailed as error:
                self._unsaved = True
                yield self._lost(error)
            yield from self._durable()
        self.reason = reason
        yield from self._tell(Stopped(reason), queue)


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _position(loop: LoopState) -> tuple[Any, ...]:
    """What tells two loop states of one run apart: a snapshot of the same position is not taken twice."""
    return loop.cursor.batches, loop.cursor.epoch, loop.status.due, loop.status.stop is None


def _keep(callbacks: Sequence[Callback]) -> snapshot.Keep:
    policies = [c.keep for c in callbacks if hasattr(c, "keep")]
    keep = policies[0] if policies else snapshot.latest(1)
    for other in policies[1:]:
        keep = keep | other
    return keep
