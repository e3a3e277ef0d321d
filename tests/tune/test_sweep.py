"""Sweeps: each run has the bits of its own training, whatever was stopped, halved or started again around it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal

import pytest
import torch
from shared_marks import slow_but
from torch import nn

import purestep as ps
from purestep.errors import ConfigError
from purestep.tune.grid import name_of
from purestep.tune.halving import Halving, rungs
from purestep.tune.sweep import SweepWarning

CALLS: list[tuple[float, int]] = []
AT: dict[str, tuple[float, int, int]] = {}  # (lr, seed, batch) at which a signal comes


def loss_fn(net, batch):
    return (net(batch["x"]) - batch["y"]).square().mean()


def experiment(
    lr: float = 0.1,
    seed: int = 0,
    *,
    tx: ps.optim.GradientTransformation | None = None,
    until: ps.Until = ps.epochs(4),  # noqa: B008
) -> ps.Experiment:
    CALLS.append((lr, seed))
    if lr == 13:
        raise ValueError("unlucky")
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(24, 3, generator=draw)
    data = ps.data.batches({"x": x, "y": x.sum(1, keepdim=True)}, 8, seed=seed)
    tx = tx or ps.optim.sgd(lr)

    def interrupt(event, loop):
        if AT.get("signal") == (lr, seed, loop.cursor.batches):
            del AT["signal"]
            os.kill(os.getpid(), signal.SIGINT)

    return ps.Experiment(
        ps.make_step(loss_fn, tx),
        ps.init(lambda: nn.Linear(3, 1), tx, seed=seed),
        data,
        until=until,
        callbacks=[
            ps.callbacks.evaluate(loss_fn, data, name="val", every=ps.every.epoch()),
            ps.callbacks.tap(interrupt, every=ps.every.steps(1)),
        ],
    )


@pytest.fixture(autouse=True)
def clean():
    CALLS.clear()
    AT.clear()


def digests(found):
    return {row.run_dir.name: row.summary.digest for row in found.rows}


def alone(lr, seed, end):
    return ps.digest(dataclasses.replace(experiment(lr, seed), until=end).fit().state)


def test_each_run_is_the_one_that_it_is_alone_and_is_trained_once(tmp_path):
    axes = {"lr": [0.1, 0.01], "seed": range(2)}
    found = ps.tune.sweep(experiment, axes, root=tmp_path, metric="val/loss", until=ps.epochs(2))
    assert digests(found) == {
        f"lr={lr},seed={seed}": alone(lr, seed, ps.epochs(2)) for lr, seed in itertools.product(*axes.values())
    }
    CALLS.clear()
    again = ps.tune.sweep(experiment, axes, root=tmp_path, metric="val/loss", until=ps.epochs(2))
    assert (CALLS, again.done, digests(again)) == ([], True, digests(found))
    assert again.best == min(found.runs, key=lambda run: run.metrics["val/loss"])
    assert f"best val/loss: {again.best.metrics['val/loss']:.4g}, {again.best.name}" in str(again)
    assert str(again).splitlines()[0].split()[:2] == ["lr", "seed"]
    more = ps.tune.sweep(experiment, {**axes, "seed": range(3)}, root=tmp_path, until=ps.epochs(2))
    assert CALLS == [(0.1, 2), (0.01, 2)]
    assert len(more.rows) == 6
    assert [axis.get_title() for axis in more.plot("val/loss").axes] == ["val/loss"]
    assert [run.settings["seed"] for run in ps.runs(tmp_path).filter(lr=0.1)] == [0, 1, 2]


def test_a_longer_end_goes_on_where_the_runs_are(tmp_path):
    ps.tune.sweep(experiment, {"seed": [3]}, root=tmp_path, until=ps.epochs(2))
    found = ps.tune.sweep(experiment, {"seed": [3]}, root=tmp_path, until=ps.epochs(3))
    assert digests(found) == {"seed=3": alone(0.1, 3, ps.epochs(3))}


@pytest.mark.parametrize("halving", slow_but([None, 2], 2))
def test_an_interrupted_sweep_goes_on(tmp_path, halving):
    def call(root):
        return ps.tune.sweep(
            experiment, {"lr": [0.1, 0.01, 0.001]}, root=root, metric="val/loss", halving=halving, until=ps.epochs(4)
        )

    AT["signal"] = (0.01, 0, 2)
    found = call(tmp_path / "a")
    assert (found.interrupted, found.done) == ("SIGINT", False)
    assert [row.why for row in found.rows][1:] == ["SIGINT", "not started"]
    assert "the same call continues the sweep" in str(found)
    wanted = call(tmp_path / "b")
    assert digests(call(tmp_path / "a")) == digests(wanted)
    assert wanted.done


def test_halving_lets_the_best_go_on_with_the_bits_of_their_own_run(tmp_path):
    lrs = [0.3, 1e-4, 0.1, 1e-3, 3e-3, 0.03, 0.01]

    def call():
        return ps.tune.sweep(
            experiment, {"lr": lrs}, root=tmp_path, halving=3, metric="val/loss", until=ps.epochs(9), loggers=[]
        )

    found = call()
    first = {lr: dataclasses.replace(experiment(lr), until=ps.epochs(1)).fit().metrics["val/loss"] for lr in lrs}
    second = {
        lr: dataclasses.replace(experiment(lr), until=ps.epochs(3)).fit().metrics["val/loss"]
        for lr in sorted(lrs, key=first.__getitem__)[:3]
    }
    winner = min(second, key=second.__getitem__)
    left = {row.values["lr"]: row.left_at for row in found.rows}
    assert left == {str(lr): "" if lr == winner else "3 epochs" if lr in second else "1 epochs" for lr in lrs}
    assert found.best.settings["lr"] == winner
    assert found.best.digest == alone(winner, 0, ps.epochs(9))
    assert "left at 1 epochs" in str(found)
    CALLS.clear()
    assert (digests(call()), CALLS) == (digests(found), [])
    ledger = json.loads((tmp_path / "sweep.json").read_text())
    assert [len(rung["kept"]) for rung in ledger["rungs"]] == [3, 1]
    with pytest.raises(ConfigError, match="another ends, factor"):
        ps.tune.sweep(experiment, {"lr": lrs}, root=tmp_path, halving=2, metric="val/loss", until=ps.epochs(9))


@pytest.mark.parametrize("members", [1, 2, 3, 4, 9, 10])
@pytest.mark.parametrize("factor", [2, 3])
def test_the_last_rung_has_one_run(members, factor):
    ends = rungs(ps.steps(1000), members, factor)
    left = [f"r{number}" for number in range(members)]
    for _ in ends[:-1]:
        assert len(left) > 1
        left = Halving(factor, ends, "m", "max").best({name: -float(name[1:]) for name in left})
    assert left == ["r0"]
    lengths = [end.steps for end in ends]
    assert lengths == sorted(lengths)
    assert all(a == -(-b // factor) or abs(a * factor - b) <= factor**2 for a, b in itertools.pairwise(lengths))


def test_a_run_that_fails_leaves_the_others_alone(tmp_path):
    with pytest.warns(SweepWarning, match="lr=13: ValueError: unlucky"):
        found = ps.tune.sweep(experiment, {"lr": [13, 0.1, 0.2]}, root=tmp_path, metric="val/loss", halving=2)
    assert found.rows[0].why == "left at 1 epochs"
    assert found.best.settings["lr"] in (0.1, 0.2)
    with pytest.warns(SweepWarning), pytest.raises(ValueError, match="unlucky"):
        ps.tune.sweep(experiment, {"lr": [13]}, root=tmp_path / "b")


def test_settings_with_fields_are_reached_by_dots(tmp_path):
    axes = {"tx.learning_rate": [0.1, 0.2], "until": [ps.steps(2)]}
    found = ps.tune.sweep(experiment, axes, root=tmp_path, settings={"tx": ps.optim.lion(1.0)})
    assert [row.summary.settings["tx"] for row in found.rows] == [
        {"name": "lion", "learning_rate": 0.1},
        {"name": "lion", "learning_rate": 0.2},
    ]
    assert {row.why for row in found.rows} == {"reached 2 steps"}


@pytest.mark.parametrize(
    ("axes", "options", "words"),
    [
        ({"lrr": [1.0]}, {}, ["lrr"]),
        ({"lr": ["fast"]}, {}, ["lr", "fast"]),
        ({"lr": [0.1, 0.1]}, {}, ["two runs of the sweep have the same settings"]),
        ({"lr": []}, {}, ["has no values"]),
        ({"lr.x": [0.1]}, {}, ["lr.x", "no fields"]),
        ({"lr": [0.1, 0.2]}, {"halving": 3}, ["halving goes by a metric", 'metric="val/loss"']),
        ({"lr": [0.1, 0.2]}, {"halving": 1, "metric": "val/loss"}, ["halving=1"]),
        (
            {"seed": range(9)},
            {"halving": 3, "metric": "a", "until": ps.epochs(2)},
            ["too short", "1, 1, 2", "epochs(9)"],
        ),
        ({"seed": [1, 2]}, {"halving": 3, "metric": "a", "until": ps.seconds(9)}, ["a number of steps or of epochs"]),
    ],
)
def test_what_is_wrong_is_said_before_the_first_run(tmp_path, axes, options, words):
    with pytest.raises(ConfigError) as caught:
        ps.tune.sweep(experiment, axes, root=tmp_path / "s", **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "s").exists()


def test_a_metric_that_no_run_has_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no run has a finite 'acc'") as caught:
        ps.tune.sweep(experiment, {"lr": [0.1, 0.2]}, root=tmp_path, halving=2, metric="acc")
    assert "val/loss" in str(caught.value)
    found = ps.tune.sweep(experiment, {"lr": [0.1, 0.2]}, root=tmp_path / "b", until=ps.steps(1))
    with pytest.raises(ConfigError, match="not stopped at the rungs"):
        ps.tune.sweep(experiment, {"lr": [0.1, 0.2]}, root=tmp_path / "b", halving=2, metric="a")
    with pytest.raises(ConfigError, match="which run is the best"):
        found.best  # noqa: B018


def test_halving_puts_what_is_not_finite_last():
    values = {"a": math.nan, "b": -math.inf, "c": 2.0, "d": 1.0}
    assert Halving(2, (), "m", "max").best(values) == ["c", "d"]
    assert Halving(2, (), "m", "min").best(values) == ["d", "c"]
    assert name_of({"x/y": "a b"}) == "x_y=a_b"
