"""Evaluations are counted in the run's own cursor: no interruption, stop or resume shifts, drops or doubles one.

The machine is driven without a model: a session is cut at any of its moments, in the middle of a burst or of an
evaluation too, and the next one goes on from the latest snapshot under callbacks of its own.
"""

import collections
import dataclasses
import math

from hypothesis import given, settings
from hypothesis import strategies as st

import purestep as ps
from purestep.loop import (
    EpochDone,
    Evaluate,
    Evaluated,
    Interrupted,
    Log,
    LoopState,
    Machine,
    Resumed,
    Save,
    Started,
    StepsDone,
    Stop,
    Train,
)

END = 30


def value_at(batches, name):
    """A held-out loss that goes up and down."""
    return math.sin(1.7 * batches + len(name))


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a session ends: at which of its moments, and whether by a signal or by a kill."""

    moment: int
    signal: bool
    within: int  # batches of the burst that is cut
    patience: int


@dataclasses.dataclass(frozen=True)
class Snapshot:
    loop: LoopState
    evaluations: tuple[tuple[str, int], ...]


def session(machine, snapshot, cut):
    """Interpret the machine as `loop.run` does, up to the cut; return the latest snapshot and the evaluations."""
    loop = machine.init(None) if snapshot is None else snapshot.loop
    evaluations = [] if snapshot is None else list(snapshot.evaluations)
    queue, moments = collections.deque(), 0

    def tell(event):
        nonlocal loop
        loop, effects = machine.transition(loop, event)
        queue.extend(effects)

    def interrupt():
        kept = [e for e in queue if isinstance(e, Log)]
        queue.clear()
        queue.extend(kept)
        tell(Interrupted("SIGTERM"))

    tell(Started() if snapshot is None else Resumed(loop.cursor.batches))
    while queue:
        effect = queue.popleft()
        now = cut is not None and moments == cut.moment
        moments += not isinstance(effect, Log)
        if now and not cut.signal:
            return snapshot, evaluations
        if isinstance(effect, Stop):
            return snapshot, evaluations
        if isinstance(effect, Save):
            snapshot = Snapshot(loop, tuple(evaluations))
        elif isinstance(effect, Train):
            cursor = loop.cursor
            count = min(effect.n, cut.within) if now else effect.n
            end = cursor.batch + count == machine.length
            tell(StepsDone(count, ({},) * count, end))
            if end:
                tell(EpochDone())
        elif isinstance(effect, Evaluate) and not now:
            evaluations.append((effect.name, loop.cursor.batches))
            tell(Evaluated(effect.name, {f"{effect.name}/loss": value_at(loop.cursor.batches, effect.name)}))
        if now:
            interrupt()
    raise AssertionError("the machine wishes nothing, and has not stopped")


def cadence_of(steps, epochs):
    found = ([ps.every.steps(steps)] if steps else []) + ([ps.every.epoch(epochs)] if epochs else [])
    return found[0] | found[-1]


CADENCES = st.tuples(st.integers(0, 9), st.integers(0, 3)).filter(any)


@settings(max_examples=400)
@given(
    length=st.integers(1, 11),
    val=CADENCES,
    test=CADENCES,
    save=CADENCES,
    cuts=st.lists(
        st.builds(Cut, st.integers(0, 40), st.booleans(), st.integers(1, 4), st.sampled_from([1, 2, 10**6])), max_size=8
    ),
)
def test_no_evaluation_is_shifted_dropped_or_doubled(length, val, test, save, cuts):
    def machine(patience):
        callbacks = [
            ps.callbacks.evaluate(max, (), every=cadence_of(*val), name="val"),
            ps.callbacks.evaluate(max, (), every=cadence_of(*test), name="test"),
            ps.callbacks.early_stopping("val/loss", patience=patience),
            ps.callbacks.snapshots(every=cadence_of(*save)),
        ]
        return Machine(tuple(callbacks), ps.steps(END), length)

    snapshot = None
    for cut in cuts:
        snapshot, _ = session(machine(cut.patience), snapshot, cut)
    _, evaluations = session(machine(10**6), snapshot, None)
    wanted = {
        name: [b for b in range(1, END + 1) if (steps and b % steps == 0) or (epochs and b % (length * epochs) == 0)]
        for name, (steps, epochs) in {"val": val, "test": test}.items()
    }
    assert {name: [b for which, b in evaluations if which == name] for name in wanted} == wanted
