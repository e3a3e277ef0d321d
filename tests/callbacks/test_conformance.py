"""Every callback is a row here, and every row gets every test."""

import copy
import dataclasses
import io

import pytest
import torch

import purestep as ps
from purestep import tree
from purestep.loop import (
    Callback,
    Cursor,
    EpochDone,
    Evaluated,
    Horizon,
    Interrupted,
    Log,
    LoopState,
    Resumed,
    Save,
    Started,
    StepsDone,
    Stop,
    Transform,
    Transformed,
    View,
)
from purestep.loop import Evaluate as EvaluateEffect
from purestep.metrics import Mean

TX = ps.optim.adamw(1e-2)


def loss_fn(net, batch):
    return net(batch["x"]).square().mean()


CALLBACKS = {
    "device_stats": lambda: ps.callbacks.device_stats(every=ps.every.steps(2)),
    "early_stopping": lambda: ps.callbacks.early_stopping("val/loss"),
    "evaluate": lambda: ps.callbacks.evaluate(loss_fn, ps.data.batches({"x": torch.ones(6, 2)}, 4), at_start=True),
    "learning_rate": lambda: ps.callbacks.learning_rate(TX, every=ps.every.steps(2)),
    "log": lambda: ps.callbacks.log(every=ps.every.steps(3)),
    "observe": lambda: ps.callbacks.observe(lambda state: {"n": 1.0}, every=ps.every.steps(2)),
    "profile": lambda: ps.callbacks.profile(every=ps.every.steps(9), on_trace=print),
    "on_saved": lambda: ps.callbacks.on_saved(lambda directory, step: None),
    "progress": lambda: ps.callbacks.progress(),
    "snapshots": lambda: ps.callbacks.snapshots(every=ps.every.steps(4) | ps.every.epoch()),
    "spike_detection": lambda: ps.callbacks.spike_detection(),
    "tap": lambda: ps.callbacks.tap(lambda event, loop: None, every=ps.every.steps(5)),
    "terminate_on_nan": lambda: ps.callbacks.terminate_on_nan(),
    "throughput": lambda: ps.callbacks.throughput(every=ps.every.steps(2)),
    "transform": lambda: ps.callbacks.transform(lambda s: s, every=ps.every.epoch(), name="transform"),
}
EVENTS = [
    Started(),
    Resumed(3),
    *(StepsDone(2, ({"loss": Mean(v, 1.0)}, {"loss": Mean(1.0, 2.0)})) for v in (1.0, float("nan"))),
    StepsDone(0, (), True),
    EpochDone(1, {"train/loss_epoch": 1.0}),
    Evaluated("val", {"val/loss": 2.0}),
    Evaluated("test", {"test/loss": 2.0}),
    Transformed("transform", None),
    Interrupted("SIGTERM"),
]


@pytest.fixture(params=CALLBACKS, ids=str)
def callback(request):
    return CALLBACKS[request.param]()


@pytest.fixture(scope="module")
def train():
    return ps.init(torch.nn.Linear(2, 1), TX)


def view(train, batches=4):
    return View(LoopState(train, Cursor(1, 2, batches), elapsed=3.0), 10)


def test_the_table_is_complete():
    made = {name for name in vars(ps.callbacks) if callable(getattr(ps.callbacks, name)) and name[0].islower()}
    assert made == set(CALLBACKS) | {"count_flops"}  # a function beside `throughput`


def test_it_is_a_frozen_named_value_with_a_repr(callback):
    assert isinstance(callback, Callback)
    assert callback.name in {*CALLBACKS, "val", "device"}
    assert type(callback).__name__ in repr(callback)
    with pytest.raises(dataclasses.FrozenInstanceError):
        callback.name = "other"


def test_its_name_can_be_chosen(callback):
    assert dataclasses.replace(callback, name="mine").name == "mine"


@pytest.mark.parametrize("event", EVENTS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("batches", [4, 5, 6])
def test_it_is_total_and_pure(callback, event, batches, train):
    own = callback.init()
    before = copy.deepcopy(own)
    first = callback.react(own, event, view(train, batches))
    again = callback.react(own, event, view(train, batches))
    assert tree.equal(own, before)
    assert tree.equal(first[0], again[0])
    assert repr(first[1]) == repr(again[1])
    assert all(isinstance(e, (EvaluateEffect, Log, Save, Stop, Transform)) for e in first[1])


def test_its_horizon_lies_ahead(callback, train):
    for batches in range(12):
        horizon = callback.horizon(view(train, batches))
        assert isinstance(horizon, Horizon)
        assert horizon.batches is None or horizon.batches >= 1


def test_its_state_survives_a_snapshot(callback, train, tmp_path):
    own = callback.init()
    for event in EVENTS:
        own, _ = callback.react(own, event, view(train))
    with ps.snapshot.Store(tmp_path) as store:
        store.save(1, {"own": own})
        store.wait()
        assert tree.equal(store.restore().value["own"], own)


def test_a_run_with_it_resumes_and_trains_as_without(callback):
    def make(callbacks):
        train = ps.data.batches({"x": torch.arange(24.0).reshape(12, 2) / 10}, 4, seed=1)
        state = ps.init(torch.nn.Linear(2, 1, bias=False), TX, seed=0)
        return {"step": ps.make_step(loss_fn, TX), "state": state, "train": train, "callbacks": callbacks}

    torch.manual_seed(0)
    weight = ps.init(torch.nn.Linear(2, 1, bias=False), TX).params

    def fixed(callbacks):
        options = make(callbacks)
        return {**options, "state": options["state"].replace(params=weight)}

    needs = [ps.callbacks.evaluate(loss_fn, [{"x": torch.ones(3, 2)}])] if callback.name == "early_stopping" else []
    ps.testing.check_resume(lambda: fixed([callback, *needs]), batches=5, at=[2, 3])
    with_it = ps.fit(
        **fixed([c for c in (callback, *needs) if not isinstance(c, ps.callbacks.SnapshotPolicy)]), until=ps.steps(5)
    )
    ps.testing.assert_trees_equal(with_it.state, ps.fit(**fixed([]), until=ps.steps(5)).state)


def test_progress_is_silent_where_there_is_no_terminal(monkeypatch, capsys):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", io.StringIO())
    state = ps.init(torch.nn.Linear(2, 1), TX)
    data = ps.data.batches({"x": torch.ones(8, 2)}, 4)
    ps.fit(ps.make_step(loss_fn, TX), state, data, until=ps.epochs(2))
    import sys

    assert sys.stdout.getvalue() == sys.stderr.getvalue() == ""


def test_evaluate_covers_every_sample_once_with_exact_weights(train):
    values = torch.arange(10.0).reshape(10, 1).expand(10, 2)
    callback = ps.callbacks.evaluate(
        lambda net, batch: (batch["x"][:, 0].mean(), {"top": ps.metrics.Max(batch["x"].max())}),
        ps.data.batches({"x": values}, 4, shuffle=False, drop_last=False),
    )
    assert callback.evaluate(train, lambda: False) == {"val/loss": 4.5, "val/top": 9.0}
    assert callback.evaluate(train, lambda: True) is None


def test_evaluate_takes_an_evaluation_step_too(train):
    data = ps.data.batches({"x": torch.ones(4, 2)}, 4, shuffle=False)
    by_loss, by_step = (ps.callbacks.evaluate(f, data) for f in (loss_fn, ps.make_eval(loss_fn)))
    assert by_loss.evaluate(train, lambda: False) == by_step.evaluate(train, lambda: False)


def test_learning_rate_follows_the_schedule():
    tx = ps.optim.sgd(ps.optim.linear_schedule(1.0, 0.0, transition_steps=4))
    rates = []
    run = ps.run(
        ps.make_step(loss_fn, tx),
        ps.init(torch.nn.Linear(2, 1), tx),
        ps.data.batches({"x": torch.ones(8, 2)}, 2),
        until=ps.steps(4),
        callbacks=[ps.callbacks.learning_rate(tx, every=ps.every.steps(1))],
    )
    for event in run:
        if isinstance(event, StepsDone):
            rates.append(run.loop.status.metrics["learning_rate"])
    assert rates == [0.75, 0.5, 0.25, 0.0]
