"""The interpreter: the only impure room of the loop.

It performs the machine's effects (trains, evaluates, saves, logs), reads the clock and the signals, and feeds facts
back. `Run` is an iterator of events; `purestep.fit` makes and drains it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import warnings
from collections.abc import Generator, Iterator, Sequence
from typing import Any, ClassVar

from purestep import _cells, data, devices, metrics, portable, snapshot
from purestep.donation import copied
from purestep.errors import ConfigError, explain
from purestep.loop import origin
from purestep.loop import resume as resume_
from purestep.loop.checks import check_names, check_place, checked_remote
from purestep.loop.clock import Alone
from purestep.loop.events import (
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
    Started,
    StepsDone,
    Stop,
    Stopped,
    Switched,
    Ticked,
    Train,
    Transform,
    Transformed,
)
from purestep.loop.identity import Identity
from purestep.loop.input import Feed, device_of
from purestep.loop.instruments import Instruments
from purestep.loop.logging import Outlets
from purestep.loop.machine import Machine
from purestep.loop.not_finite import FiniteLoss
from purestep.loop.options import RunArguments
from purestep.loop.ranks import Ranks
from purestep.loop.result import Result
from purestep.loop.roles import Evaluator, Transformer
from purestep.loop.saving import Saving
from purestep.loop.signals import Signals
from purestep.loop.skipped_updates import Skipped
from purestep.loop.stopwatch import Stopwatch
from purestep.metrics.recorder import BLOCK
from purestep.preflight import hidden_attributes, memory
from purestep.preflight.check import check_precision, check_threads
from purestep.preflight.contract import Contract
from purestep.preflight.guard import Guard, Remembered
from purestep.step_protocol import StepFn as StepFn
from purestep.step_protocol import facts_of, warmed_up


class Run:
    """A run as an iterator of events. Made by `run`; iterate it once.

    Args:
        arguments: what is run, and how. They are not kept: the state that is given may be large.

    Attributes:
        loop: the whole run in one value, as of the last event.
        run_dir: the run directory, None without one.
    """

    loop: LoopState
    # Whether it speaks to the outside: takes snapshots, writes logs, answers signals. One that is re-executed does not.
    _speaks: ClassVar[bool] = True

    def __init__(self, arguments: RunArguments) -> None:
        step = _donating(arguments.step) if arguments.donate else arguments.step
        self._guard = Guard(step)
        state = arguments.state
        if arguments.device is not None:
            state = devices.move(state, devices.default_device(arguments.device))
        self._step, self._given = step, state
        self._resume, self._strict = arguments.resume, arguments.strict
        self._program, self._settings = origin.caller(), arguments.settings or {}
        self._free = frozenset(arguments.free_settings)
        self.run_dir = None if arguments.run_dir is None else _cells.located(arguments.run_dir)
        self._signals, self._watch = Signals(), Stopwatch()
        self._ranks = Ranks.of(step)
        self._outside: Alone = self._ranks.outside(self._signals)
        source = self._ranks.share(data.as_source(arguments.train))
        self._feed = Feed(source, device_of(state), lambda: self._signals.unread, alone=self._ranks.alone)
        self.callbacks = tuple(arguments.callbacks)
        if self._speaks:
            check_place(self.run_dir, self.callbacks)
        self._by_name: dict[str, object] = {c.name: c for c in self.callbacks}
        self._skipped = Skipped(first=self._ranks.first)
        self._finite = FiniteLoss(self.callbacks, speaks=self._speaks and self._ranks.first)
        self.machine = Machine(self.callbacks, arguments.until, self._feed.length)
        self._saving = Saving(
            self.run_dir,
            self.callbacks,
            self._ranks,
            self._signals,
            on_save_error=arguments.on_save_error,
            remote=checked_remote(arguments.remote, arguments.run_dir),
            grace=arguments.grace_seconds,
        )
        self._outlets = Outlets(
            arguments.loggers,
            self.run_dir,
            silent=not (self._speaks and self._ranks.first),
            hurry=self._saving.grace_left,
        )
        self._instruments = Instruments(self.run_dir, self._ranks.rank)
        self._checked = False
        self._trial = arguments.check_evaluation
        self.loop = self.machine.init(state)
        self.reason: str | None = None
        self._origin: origin.Origin | None = None
        self._events: Generator[Event, None, None] | None = None

    # --- iterating ------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Event]:
        if self._events is None:
            self._events = self._run()
        return self._events

    def __next__(self) -> Event:
        return next(iter(self))

    def close(self) -> None:
        """End a run that is left before its end: its directory is free then, and its threads and workers end.

        The run does this itself at its end. A `with` block calls it: `with ps.run(...) as events:`.
        """
        if self._events is not None:
            self._events.close()

    def interrupt(self, signal: str = "SIGTERM") -> None:
        """Ask the run to end with a snapshot, as this signal does: for what runs it where Python has no signals."""
        self._signals.note(signal)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def result(self) -> Result:
        """Return what the run has come to; complete once the iteration is over."""
        reason = self.reason or "not finished"
        train, metrics = self.loop.train, self.loop.status.metrics
        seconds = dict(self._watch.seconds)
        return Result(train, metrics, reason, self.run_dir, self.loop, self._saving.unsaved, seconds)

    def _run(self) -> Generator[Event, None, None]:
        with contextlib.ExitStack() as stack:
            stack.callback(self._feed.close)
            stack.enter_context(self._ranks)
            portable.check()
            self._saving.open(stack)
            self._saving.fetch(self._resume)
            store = self._saving.store
            self._given = self._ranks.placed(self._given)
            held = {name: value for name, value in self._settings.items() if name not in self._free}
            self._feed.place(device := device_of(self._given))
            self._warm_up(store)
            identity = Identity(self._feed.source, self._step, self.callbacks, held, devices.name_of(device))
            self.loop, at = self._begin(store, identity)
            self._feed.begin(self.loop.cursor.loader)
            self._ranks.compare(identity, self.machine, self.loop, at)
            self._saving.begin(self.loop, at, identity)
            if at is None and facts_of(self._step).donate:
                # A donating step consumes the state it is given; the one that was given to us is not ours to give.
                self.loop = self.loop.replace(train=copied(self.loop.train))
            self._given = None
            if self._ranks.first:
                check_threads(device)
                check_precision(self._step, device)
            if self._speaks:
                stack.enter_context(self._signals)
            if self._speaks:
                stack.enter_context(self._instruments)
                self._instruments.open(self.callbacks)
            stack.enter_context(self._outlets)
            self._outlets.open(
                self.callbacks, self.loop, self._feed.length, resumed=at is not None, settings=self._settings
            )
            self._begin_origin(at)
            try:
                yield from self._interpret(Started() if at is None else Resumed(at))
            except GeneratorExit:
                raise
            except BaseException as error:
                self._ranks.tell(error)
                self._end_origin(f"{type(error).__name__}: {error}".partition("\n")[0].removesuffix(": "))
                self._outlets.event(Failed(f"{type(error).__name__}: {error}"), self.loop)
                raise

    def _begin(self, store: snapshot.Store | None, identity: Identity) -> tuple[LoopState, int | None]:
        """Return the loop to begin with, and the snapshot it comes from; settle the microbatches of the step by it."""
        silent = not self._ranks.first
        loop, at = resume_.begin(
            self.machine, self._given, store, self._resume, identity=identity, strict=self._strict, silent=silent
        )
        if at is not None and store is not None:
            self._step = self._guard.step = resume_.settled(self._step, store.read_manifest(at))
        return loop, at

    def _warm_up(self, store: snapshot.Store | None) -> None:
        """Let a step of `warmup="eager"` switch where the run has switched before, or else once it is compiled."""
        self._step = self._guard.step = warmed_up(self._step, resume_.recorded_warmup(self._step, store))

    def _switch(self) -> Iterator[Event]:
        """Go on with the compiled step, if it is there on all ranks."""
        counter = self._outside.switch
        if counter is not None:
            self._step = self._guard.step = warmed_up(self._step, counter)
            self._outside.watch(None)
            yield Switched(counter)

    def _begin_origin(self, at: int | None) -> None:
        if self._ranks.first and self.run_dir is not None:
            self._origin = origin.Origin(self.run_dir, self._program, self._settings)
            self._origin.begin(at)

    def _end_origin(self, reason: str) -> None:
        # At the old path of a run directory that was moved there may be another one by now.
        if self._origin is not None and self._saving.is_reachable():
            self._origin.end(reason, self.loop.cursor.batches)

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
            asked = queue.popleft()
            effect = asked if isinstance(asked, Log) else outside.agreed(asked)
            if effect is None:
                continue
            if isinstance(effect, Stop):
                yield from self._finish(effect.reason, queue)
                return
            for event in self._perform(effect):
                yield from self._tell(event, queue)

    def _tell(self, event: Event, queue: collections.deque[Effect]) -> Iterator[Event]:
        event = self.machine.completed(self.loop, event)
        self.loop, effects = self.machine.transition(self.loop, event)
        queue.extend(effects)
        self._outlets.event(event, self.loop)
        yield event

    # --- performing effects ---------------------------------------------------------------------------------------

    def _perform(self, effect: Effect) -> Iterator[Event]:
        if isinstance(effect, Train):
            yield from self._train(effect)
        elif isinstance(effect, Evaluate):
            with self._watch.part("evaluate"):
                row = self._ranks.evaluate(self._evaluator(effect.name), self.loop.train, self._outside)
            yield Ticked(self._outside.elapsed())
            if row is not None:
                yield Evaluated(effect.name, row)
        elif isinstance(effect, Transform):
            with self._watch.part("transform"):
                transformed = self._transformer(effect.name).transform(self.loop.train)
            yield Transformed(effect.name, transformed)
        elif isinstance(effect, Save):
            saved = self._saving.save(self.loop, self._step, self._feed.loader_state, self._outlets.flush)
            yield from self._watch.over("save", saved)
        elif isinstance(effect, Log):
            self._outlets.log(resume_.applied_steps(self.loop), {"epoch": self.loop.cursor.epoch, **effect.row})

    def _evaluator(self, name: str) -> Evaluator:
        callback = self._by_name.get(name)
        if not isinstance(callback, Evaluator):
            raise _no_performer("Evaluate", name, "Evaluator", callback)
        return callback

    def _transformer(self, name: str) -> Transformer:
        callback = self._by_name.get(name)
        if not isinstance(callback, Transformer):
            raise _no_performer("Transform", name, "Transformer", callback)
        return callback

    def _train(self, effect: Train) -> Iterator[Event]:
        cursor = self.loop.cursor
        with self._watch.part("step"):
            self._feed.waited, taken = 0.0, self._feed.take(cursor, effect.n)
            try:
                with self._instruments.around(self.loop, taken) as batches:
                    state, record, cut, last = self._chunk(self.loop.train, batches, effect.elapsed)
            finally:
                self._watch.move("data", self._feed.waited)
            del batches, taken
            steps = record.series()
        self._skipped.look(self._step, state, last, steps)
        self._finite.look(steps, cursor.batches)
        short = len(steps) < effect.n and not cut and not self._outside.unread
        end = self._feed.at_end(cursor.batch + len(steps), short)
        self.loop = self.loop.replace(train=state)
        self._outside.done(len(steps), self._ranks.seen)
        yield Ticked(self._outside.elapsed())
        yield StepsDone(len(steps), steps, end)
        if end:
            self._feed.end_epoch()
            yield EpochDone()
        yield from self._switch()
        yield from self._watch.over("save", self._saving.durable())

    def _chunk(
        self, state: object, batches: Iterator[Any], elapsed: float | None
    ) -> tuple[Any, metrics.Recorder, bool, Any]:
        """Train on a chunk of batches; return whether it was cut short, and the last batch. No device is read here."""
        record, index, batch = metrics.Recorder(), self.loop.cursor.batches, None
        step, stop, same = self._step, self._outside.stopping(elapsed), self._guard.same
        plain, counted, first = None, self._feed.left_out is not None, None
        keep, block = record.waiting.append, index + BLOCK
        for batch in batches:
            if self._checked:
                same(batch, index)
            else:
                with self._watch.part("check"):
                    first = self._check_first(state, batch)
                # The check has settled the number of its microbatches, and whether a compilation is waited for.
                step, stop = self._step, self._outside.stopping(elapsed)
            try:
                returned = step(state, batch)
            except Exception as error:
                self._explain(error, state, batch, index)
                raise
            if first is not None:
                self._check_returned(first, state, batch, returned)
                first = None
            state, values = returned
            if plain is None:
                plain = metrics.are_plain(values)
            if plain:
                values = metrics.as_metrics(values, self._ranks.samples(batch))
            keep(self._counted(values) if counted else values)
            index += 1
            if index == block:
                record.read()
                block += BLOCK
            if stop():
                return state, record, True, batch
        return state, record, False, batch

    def _counted(self, values: Any) -> Any:
        """The metrics of a batch, and how many samples it lost: merged like the others, so that a resume is exact."""
        return {"skipped_samples": metrics.Sum(self._feed.left_out), **values}

    def _explain(self, error: Exception, state: object, batch: object, index: int) -> None:
        """Raise what there is to say of an error of the step besides itself."""
        explained = self._guard.explained(error, state, batch, index)
        if explained is not error:
            raise explained from error

    def _check_first(self, state: object, batch: object) -> _First:
        """Check what can be checked before the first real step; the step's own microbatches are settled by it."""
        contract = Contract(self._step, state)

        def check() -> tuple[str | None, list[str]]:
            short = self._guard.first(state, batch)
            counted = () if self._feed.left_out is None else ("skipped_samples",)
            known: dict[str, Sequence[str] | None] = {
                "train": None if self._guard.metrics is None else (*self._guard.metrics, *counted)
            }
            for callback in self.callbacks:
                if self._ranks.first and isinstance(callback, Evaluator):
                    known[callback.name] = callback.check_first(state)
            check_names(self.callbacks, known)
            return short, [name for name, names in known.items() if names is None]

        found = self._ranks.agreed(check, "the check before the first step")
        if self._speaks:
            self._try_evaluations(state, unproven=found[0][1])
        self._ranks.compare_batch()
        self._step = self._guard.step
        self._outside.watch(facts_of(self._step).ready)
        if self._ranks.first:
            memory.warn([short for short, _ in found])
        return _First(contract, self._guard.attributes(state))

    def _try_evaluations(self, state: object, unproven: Sequence[str]) -> None:
        """Evaluate a few batches for real, as all ranks do it, so that what fails does so before the first step.

        Unless the caller says how many, it is one batch where shapes without values did not tell, as rank 0 found.
        """
        known: dict[str, Sequence[str] | None] = {}
        for callback in self.callbacks:
            if not isinstance(callback, Evaluator):
                continue
            count = self._trial
            if count is None:
                count = int(callback.name in unproven and callback.rereads())
            trial = callback.limited(count) if count else None
            if trial is not None:
                row = self._ranks.evaluate(trial, state, self._outside)
                known[callback.name] = row and [name.removeprefix(f"{callback.name}/") for name in row]
        check_names(self.callbacks, known)

    def _check_returned(self, first: _First, state: Any, batch: Any, returned: Any) -> None:
        """Check what the first real step returned, and what it left in the attributes of models."""
        first.contract.check(returned)
        repeatable = self._ranks.alone and not facts_of(self._step).donate
        changed = first.attributes.check(state, batch, returned, repeatable=repeatable)
        if changed and self._ranks.first:
            warnings.warn(changed, hidden_attributes.HiddenStateWarning, stacklevel=2)
        self._checked = True

    def _finish(self, reason: str, queue: collections.deque[Effect]) -> Iterator[Event]:
        for event in self._watch.over("save", self._saving.finish(self.loop)):
            yield from self._tell(event, queue)
        self.reason = reason
        self._end_origin(reason)
        yield from self._tell(Stopped(reason), queue)


@dataclasses.dataclass(frozen=True)
class _First:
    """What was noted before the first real step, to compare with what comes of it."""

    contract: Contract
    attributes: Remembered


def _donating(step: StepFn) -> StepFn:
    from purestep.jit import donate  # the compiler's room is large, and most eager runs donate nothing

    return donate(step)


def _no_performer(effect: str, name: str, role: str, callback: object) -> ConfigError:
    there = "there is no callback of this name" if callback is None else f"{name!r} is a {type(callback).__name__}"
    return ConfigError(
        explain(
            f"no callback performs {effect}({name!r})",
            where=there,
            why=f"the callback of that name performs it, as a subclass of ps.callbacks.{role}",
            instead=f"class Own(ps.callbacks.Reducer, ps.callbacks.{role}): ...",
        )
    )
