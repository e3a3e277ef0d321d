"""`ps.evaluate`: the numbers of the callback, one mechanism; dry runs and trials of evaluations before a run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import purestep as ps
from purestep.errors import ConfigError, DataError, MetricError, StepError
from purestep.loop import Evaluated


def table(n, seed):
    g = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(n, 5, generator=g), "y": torch.randint(0, 3, (n,), generator=g)}


def loss_fn(net, batch):
    logits = net(batch["x"])
    return cross_entropy(logits, batch["y"]), {
        "accuracy": ps.metrics.accuracy(logits, batch["y"]),
        "scores": ps.metrics.confusion(logits, batch["y"]),
    }


def make_model():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


TX = ps.optim.average_params(ps.optim.adamw(0.05), 0.9) if hasattr(ps.optim, "average_params") else ps.optim.adamw(0.05)
VAL = ps.data.batches(table(23, 1), 4, shuffle=False, drop_last=False)
TEST = ps.data.batches(table(11, 2), 4, shuffle=False, drop_last=False)
TRAIN = ps.data.batches(table(40, 0), 8, seed=1)


def start():
    return ps.init(make_model, TX, seed=0)


def test_it_returns_what_the_callback_logs_in_a_run():
    callbacks = [ps.callbacks.evaluate(loss_fn, VAL), ps.callbacks.evaluate(loss_fn, TEST, name="test")]
    result = ps.fit(ps.make_step(loss_fn, TX), start(), TRAIN, until=ps.epochs(2), callbacks=callbacks)
    before = ps.digest(result.state)
    both = ps.evaluate(result.state, loss_fn, {"val": VAL, "test": TEST})
    assert both == {k: v for k, v in result.metrics.items() if k.startswith(("val/", "test/"))}
    assert len(both) == 12
    assert ps.evaluate(result.state, ps.make_eval(loss_fn), TEST, name="test").items() <= both.items()
    assert ps.digest(result.state) == before
    limited = ps.evaluate(result.state, loss_fn, VAL, limit=2)
    assert limited == ps.evaluate(result.state, loss_fn, VAL.take(2)) != ps.evaluate(result.state, loss_fn, VAL)
    averaged = ps.evaluate(result.state, loss_fn, VAL, of=lambda s: s.replace(params=start().params))
    assert averaged != ps.evaluate(result.state, loss_fn, VAL)


def test_it_prints_as_a_table_and_is_a_dict():
    found = ps.Evaluation({"val/loss": 0.12345, "val/n": 300.0, "test/loss": float("nan")})
    assert str(found).splitlines() == ["         val  test", "loss  0.1235   nan", "n        300"]
    assert found._repr_html_().count("<tr>") == 3
    assert json.loads(json.dumps({"row": ps.evaluate(start(), loss_fn, VAL)}))["row"]["val/loss"] > 0


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ps.evaluate(start(), loss_fn, {}), ConfigError, "one set, or a dict of them"),
        (
            lambda: ps.evaluate(start(), loss_fn, {"x": torch.zeros(8, 2)}),
            ConfigError,
            r"dict of tensors\n  where:   data\['x'\]: float32\[8, 2\]",
        ),
        (lambda: ps.evaluate(start(), loss_fn, {"x": np.zeros(8)}), ConfigError, "is a dict of tensors"),
        (lambda: ps.evaluate(loss_fn, start(), VAL), ConfigError, r"where:   loss_fn=a TrainState\Z"),
        (lambda: ps.evaluate(start(), loss_fn, {1: VAL}), ConfigError, "one set, or a dict of them"),
        (
            lambda: ps.evaluate(start(), lambda net: 0, VAL),
            ConfigError,
            "a loss function takes the model and the batch",
        ),
        (lambda: ps.evaluate(start(), loss_fn, []), DataError, "the evaluation 'val' has no batches"),
    ],
)
def test_what_is_no_evaluation_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


# --- dry runs ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_does_everything_once_and_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, seen, transformed = start(), [], []
    before = ps.digest(state)
    sizes = []

    def evaluation(net, batch):
        sizes.append(len(batch["x"]))
        return loss_fn(net, batch)

    def change(train):
        transformed.append(train)
        return train

    result = ps.fit(
        ps.make_step(loss_fn, TX),
        state,
        TRAIN,
        until=ps.epochs(30) | ps.hours(2),
        callbacks=[
            ps.callbacks.evaluate(evaluation, VAL, every=ps.every.epoch(5)),
            ps.callbacks.snapshots(every=ps.every.steps(1), keep=ps.snapshot.best("val/loss")),
            ps.callbacks.early_stopping("val/loss"),
            ps.callbacks.transform(change, every=ps.every.steps(1000), name="change"),
            ps.callbacks.tap(lambda event, loop: seen.append(event)),
        ],
        run_dir="run",
        resume="must",
        loggers=[ps.loggers.csv()],
        dry_run=2,
        check_evaluation=0,
    )
    assert result.reason == "reached the end of a dry run of 2 batches"
    assert (result.loop.cursor.batches, len(transformed), result.run_dir) == (2, 1, None)
    assert sizes.count(4) >= 2
    assert [event.row["val/loss"] > 0 for event in seen if isinstance(event, Evaluated)] == [True]
    assert result.metrics["train/loss_epoch"] > 0
    assert list(tmp_path.iterdir()) == []
    assert ps.digest(state) == before != ps.digest(result.state)


def test_a_dry_run_of_a_donating_step_leaves_the_state():
    state = start()
    before = ps.digest(state)
    ps.fit(ps.make_step(loss_fn, TX), state, TRAIN, until=ps.epochs(3), donate=True, dry_run=3)
    assert ps.digest(state) == before


def test_a_dry_run_checks_the_names_that_snapshots_wait_for(tmp_path):
    keep = ps.callbacks.snapshots(keep=ps.snapshot.best("val/los"))
    with pytest.raises(MetricError, match="'snapshots' watches 'val/los', which is not among the metrics of 'val'"):
        ps.fit(
            ps.make_step(loss_fn, TX),
            start(),
            TRAIN,
            until=ps.epochs(3),
            callbacks=[ps.callbacks.evaluate(loss_fn, VAL), keep],
            run_dir=tmp_path / "run",
            dry_run=1,
        )


# --- trials of evaluations --------------------------------------------------------------------------------------------


def failing_value(net, batch):
    loss = cross_entropy(net(batch["x"]), batch["y"])
    if loss.item() > 0:  # no value on tensors without memory: the dry run cannot tell
        raise ValueError("an evaluation that fails")
    return loss


@ps.pytree
class Pair:
    value: torch.Tensor

    def merge(self, other):
        return other

    def compute(self):
        return self.value


def no_number(net, batch):
    loss = cross_entropy(net(batch["x"]), batch["y"])
    return loss, {"pair": Pair(torch.stack([loss, loss]))}


@pytest.mark.parametrize(
    ("evaluation", "error", "text"),
    [(failing_value, ValueError, "an evaluation that fails"), (no_number, MetricError, "more than one number")],
)
def test_an_evaluation_that_would_fail_does_so_before_the_first_step(evaluation, error, text):
    steps = []
    step = ps.wrap_step(ps.make_step(loss_fn, TX), lambda step, s, b: steps.append(b["x"].is_meta) or step(s, b))
    with pytest.raises(error, match=text):
        ps.fit(step, start(), TRAIN, until=ps.epochs(9), callbacks=[ps.callbacks.evaluate(evaluation, VAL)])
    assert False not in steps


def test_a_trial_is_of_as_many_batches_as_asked_and_changes_nothing():
    read = []

    class Batches:
        """Of a kind that is not read twice unless the caller says so."""

        def __iter__(self):
            for batch in VAL:
                read.append(len(batch["x"]))
                yield batch

    def run(**options):
        read.clear()
        result = ps.fit(
            ps.make_step(loss_fn, TX),
            start(),
            TRAIN,
            until=ps.epochs(1),
            callbacks=[ps.callbacks.evaluate(loss_fn, Batches())],
            **options,
        )
        return len(read), ps.digest(result.state), dict(result.metrics)

    (plain, *one), (none, *two), (some, *three) = run(), run(check_evaluation=0), run(check_evaluation=3)
    assert one == two == three
    assert (plain, none) == (6, 6)
    assert some in (9, 10)  # a loader of others may be asked for one batch more
    with pytest.raises(ConfigError, match="check_evaluation= is a number of batches"):
        run(check_evaluation=-1)
    with pytest.raises(ConfigError, match="dry_run= is a number of batches"):
        run(dry_run=0)


def test_names_that_only_a_trial_tells_are_checked():
    def reads_a_value(net, batch):
        loss = cross_entropy(net(batch["x"]), batch["y"])
        return loss, {"half": loss.item() / 2}

    callbacks = [ps.callbacks.evaluate(reads_a_value, VAL), ps.callbacks.early_stopping("val/haf")]
    with pytest.raises(MetricError, match="watches 'val/haf', which is not among the metrics of 'val'"):
        ps.fit(ps.make_step(loss_fn, TX), start(), TRAIN, until=ps.epochs(1), callbacks=callbacks)


def test_a_prediction_step_is_no_evaluation():
    step = ps.make_predict(lambda net, batch: net(batch["x"]))
    with pytest.raises((StepError, ConfigError)):
        ps.evaluate(start(), step, VAL)
