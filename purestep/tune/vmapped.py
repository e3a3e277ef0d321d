"""Runs of a sweep as one step: which of them are the same program on other tensors, and how they train together.

Each run stays a run of its own: its loop, callbacks, data, log and snapshots are those that it has alone. Only the
calls of its step wait for those of the others, and are computed by one call of `ps.ensemble(step)` on stacked states.
The loops take turns in threads of which one runs at a time, so nothing of them has to be safe for threads.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from purestep import data, tree
from purestep.callbacks import progress
from purestep.data.adapters import BatchSequence
from purestep.ensembles import Ensemble, stack, unstack
from purestep.loop.input import device_of
from purestep.loop.result import Result
from purestep.loop.run import Run
from purestep.loop.signals import Signals
from purestep.loop.stable_json import stable
from purestep.record.experiment import Experiment
from purestep.record.member_step import MemberStep, Seats
from purestep.step_protocol import Seat, StepFn, bare, facts_of

_FAR = 0.01  # of the length of an update: how far the mapped one may be from that of the step itself


# --- which runs are one program ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Groups:
    """How the runs of a sweep train.

    Attributes:
        together: groups of at least two names.
        alone: why each other run trains in turn, by name.
    """

    together: tuple[tuple[str, ...], ...]
    alone: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class _Tried:
    """A run, and what its step made of its first batch.

    Attributes:
        one: the experiment.
        batch: the first.
        state, metrics: after it.
    """

    one: Experiment
    batch: Any
    state: Any
    metrics: Any


def groups_of(experiments: Mapping[str, Experiment]) -> Groups:
    """Put those together whose steps are the same program, and whose states and batches differ in values only.

    Steps that are described alike are tried on first batches. A step must return the bits that the step of another run
    returns: so a difference is found that descriptions do not show, such as a field of settings, or a tensor, that the
    loss function reads. The mapped step must return the same up to rounding.
    """
    alone: dict[str, str] = {}
    tried: dict[str, _Tried] = {}
    groups: dict[str, list[str]] = {}
    for name, one in experiments.items():
        found = _unfit(one)
        if found is None:
            try:
                batch = _first_batch(one)
                tried[name] = _Tried(one, batch, *bare(one.step)(one.state, batch))
                groups.setdefault(_program(one, batch), []).append(name)
            except Exception as error:  # the user's data set is read, and the user's step runs
                found = f"its first batch ends by an error: {type(error).__name__}: {error}".split("\n")[0]
        if found is not None:
            alone[name] = found
    together = []
    for names in (part for group in groups.values() for part in _equal(group, tried)):
        reason = "no other run is the same program with tensors of the same shapes" if len(names) == 1 else None
        reason = reason or _disagreement([tried[name] for name in names])
        if reason is None:
            together.append(tuple(names))
        else:
            alone |= dict.fromkeys(names, reason)
    return Groups(tuple(together), alone)


def _equal(names: Sequence[str], tried: Mapping[str, _Tried]) -> list[list[str]]:
    """Part the runs by what their steps compute: each is called with the first state and batch of others."""
    parts: list[list[str]] = []
    for name in names:
        own = tried[name]
        for part in parts:
            state, metrics = bare(tried[part[0]].one.step)(own.one.state, own.batch)
            if tree.digest((state, metrics)) == tree.digest((own.state, own.metrics)):
                part.append(name)
                break
        else:
            parts.append([name])
    return parts


def _unfit(one: Experiment) -> str | None:
    facts = facts_of(one.step)
    if facts.plan is not None:
        return "its step has a plan"
    if facts.donate:
        return "its step consumes the state"
    if facts.warmup:
        return "its step has a warm-up, and a mapped step is compiled from its first call on"
    if facts.microbatches == "auto":
        return "its microbatches are chosen by the memory that is free"
    if not isinstance(data.as_source(one.data), (data.Batches, BatchSequence)):
        return "its data cannot be read a second time"
    return None


def _first_batch(one: Experiment) -> Any:
    source: Any = data.as_source(one.data)
    source = source.replace(num_workers=0) if isinstance(source, data.Batches) else source
    return data.to_device(next(iter(source.open(0, 0, None))), device_of(one.state))


def _program(one: Experiment, batch: Any) -> str:
    """Describe the step without the hyperparameters that are in the state, and the shapes of what it is called with."""
    facts = facts_of(one.step)
    settings = (facts.microbatches, str(facts.policy), facts.backend)
    shapes = tree.map(tree.describe, (one.state, batch))
    return (
        json.dumps([_without_numbers(stable(one.step)), *map(str, settings)])
        + repr(tree.structure(shapes))
        + repr(tree.leaves(shapes))
    )


def _without_numbers(plain: Any) -> Any:
    if isinstance(plain, Mapping):
        injected = plain.get("class") == "purestep.InjectHyperparams"
        return {k: _without_numbers(v) for k, v in plain.items() if not (injected and k == "numbers")}
    return [_without_numbers(item) for item in plain] if isinstance(plain, list) else plain


def _disagreement(tried: Sequence[_Tried]) -> str | None:
    """Return why the mapped step does not compute what the steps do on their first batches, None where it does."""
    states, batches = [each.one.state for each in tried], [each.batch for each in tried]
    structure = tree.structure(states[0])
    if any(tree.structure(state) != structure for state in states):
        return "their models differ"
    try:
        # A map that finds no error in its first call finds none in later ones, which have the same shapes.
        mapped = Ensemble(bare(tried[0].one.step), own_batches=True).mapped
        found = unstack(mapped(stack(states), stack(batches))[0])
    except Exception as error:  # the user's step runs in it, under a transform that it may not take
        return f"torch.vmap does not take the step: {type(error).__name__}: {error}".split("\n")[0][:200]
    for each, state in zip(tried, found, strict=True):
        moved, apart = _distance(each.one.state, each.state), _distance(each.state, state)
        if not apart <= _FAR * moved:
            return f"the mapped step moves a state by {apart:.2g} more than its {moved:.2g}"
    return None


def _distance(one: Any, other: Any) -> float:
    pairs = zip(tree.leaves(one), tree.leaves(other), strict=True)
    squares = [
        (a.double() - b.double()).square().sum() for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point()
    ]
    return float(torch.stack([square.cpu() for square in squares]).sum().sqrt()) if squares else 0.0


# --- how they train together ------------------------------------------------------------------------------------------


class Cancelled(BaseException):
    """Ends the loop of a run whose group was left in the middle."""


class _Turn:
    """A function in a thread of its own, which runs only while it has the turn."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._mine, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._cancelled = False
        self.asked: tuple[Any, Any] | None = None
        self.answer: Any = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = False
        threading.Thread(target=self._work, name="purestep-sweep", daemon=True).start()

    def _work(self) -> None:
        self._mine.acquire()
        try:
            self.result = None if self._cancelled else self._function()
        except BaseException as error:
            self.error = error
        self.done = True
        self._back.release()

    def give(self) -> None:
        """Let it run until it asks for a step, or ends."""
        self._mine.release()
        self._back.acquire()

    def ask(self, state: Any, batch: Any) -> Any:
        """Give the turn back until there is an answer; called in its thread."""
        self.asked, self.answer = (state, batch), None
        self._back.release()
        self._mine.acquire()
        self.asked = None
        if self._cancelled:
            raise Cancelled
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def cancel(self) -> None:
        """End it, wherever it waits, or at its next step."""
        self._cancelled = True
        while not self.done:
            self.give()


Start = Callable[[Experiment], Run]  # makes the run of an experiment, in its run directory


def train_together(
    step: StepFn, experiments: Mapping[int, Experiment], starts: Mapping[int, Start], members: int
) -> dict[int, Result | Exception]:
    """Train runs of one program, each to its end; return the result of each, or the error that ended it, by seat.

    Args:
        step: of one of the group.
        experiments: of those that train, by seat.
        starts: make the run of each. They are called here, so that it is recorded what called this.
        members: how many seats the group has, also those of runs that are done.
    """
    meeting = _Meeting(Seats(step, members))
    found: dict[int, Result | Exception] = {}
    turns: dict[int, _Turn] = {}
    runs: list[Run] = []
    for seat, one in experiments.items():
        try:
            run = starts[seat](_seated(one, Seat(seat, members), turns))
        except Exception as error:
            found[seat] = error
            continue
        runs.append(run)
        turns[seat] = _Turn(functools.partial(_drained, run))
    with Signals() as signals:
        try:
            live = dict(turns)
            for turn in live.values():
                turn.give()
            while live := {seat: turn for seat, turn in live.items() if not turn.done}:
                meeting.answer(live)
                if signals.unread:
                    name = signals.read()
                    for run in runs:
                        run.interrupt(name)
                for turn in live.values():
                    turn.give()
        except BaseException:
            for turn in turns.values():
                turn.cancel()
            raise
    for seat, turn in turns.items():
        if turn.error is not None and not isinstance(turn.error, Exception):
            raise turn.error
        found[seat] = turn.result if turn.error is None else turn.error
    return found


def _seated(one: Experiment, seat: Seat, turns: Mapping[int, _Turn]) -> Experiment:
    """Return an experiment whose step waits for its turn."""
    step = MemberStep(one.step, seat, lambda state, batch: turns[seat.number].ask(state, batch))
    own = {callback.name for callback in one.callbacks}
    quiet = [] if "progress" in own else [progress(display="none")]  # several live bars would write over each other
    return dataclasses.replace(one, step=step, callbacks=[*one.callbacks, *quiet])


def _drained(run: Run) -> Any:
    for _ in run:
        pass
    return run.result()


class _Meeting:
    """Computes the steps that several runs ask for at the same time."""

    def __init__(self, seats: Seats) -> None:
        self._seats = seats

    def answer(self, turns: Mapping[int, _Turn]) -> None:
        """Give each its answer: what the step returned, or the error."""
        by_shape: dict[str, dict[int, Any]] = {}
        for seat, turn in turns.items():
            _, batch = turn.asked  # type: ignore[misc]  # one that is not done has asked
            by_shape.setdefault(repr(tree.map(tree.describe, batch)), {})[seat] = turn.asked
        for asked in by_shape.values():
            try:
                answers = self._seats(asked)
            except Exception as error:
                answers = dict.fromkeys(asked, error)
            for seat, answer in answers.items():
                turns[seat].answer = answer
