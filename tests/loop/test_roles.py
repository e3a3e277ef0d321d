"""A callback has a role because it says so with its class, never because of the name of a field or method."""

import dataclasses

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.callbacks import Evaluator, Observer, Reducer, SnapshotPolicy, Transformer, Watcher
from purestep.errors import ConfigError

TX = ps.optim.sgd(0.1)


def fit(*callbacks, **options):
    step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), TX)
    state = ps.init(lambda: nn.Linear(3, 1), TX)
    batches = [{"x": torch.ones(2, 3)}] * 4
    return ps.fit(step, state, batches, until=ps.steps(4), callbacks=list(callbacks), **options)


@dataclasses.dataclass(frozen=True)
class LastRows(Reducer):
    """Fields and methods that have the names of those of the roles, and mean something else."""

    keep: int = 3
    every: int = 2
    name: str = "last_rows"

    def evaluate(self):
        raise AssertionError

    def transform(self):
        raise AssertionError

    def check_first(self):
        raise AssertionError

    def open_sink(self):
        raise AssertionError

    def preserves(self):
        raise AssertionError


def test_names_of_fields_and_methods_mean_nothing(tmp_path):
    assert fit(LastRows()).reason == "reached 4 steps"
    result = fit(LastRows(), ps.callbacks.snapshots(every=ps.every.steps(2)), run_dir=tmp_path)
    assert (result.reason, result.unsaved) == ("reached 4 steps", False)
    assert ps.snapshot.steps(tmp_path) == [4]
    assert fit(LastRows(name="train")).reason == "reached 4 steps"  # the name of an evaluation would clash


def test_a_callback_that_is_no_reducer_watches_nothing_unless_it_says_so():
    class Plain:
        name = "plain"

        def init(self):
            return None

        def react(self, own, event, view):
            return own, ()

        def horizon(self, view):
            return ps.loop.Horizon()

        def watches(self):
            return ("val/loss",)

    class Watching(Plain, Watcher):
        def watches(self):
            return ("val/loss",)

    assert fit(Plain()).reason == "reached 4 steps"
    with pytest.raises(ConfigError, match="'plain' watches 'val/loss', which no callback evaluates"):
        fit(Watching())


@dataclasses.dataclass(frozen=True)
class Everything(Reducer, Evaluator, SnapshotPolicy, Observer):
    """A callback of several roles at once."""

    seen: list = dataclasses.field(default_factory=list)
    name: str = "own"

    def react(self, own, event, view):
        if isinstance(event, ps.loop.StepsDone):
            return own, (ps.loop.Evaluate(self.name),)
        if isinstance(event, ps.loop.Evaluated):
            return own, (ps.loop.Log(event.row), ps.loop.Save())
        return own, ()

    def horizon(self, view):
        return ps.loop.Horizon(1)

    def check_first(self, train):
        return ("norm",)

    def evaluate(self, train, interrupted, peers=None):
        return {"own/norm": float(train.params["weight"].norm())}

    def preserves(self):
        return ps.snapshot.all_()

    def open_sink(self, run_dir, length):
        return self

    def receive(self, event, loop):
        self.seen.append(type(event).__name__)

    def close(self):
        self.seen.append("closed")


def test_each_role_is_asked_of_the_class_that_has_it(tmp_path):
    callback = Everything()
    with pytest.raises(ps.errors.MetricError, match="which is not among the metrics of 'own'"):
        fit(callback, ps.callbacks.early_stopping("own/nom"), run_dir=tmp_path / "misnamed")
    callback.seen.clear()
    result = fit(callback, run_dir=tmp_path / "run")
    assert "own/norm" in result.metrics
    assert ps.snapshot.steps(tmp_path / "run") == [1, 2, 3, 4]
    assert callback.seen[0] == "Started"
    assert callback.seen.count("Evaluated") == 4
    assert callback.seen[-1] == "closed"
    with pytest.raises(ConfigError, match="snapshots need a place"):
        fit(callback)


def test_a_transformer_transforms():
    @dataclasses.dataclass(frozen=True)
    class Zero(Reducer, Transformer):
        name: str = "zero"

        def react(self, own, event, view):
            ends = isinstance(event, ps.loop.StepsDone) and view.cursor.batches == 4
            return own, ((ps.loop.Transform(self.name),) if ends else ())

        def transform(self, train):
            return train.replace(params=ps.tree.map(torch.zeros_like, train.params))

    assert not fit(Zero()).state.params["weight"].any()


@pytest.mark.parametrize("role", [Evaluator, Transformer, SnapshotPolicy, Observer])
def test_a_role_without_its_method_is_refused(role):
    with pytest.raises(TypeError, match="abstract"):
        type("Own", (Reducer, role), {"name": "own"})()


@pytest.mark.parametrize("name", ["wishing", "other", "nowhere"])
def test_an_effect_that_no_callback_performs_is_explained(name):
    @dataclasses.dataclass(frozen=True)
    class Wishing(Reducer):
        name: str = "wishing"

        def react(self, own, event, view):
            return own, ((ps.loop.Evaluate(target),) if isinstance(event, ps.loop.StepsDone) else ())

    target = name
    other = ps.callbacks.tap(lambda event, loop: None, name="other")
    with pytest.raises(ConfigError, match=rf"no callback performs Evaluate\('{name}'\)") as caught:
        fit(Wishing(), other)
    assert "ps.callbacks.Evaluator" in str(caught.value)
