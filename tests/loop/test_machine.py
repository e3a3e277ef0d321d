"""The machine is pure: it is tested without a model, a clock or a disk."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import purestep as ps
from purestep import tree
from purestep.callbacks import Reducer
from purestep.errors import ConfigError
from purestep.loop import (
    EpochDone,
    Evaluate,
    Evaluated,
    Horizon,
    Interrupted,
    Log,
    LoopState,
    Machine,
    Resumed,
    Save,
    Saved,
    Started,
    StepsDone,
    Stop,
    Ticked,
    Train,
    Transform,
    Transformed,
)
from purestep.metrics import Mean


def steps_done(n, value=1.0, *, end=False):
    return StepsDone(n, tuple({"loss": Mean(value, 1.0)} for _ in range(n)), end)


@dataclasses.dataclass(frozen=True)
class Asks(Reducer):
    """Evaluates at every epoch."""

    name: str

    def react(self, own, event, view):
        return own, ((Evaluate(self.name),) if isinstance(event, EpochDone) else ())


@dataclasses.dataclass(frozen=True)
class Counts(Reducer):
    """Counts the evaluations it has seen: stale in a snapshot that was taken too early."""

    name: str

    def init(self):
        return 0

    def react(self, own, event, view):
        return own + isinstance(event, Evaluated), ()


@dataclasses.dataclass(frozen=True)
class Saves(Reducer):
    name: str = "saves"

    def react(self, own, event, view):
        return own, ((Save(),) if isinstance(event, EpochDone) else ())


@dataclasses.dataclass(frozen=True)
class StopsAt(Reducer):
    batches: int
    name: str = "stops"

    def react(self, own, event, view):
        return own, ((Stop(f"{self.name}: enough"),) if view.cursor.batches >= self.batches else ())


def machine(*callbacks, until=None, length=10):
    return Machine(callbacks, until or ps.epochs(3), length)


def test_a_run_begins_with_a_chunk_to_the_end_of_the_epoch():
    m = machine()
    loop, effects = m.transition(m.init("state"), Started())
    assert effects == (Train(10),)
    assert loop.cursor.batches == 0


def test_chunks_reach_to_the_nearest_announced_boundary():
    m = machine(ps.callbacks.log(every=ps.every.steps(4)), until=ps.steps(9))
    loop, effects = m.transition(m.init(None), Started())
    sizes = []
    while not isinstance(effects[-1], Stop):
        n = effects[-1].n
        sizes.append(n)
        loop, effects = m.transition(loop, steps_done(n))
    assert sizes == [4, 4, 1]
    assert effects[-1] == Stop("reached 9 steps")


def test_epoch_row_is_the_weighted_mean_and_sums_start_anew():
    m = machine(length=3)
    loop, _ = m.transition(m.init(None), Started())
    metrics = tuple({"loss": Mean(v * w, w)} for v, w in ((1.0, 4.0), (2.0, 4.0), (6.0, 1.0)))
    loop, effects = m.transition(loop, StepsDone(3, metrics, True))
    assert effects == ()
    loop, effects = m.transition(loop, EpochDone())
    assert loop.status.metrics["train/loss_epoch"] == pytest.approx(18 / 9)
    assert loop.status.sums == {}
    assert loop.cursor == ps.loop.Cursor(1, 0, 3)
    assert effects == (Train(3),)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.data())
def test_sums_do_not_depend_on_where_chunks_end(values, data):
    m = machine(length=None, until=ps.steps(1000))

    def fold(cuts):
        loop = m.init(None)
        for start, stop in itertools.pairwise([0, *cuts, len(values)]):
            part = tuple({"loss": Mean(v, 1.0)} for v in values[start:stop])
            loop, _ = m.transition(loop, StepsDone(len(part), part))
        return loop.status.sums

    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=8)))
    assert tree.equal(fold(cuts), fold([]))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_a_snapshot_waits_until_everything_else_was_fed_back(order):
    """Contract 3, over all permutations of callbacks: the saved loop has seen both evaluations."""
    parts = [Asks("a"), Asks("b"), Counts("counts"), Saves()]
    m = machine(*(parts[i] for i in order), length=2)
    loop, _ = m.transition(m.init(None), Started())
    loop, effects = m.transition(loop, steps_done(2, end=True))
    loop, effects = m.transition(loop, EpochDone())
    assert sorted(e.name for e in effects) == ["a", "b"]
    loop, effects = m.transition(loop, Evaluated("b", {"b/loss": 1.0}))
    assert effects == ()
    loop, effects = m.transition(loop, Evaluated("a", {"a/loss": 2.0}))
    assert effects == (Save(), Train(2))
    assert loop.callbacks["counts"] == 2
    assert loop.status.due == ()
    assert not loop.status.save


def test_the_order_of_callbacks_does_not_matter():
    parts = [
        Asks("a"),
        Counts("c"),
        Saves(),
        StopsAt(4, "x"),
        StopsAt(4, "y"),
        ps.callbacks.log(every=ps.every.steps(1)),
    ]
    done = Evaluated("a", {"a/x": 1.0})
    events = [Started(), steps_done(2, end=True), EpochDone(), done, steps_done(2, 3.0, end=True), EpochDone(), done]
    outcomes = set()
    for permuted in itertools.permutations(parts):
        m = machine(*permuted, length=2)
        loop, trace = m.init(None), []
        for event in events:
            loop, effects = m.transition(loop, event)
            trace.append(effects)
        outcomes.add((tree.digest(ps.testing.comparable(loop)), repr(trace)))
    assert len(outcomes) == 1


def test_transforms_come_before_evaluations_and_replace_the_state():
    swap = ps.callbacks.transform(lambda s: s, every=ps.every.epoch(), name="swap")
    m = machine(Asks("val"), swap, length=1)
    loop, _ = m.transition(m.init("old"), Started())
    loop, _ = m.transition(loop, steps_done(1, end=True))
    loop, effects = m.transition(loop, EpochDone())
    assert effects == (Transform("swap"), Evaluate("val"))
    loop, effects = m.transition(loop, Transformed("swap", "new"))
    assert (loop.train, effects) == ("new", ())
    _, effects = m.transition(loop, Evaluated("val", {}))
    assert effects == (Train(1),)


def test_an_interruption_saves_at_once_and_remembers_what_is_due():
    m = machine(Asks("val"), Saves(), length=2)
    loop, _ = m.transition(m.init(None), Started())
    loop, _ = m.transition(loop, steps_done(2, end=True))
    loop, effects = m.transition(loop, EpochDone())
    assert effects == (Evaluate("val"),)
    cut, effects = m.transition(loop, Interrupted("SIGTERM"))
    assert effects == (Save(), Stop("SIGTERM"))
    assert cut.status.due == ("val",)
    resumed, effects = m.transition(cut, Resumed(2))
    assert effects == (Evaluate("val"),)
    resumed, effects = m.transition(resumed, Evaluated("val", {"val/x": 1.0}))
    straight, expected = m.transition(loop, Evaluated("val", {"val/x": 1.0}))
    assert effects == expected == (Save(), Train(2))
    assert tree.equal(ps.testing.comparable(resumed), ps.testing.comparable(straight))


def test_a_resumed_run_that_was_at_its_end_stops_again_and_a_longer_one_goes_on():
    m = machine(until=ps.steps(4))
    loop, _ = m.transition(m.init(None), Started())
    loop, effects = m.transition(loop, steps_done(4))
    assert effects == (Save(), Stop("reached 4 steps"))
    _, effects = m.transition(loop, Resumed(4))
    assert effects == (Save(), Stop("reached 4 steps"))
    _, effects = machine(until=ps.steps(6)).transition(loop, Resumed(4))
    assert effects == (Train(2),)


def test_facts_of_the_clock_and_the_disk_reach_no_callback():
    @dataclasses.dataclass(frozen=True)
    class Nosy(Reducer):
        name: str = "nosy"

        def init(self):
            return 0

        def react(self, own, event, view):
            return own + 1, ()

    m = machine(Nosy())
    loop = m.init(None)
    for event in (Ticked(3.0), Saved(1), ps.loop.SaveLost("disk"), ps.loop.Failed("x"), ps.loop.Stopped("x")):
        loop, effects = m.transition(loop, event)
        assert effects == ()
    assert loop.callbacks["nosy"] == 0
    assert loop.elapsed == 3.0


def test_two_callbacks_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two callbacks are named 'log'"):
        machine(ps.callbacks.log(), ps.callbacks.log())


def test_a_metric_that_comes_or_goes_is_named():
    m = machine()
    loop, _ = m.transition(m.init(None), steps_done(1))
    with pytest.raises(ps.errors.MetricError, match="missing: loss"):
        m.transition(loop, StepsDone(1, ({"other": Mean(1.0, 1.0)},)))


_events = st.one_of(
    st.just(Started()),
    st.integers(0, 20).map(Resumed),
    st.integers(0, 3).flatmap(lambda n: st.booleans().map(lambda end: steps_done(n, end=end))),
    st.just(EpochDone()),
    st.sampled_from(["val", "test"]).map(lambda n: Evaluated(n, {f"{n}/loss": 1.0})),
    st.floats(0, 100).map(Ticked),
    st.sampled_from(["SIGINT", "SIGTERM"]).map(Interrupted),
    st.integers(0, 9).map(Saved),
)


@settings(max_examples=150)
@given(st.lists(_events, max_size=25))
def test_it_is_total_and_deterministic(events):
    """Every event is allowed in every state, and a run replays from its events."""
    m = machine(
        Asks("val"),
        Asks("test"),
        Saves(),
        ps.callbacks.early_stopping("val/loss"),
        ps.callbacks.log(every=ps.every.steps(2) | ps.every.seconds(5)),
        until=ps.epochs(2) & ps.steps(5) | ps.seconds(50),
        length=4,
    )

    def replay():
        loop, trace = m.init(None), []
        for event in events:
            loop, effects = m.transition(loop, event)
            assert isinstance(loop, LoopState)
            trace.append(effects)
            assert sum(isinstance(e, Train) for e in effects) + sum(isinstance(e, Stop) for e in effects) <= 1
            if any(isinstance(e, Save) for e in effects) and not any(isinstance(e, Stop) for e in effects):
                assert loop.status.due == ()
        return loop, trace

    (a, trace_a), (b, trace_b) = replay(), replay()
    assert tree.equal(a, b)
    assert trace_a == trace_b


def test_horizons_combine_to_the_nearer():
    assert Horizon(5, None) & Horizon(3, 2.0) & Horizon() == Horizon(3, 2.0)


def test_log_writes_means_since_its_last_row():
    m = machine(ps.callbacks.log(every=ps.every.steps(2)))
    loop, _ = m.transition(m.init(None), Started())
    loop, effects = m.transition(loop, StepsDone(1, ({"loss": Mean(2.0, 1.0)},)))
    assert not any(isinstance(e, Log) for e in effects)
    loop, effects = m.transition(loop, StepsDone(1, ({"loss": Mean(12.0, 3.0)},)))
    assert effects[0] == Log({"train/loss": 3.5})
    assert loop.status.metrics == {"train/loss": 3.5}
