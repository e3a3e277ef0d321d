"""Replay: a span of a run executed again has the bits that it had, through callbacks, epochs, dropout and loaders."""

from __future__ import annotations

import signal

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import ConfigError, PurestepError

SAMPLES = 22


def loss_fn(net, batch):
    return (net(batch["x"]) - batch["y"]).square().mean()


def columns():
    g = torch.Generator().manual_seed(0)
    return {"x": torch.randn(SAMPLES, 4, generator=g), "y": torch.randn(SAMPLES, 1, generator=g)}


def augment(sample, key):
    return {**sample, "x": sample["x"] + 0.1 * ps.random.normal(key, (4,))}


def halved(state):
    return state.replace(params={name: p / 2 for name, p in state.params.items()})


@ps.experiment
def digits(lr=1e-2, *, source="batches", donate=False, jit=False):
    """Dropout, augmentation, epochs of unequal batches, an evaluation, early stopping, a transform, a schedule."""
    tx = ps.optim.adamw(ps.optim.cosine_decay_schedule(lr, 40))
    state = ps.init(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)), tx, seed=3)
    step = ps.make_step(loss_fn, tx)
    data = ps.data.batches(columns(), 5, seed=7, drop_last=False, transform=augment if source == "augmented" else None)
    held_out = ps.data.batches(columns(), 11, shuffle=False)
    if source == "loader":
        data = torch.utils.data.DataLoader(torch.utils.data.StackDataset(**columns()), 4)
    callbacks = [
        ps.callbacks.evaluate(loss_fn, held_out, every=ps.every.steps(3)),
        ps.callbacks.early_stopping("val/loss", patience=99),
        ps.callbacks.transform(halved, every=ps.every.steps(4), name="halve"),
        ps.callbacks.snapshots(every=ps.every.steps(4), keep=ps.snapshot.all_()),
    ]
    step = ps.jit(step, donate=donate, backend="eager") if jit else ps.donate(step) if donate else step
    return ps.Experiment(step, state, data, until=ps.steps(17), callbacks=callbacks)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("replay") / "run"
    digits().fit(run_dir=path)
    return ps.open(path)


def digests(run):
    return {step: run.header(step).digests["state"] for step in run.snapshots}


def test_the_bits_are_those_of_the_run_at_each_snapshot(run):
    found = {r.position: r.digest for r in ps.replay(run, digits, 0, 17)}
    assert list(found) == list(range(1, 18))
    assert run.snapshots == (4, 8, 12, 16, 17)
    assert {step: found[step] for step in run.snapshots} == digests(run)
    again = {r.position: r.digest for r in ps.replay(run.path, digits(), 6, 11)}  # from the middle, by path and value
    assert again == {position: found[position] for position in range(7, 12)}


KINDS: list = [{"source": "augmented"}, {"source": "loader"}, {"donate": True}]
KINDS += [pytest.param({"jit": True, "donate": True}, marks=pytest.mark.slow)]


@pytest.mark.filterwarnings("ignore::purestep.data.adapters.ReplayWarning")  # a plain DataLoader keeps no state
@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_so_they_are_with_other_data_and_steps(tmp_path, settings):
    digits(**settings).fit(run_dir=tmp_path)
    run = ps.open(tmp_path)
    assert run.settings == {"lr": 1e-2, "source": "batches", "donate": False, "jit": False, **settings}
    for first, last in [(0, 8), (9, 17)]:
        found = {r.position: r.digest for r in ps.replay(run, digits, first, last)}
        assert list(found) == list(range(first + 1, last + 1))
        saved = {step: digest for step, digest in digests(run).items() if step in found}
        assert {step: found[step] for step in saved} == saved


def test_a_batch_can_be_looked_at_again(run):
    data = digits().data
    for r in ps.replay(run, digits, 3, 7):
        assert torch.equal(r.indices, data.indices(r.epoch, r.batch))
        assert torch.equal(r.data["x"], columns()["x"][r.indices])
        assert r.position == r.epoch * 5 + r.batch + 1
        assert set(r.metrics) == {"loss"}
    assert (r.position, r.epoch, r.batch) == (7, 1, 1)


def test_the_metrics_are_those_of_the_log(run):
    steps = list(ps.replay(run, digits, 0, 5))
    weights = [len(r.indices) for r in steps]
    mean = sum(r.metrics["loss"] * w for r, w in zip(steps, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx(run.metrics.at(5)["train/loss_epoch"], rel=1e-6)


def test_it_writes_nothing_and_leaves_signals_alone(run):
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    handler = signal.getsignal(signal.SIGINT)
    span = ps.replay(run, digits, 4, 6)
    next(span)
    assert signal.getsignal(signal.SIGINT) is handler
    span.close()
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_another_experiment_is_said(run):
    with pytest.warns(ps.loop.RunChangedWarning, match=r"(?s)the run that goes on here.*0\.01.*0\.5"):
        list(ps.replay(run, digits(0.5), 4, 5))


def test_what_makes_no_sense_is_refused(run):
    assert list(ps.replay(run, digits, 6, 6)) == []
    with pytest.raises(ConfigError, match="a span ends where it begins"):
        ps.replay(run, digits, 6, 5)
    with pytest.raises(ConfigError, match=r"an experiment is a .*, or a function"):
        ps.replay(run, 3, 4, 5)
    with pytest.raises(ConfigError, match=r"settings of the run are not the arguments(.|\n)*missing a required"):
        ps.replay(run, lambda depth: None, 4, 5)
    with pytest.raises(ConfigError, match=r"makes no experiment\n  where:   it returned a int"):
        ps.replay(run, lambda lr: 3, 4, 5)
    with pytest.raises(ConfigError, match="this is no run directory"):
        ps.replay("nowhere", digits, 4, 5)
    with pytest.raises(PurestepError):
        list(ps.replay(run, ps.Experiment(digits().step, {"w": torch.ones(1)}, digits().data), 4, 5))


def test_what_comes_after_the_end_was_never_trained(run, tmp_path):
    with pytest.raises(
        ConfigError, match=r"the run ends at 17, before 18\n  where:   .*: reached 17 steps\n  instead: "
    ):
        list(ps.replay(run, digits, 16, 18))
    with pytest.raises(ConfigError, match="the run ends at 17, before 99"):
        ps.fork(run, at=99, run_dir=tmp_path / "child", experiment=digits)
    assert not (tmp_path / "child").exists()


def test_a_run_that_ended_early_has_no_later_positions(tmp_path):
    made = digits()
    stop = ps.callbacks.early_stopping("train/loss_epoch", patience=1, min_delta=1e9)
    short = ps.Experiment(made.step, made.state, made.data, until=ps.epochs(9), callbacks=[stop])
    short.fit(run_dir=tmp_path)
    end = ps.open(tmp_path).snapshots[-1]
    assert end == 10
    with pytest.raises(
        ConfigError, match=r"the run ends at 10, before 12\n  where:   it ended because: early stopping"
    ):
        list(ps.replay(tmp_path, short, 0, 12))
