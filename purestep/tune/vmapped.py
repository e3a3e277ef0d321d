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
from purestep.jit import jit
from purestep.loop.input import device_of
from purestep.loop.signals import Signals
from purestep.loop.stable_json import stable
from purestep.record.experiment import Experiment
from purestep.sharding.plan import Plan
from purestep.step_protocol import AnyStep, StepFacts, StepFn, bare, facts_of, no_microbatches

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


def groups_of(experiments: Mapping[str, Experiment]) -> Groups:
    """Put those together whose steps are the same program, and whose states and batches differ in values only.

    That a mapped step computes what the step itself does is tried on the first batch of each: so a difference that the
    descriptions of two steps do not show, such as a tensor that a loss function reads, is found.
    """
    alone: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    batches: dict[str, Any] = {}
    for name, one in experiments.items():
        found = _unfit(one)
        if found is None:
            try:
                batches[name] = _first_batch(one)
                groups.setdefault(_program(one, batches[name]), []).append(name)
            except Exception as error:  # the user's data set is read by it
                found = f"its first batch cannot be read: {error}".split("\n")[0]
        if found is not None:
            alone[name] = found
    together = []
    for names in groups.values():
        reason = "no other run is the same program with tensors of the same shapes" if len(names) == 1 else None
        reason = reason or _disagreement([experiments[n] for n in names], [batches[n] for n in names])
        if reason is None:
            together.append(tuple(names))
        else:
            alone |= dict.fromkeys(names, reason)
    return Groups(tuple(together), alone)


def _unfit(one: Experiment) -> str | None:
    facts = facts_of(one.step)
    if facts.plan is not None:
        return "its step has a plan"
    if facts.donate:
        return "its step consumes the state"
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


def _disagreement(experiments: Sequence[Experiment], batches: Sequence[Any]) -> str | None:
    """Return why the mapped step does not compute what the steps do on their first batches, None where it does."""
    structure = tree.structure(experiments[0].state)
    if any(tree.structure(one.state) != structure for one in experiments):
        return "their models differ"
    try:
        # A map that finds no error in its first call finds none in later ones, which have the same shapes.
        mapped = Ensemble(bare(experiments[0].step), own_batches=True).mapped
        states = unstack(mapped(stack([one.state for one in experiments]), stack(batches))[0])
        alone = [bare(one.step)(one.state, batch)[0] for one, batch in zip(experiments, batches, strict=True)]
    except Exception as error:  # the user's step runs in it, under a transform that it may not take
        return f"torch.vmap does not take the step: {type(error).__name__}: {error}".split("\n")[0][:200]
    for one, expected, found in zip(experiments, alone, states, strict=True):
        moved, apart = _distance(one.state, expected), _distance(expected, found)
        if not apart <= _FAR * moved:
            return f"the mapped step moves a state by {apart:.2g} more than its {moved:.2g}"
    return None


def _distance(one: Any, other: Any) -> float:
    pairs = zip(tree.leaves(one), tree.leaves(other), strict=True)
    squares = [
        (a.double() - b.double()).square().sum() for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point()
    ]
    return float(torch.stack([square.cpu() for square in squares]).sum().sqrt()) if squares else 0.0


def _mapped(step: StepFn) -> Callable[[Any, Any], Any]:
    """Return the step over stacked states and batches, compiled where the step is."""
    backend: Any = facts_of(step).backend
    mapped = Ensemble(bare(step), own_batches=True).mapped
    return mapped if backend is None else jit(mapped, backend=backend)


# --- how they train together ------------------------------------------------------------------------------------------


class MemberStep(AnyStep):
    """The step of one run of a group: a call of it waits for those of the other runs.

    Args:
        step: that of its experiment.
        call: computes the step together with the others.
    """

    def __init__(self, step: StepFn, call: Callable[[Any, Any], Any]) -> None:
        self._step, self._call = step, call

    def __call__(self, state: Any, batch: Any) -> Any:
        return self._call(state, batch)

    @property
    def facts(self) -> StepFacts:
        """Those of the step. What "compiled" it is in every snapshot: a resume without `vmap` says so."""
        facts = facts_of(self._step)
        backend = "vmap" if facts.backend is None else f"vmap, {facts.backend}"
        return dataclasses.replace(facts, backend=backend, gradients=None)

    def bare(self, microbatches: int | None = None) -> StepFn:
        return bare(self._step, microbatches)

    def with_microbatches(self, count: int) -> AnyStep:
        raise no_microbatches(self)

    def under(self, plan: Plan) -> StepFn:
        return self

    def identity(self) -> StepFn:
        """Return the step itself, which a snapshot records."""
        return self._step


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


def train_together(
    experiments: Sequence[Experiment], options: Sequence[Mapping[str, Any]]
) -> list[Any]:  # of Result | Exception
    """Train runs of one program, each to its end; return the result of each, or the error that ended it.

    Args:
        experiments: of one group of `groups_of`.
        options: of `fit`, for each of them.
    """
    meeting = _Meeting(_mapped(experiments[0].step))
    turns: list[_Turn] = []
    runs: list[Any] = []
    for one, chosen in zip(experiments, options, strict=True):
        seat: list[_Turn] = []
        step = MemberStep(one.step, functools.partial(_ask, seat))
        seat.append(_Turn(_Training(dataclasses.replace(one, step=step), chosen, runs)))
        turns += seat
    with Signals() as signals:
        try:
            live = turns
            for turn in live:
                turn.give()
            while live := [turn for turn in live if not turn.done]:
                meeting.answer(live)
                if signals.unread:
                    name = signals.read()
                    for run in runs:
                        run.interrupt(name)
                for turn in live:
                    turn.give()
        except BaseException:
            for turn in turns:
                turn.cancel()
            raise
    for turn in turns:
        if turn.error is not None and not isinstance(turn.error, Exception):
            raise turn.error
    return [turn.result if turn.error is None else turn.error for turn in turns]


def _ask(seat: Sequence[_Turn], state: Any, batch: Any) -> Any:
    return seat[0].ask(state, batch)


@dataclasses.dataclass(frozen=True)
class _Training:
    experiment: Experiment
    options: Mapping[str, Any]
    runs: list[Any]

    def __call__(self) -> Any:
        own = {callback.name for callback in self.experiment.callbacks}
        quiet = [] if "progress" in own else [progress(display="none")]  # several live bars would write over each other
        run = self.experiment.run(callbacks=[*self.experiment.callbacks, *quiet], **self.options)
        self.runs.append(run)
        for _ in run:
            pass
        return run.result()


class _Meeting:
    """Computes the steps that several runs ask for at the same time.

    The stacked state of the last call is kept: where each run goes on with what it was given, nothing is stacked anew.
    """

    def __init__(self, mapped: Callable[[Any, Any], Any]) -> None:
        self._mapped = mapped
        self._last: tuple[list[Any], Any] = ([], None)

    def answer(self, turns: Sequence[_Turn]) -> None:
        """Give each its answer: what the step returned, or the error."""
        by_shape: dict[str, list[_Turn]] = {}
        for turn in turns:
            _, batch = turn.asked  # type: ignore[misc]  # one that is not done has asked
            by_shape.setdefault(repr(tree.map(tree.describe, batch)), []).append(turn)
        for group in by_shape.values():
            try:
                answers = self._called([turn.asked for turn in group])
            except Exception as error:
                answers = [error] * len(group)
            for turn, answer in zip(group, answers, strict=True):
                turn.answer = answer

    def _called(self, asked: Sequence[Any]) -> list[Any]:
        states, batches = [state for state, _ in asked], [batch for _, batch in asked]
        known, stacked = self._last
        same = len(known) == len(states) and all(a is b for a, b in zip(known, states, strict=True))
        stacked, values = self._mapped(stacked if same else stack(states), stack(batches))
        members = unstack(stacked)
        self._last = (members, stacked)
        return list(zip(members, unstack(values), strict=True))
