"""A study: its runs are those that they are alone, and one that was stopped ends as one that was not."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from shared_marks import slow_but
from torch import nn

import purestep as ps
from purestep.errors import ConfigError
from purestep.tune.sweep import SweepWarning

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.WARNING)
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

SPACE = {
    "lr": optuna.distributions.FloatDistribution(1e-4, 1.0, log=True),
    "name": optuna.distributions.CategoricalDistribution(["sgd", "adam"]),
}
AT = {"made": 0, "signal": None, "fail": None}


def loss_fn(net, batch):
    return (net(batch["x"]) - batch["y"]).square().mean()


def experiment(lr: float, name: str = "sgd") -> ps.Experiment:
    AT["made"] += 1
    number = AT["made"]
    if number == AT["fail"]:
        raise ValueError("unlucky")
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(16, 3, generator=draw)
    data = ps.data.batches({"x": x, "y": x.sum(1, keepdim=True)}, 8)
    tx = getattr(ps.optim, name)(lr)

    def interrupt(event, loop):
        if AT["signal"] == (number, loop.cursor.batches):
            AT["signal"] = None
            os.kill(os.getpid(), signal.SIGINT)

    held_out = ps.callbacks.evaluate(loss_fn, data, name="val", every=ps.every.epoch())
    tap = ps.callbacks.tap(interrupt, every=ps.every.steps(1))
    state = ps.init(lambda: nn.Linear(3, 1), tx)
    return ps.Experiment(ps.make_step(loss_fn, tx), state, data, until=ps.epochs(4), callbacks=[held_out, tap])


def call(root, **options):
    AT["made"] = 0
    options = {"trials": 6, "prune_at": [ps.epochs(1), ps.epochs(2)], "loggers": [], **options}
    options.setdefault("pruner", optuna.pruners.MedianPruner(n_startup_trials=2))
    return ps.tune.search(experiment, SPACE, root=root / "study", metric="val/loss", **options)


def told(found):
    return [(row.values, row.left_at, row.summary.digest, row.summary.metrics) for row in found.rows]


@pytest.fixture(autouse=True)
def clean():
    AT.update(made=0, signal=None, fail=None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    return root, call(root)


@pytest.mark.slow
def test_its_runs_are_what_they_are_alone_and_the_worse_are_pruned(whole):
    root, found = whole
    assert len(found.rows) == 6
    assert {row.left_at for row in found.rows} >= {"", "1 epochs"}
    for row in found.rows:
        lr, name = row.summary.settings["lr"], row.summary.settings["name"]
        end = ps.until(row.left_at or "4 epochs")
        alone = ps.Experiment.of(experiment, {"lr": lr, "name": name}).fit(until=end)
        assert ps.digest(alone.state) == row.summary.digest
    ended = [row.summary.metrics["val/loss"] for row in found.rows if not row.left_at]
    assert found.best.metrics["val/loss"] == min(ended)
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(root / "study" / "optuna.journal"))
    )
    study = optuna.load_study(study_name="study", storage=storage)
    assert study.best_value == min(ended)
    made = AT["made"]
    assert told(call(root)) == told(found)
    assert AT["made"] == 0 != made


@pytest.mark.parametrize("at", slow_but([(3, 1), (4, 3), (2, 5), (2, 8)], (2, 5)))
def test_a_study_that_was_stopped_ends_as_one_that_was_not(whole, tmp_path, at):
    AT["signal"] = at
    found = call(tmp_path)
    assert AT["signal"] is None
    assert (found.interrupted, len(found.rows), found.done) == ("SIGINT", at[0], False)
    assert told(call(tmp_path)) == told(whole[1])


@pytest.mark.slow
def test_trials_are_added(whole, tmp_path):
    call(tmp_path, trials=2)
    assert told(call(tmp_path, trials=6)) == told(whole[1])
    assert told(call(tmp_path, trials=6)) == told(whole[1])


@pytest.mark.slow
def test_another_seed_and_another_sampler_propose_others(tmp_path):
    seeds = []

    def sampler(seed):
        seeds.append(seed)
        return optuna.samplers.RandomSampler(seed=seed + 100)

    values = [
        call(tmp_path / str(number), trials=1, until=ps.epochs(1), prune_at=[], **options).rows[0].values
        for number, options in enumerate([{}, {"seed": 1}, {"sampler": sampler}])
    ]
    assert len({str(value) for value in values}) == 3
    call(tmp_path / "2", trials=2, until=ps.epochs(1), prune_at=[], sampler=sampler)
    assert seeds == [0, 1]  # the number of finished trials, whenever they were finished


def test_a_trial_that_fails_is_a_warning(tmp_path):
    AT["fail"] = 2
    with pytest.warns(SweepWarning, match="unlucky"):
        found = call(tmp_path, trials=3)
    assert [row.why for row in found.rows][1] == "not started"
    with pytest.raises(ConfigError, match="a run has no metric 'acc'"):
        ps.tune.search(experiment, SPACE, root=tmp_path / "b", metric="acc", trials=1)
    with pytest.raises(ConfigError, match="lrr"):
        ps.tune.search(experiment, {"lrr": SPACE["lr"]}, root=tmp_path / "c", metric="val/loss")
