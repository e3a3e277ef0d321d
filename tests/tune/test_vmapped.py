"""Sweeps whose runs train in one mapped step: their numbers, records, resumes, and what trains in turn instead."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.record.member_step import Seats, without_others
from purestep.step_protocol import Seat
from purestep.tune.sweep import SweepWarning
from purestep.tune.vmapped import groups_of

X = ps.random.normal(ps.random.key(7), (48, 3))
COLUMNS = {"x": X, "y": X.sin().sum(1, keepdim=True)}
DONE = ["reached 2 epochs"]
AT: dict[str, tuple[float, int]] = {}  # (lr, batch) at which a signal comes, or an error


def loss_fn(net, batch):
    return (net(batch["x"]) - batch["y"]).square().mean()


def experiment(lr: float = 0.1, seed: int = 0, width: int = 4, p: float = 0.2, scale: float = 1.0) -> ps.Experiment:
    tx = ps.optim.inject_hyperparams(ps.optim.adam)(learning_rate=lr)
    data = ps.data.batches(COLUMNS, 16, seed=seed)
    weight = torch.full((3,), scale)

    def scaled(net, batch):
        return loss_fn(net, {**batch, "x": batch["x"] * weight})

    def look(event, loop):
        if AT.get("signal") == (lr, loop.cursor.batches):
            del AT["signal"]
            os.kill(os.getpid(), signal.SIGINT)

    def fail(state):
        if AT.get("error") == (lr, int(state.step)):
            raise ZeroDivisionError("of the run")
        return state

    return ps.Experiment(
        ps.make_step(loss_fn if scale == 1.0 else scaled, tx),
        ps.init(
            lambda: nn.Sequential(nn.Linear(3, width), nn.Dropout(p), nn.Tanh(), nn.Linear(width, 1)), tx, seed=seed
        ),
        data,
        until=ps.epochs(2),
        callbacks=[
            ps.callbacks.evaluate(loss_fn, data, name="val", every=ps.every.epoch()),
            ps.callbacks.tap(look, every=ps.every.steps(1)),
            ps.callbacks.transform(fail, every=ps.every.steps(1), name="fail"),
        ],
    )


@pytest.fixture(autouse=True)
def clean():
    AT.clear()


def sweep(root, axes, **options):
    return ps.tune.sweep(experiment, axes, root=root, metric="val/loss", **{"vmap": True, **options})


def digests(found):
    return {row.run_dir.name: row.summary.digest for row in found.rows}


def values(found):
    return [row.summary.metrics["val/loss"] for row in found.rows]


def test_they_have_the_numbers_of_runs_in_turn_and_say_how_they_trained(tmp_path):
    axes = {"lr": [0.1, 0.01], "seed": [1, 0]}
    together = sweep(tmp_path / "a", axes)
    alone = sweep(tmp_path / "b", axes, vmap=False)
    assert [row.how for row in together.rows] == ["vmapped"] * 4
    assert [row.why for row in together.rows] == ["reached 2 epochs"] * 4
    assert values(together) == pytest.approx(values(alone), rel=1e-4)
    assert len(set(values(together))) == 4
    assert "how it trains" in str(together)
    assert "how it trains" not in str(alone)
    one, other = (ps.open(tmp_path / root / "lr=0.1,seed=1") for root in "ab")
    assert [run.headers[-1].info["step"]["compiled"] for run in (one, other)] == ["vmap", None]
    assert one.settings == other.settings
    # Each can be executed again without the others, at its seat, and so with its bits.
    assert [run.headers[-1].info["step"].get("seat") for run in (one, other)] == [{"number": 0, "members": 4}, None]
    assert "by vmap, as run 1 of 4 together" in str(one)
    assert ps.verify(one, experiment, every=2).ok
    assert one.programs[0].file == other.programs[0].file == __file__
    assert one.metrics["step"] == other.metrics["step"]
    assert digests(sweep(tmp_path / "a", axes)) == digests(together)  # done: nothing trains again
    with pytest.warns(ps.loop.RunChangedWarning, match="compiled: saved under vmap, now None"):
        ps.fit(
            experiment(0.1, 1).step,
            experiment(0.1, 1).state,
            experiment(0.1, 1).data,
            until=ps.epochs(3),
            run_dir=one.path,
            settings=dict(one.settings),
            callbacks=experiment(0.1, 1).callbacks,
        )


def net_of(kind):
    if kind == "convolution":
        return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 49, 3)), (5, 1, 7, 7)
    return nn.Sequential(nn.Linear(17, 31), nn.LayerNorm(31), nn.GELU(), nn.Linear(31, 3)), (9, 17)


@pytest.mark.parametrize("kind", ["odd width", "convolution"])
def test_the_bits_of_a_seat_do_not_depend_on_who_else_is_there(kind):
    """Of one state alone both have other bits, and so have states of an odd width at another seat."""
    tx = ps.optim.adam(0.01)
    step = ps.make_step(lambda net, batch: net(batch).square().mean(), tx)
    states = {seat: ps.init(lambda: net_of(kind)[0], tx, seed=seat) for seat in range(5)}
    shape = net_of(kind)[1]
    rows = {
        seat: [torch.randn(shape, generator=torch.Generator().manual_seed(seat)) for _ in range(3)] for seat in states
    }
    together, found = Seats(step, 5), dict(states)
    for number in range(3):
        asked = {seat: (found[seat], rows[seat][number]) for seat in found}
        found = {seat: answer[0] for seat, answer in together(asked).items()}
    for seat in (0, 3):
        alone = without_others(step, Seat(seat, 5))
        state = states[seat]
        for batch in rows[seat]:
            # A copy, as from a snapshot: the state is stacked anew.
            state, _ = alone(ps.tree.map(torch.clone, state), batch)
        assert ps.digest(state) == ps.digest(found[seat])
        leaves = [leaf for leaf in ps.tree.leaves(found[seat]) if leaf.numel() > 1]
        assert {leaf.data_ptr() % 64 for leaf in leaves} == {0}


@pytest.mark.slow
def test_a_run_that_was_resumed_alone_is_replayed_as_each_part_of_it_was_computed(tmp_path):
    found = sweep(tmp_path, {"lr": [0.1, 0.01], "seed": [0, 1]}, until=ps.steps(4))
    path = found.rows[2].run_dir
    record = ps.open(path)
    made = ps.Experiment.of(experiment, record.settings)
    saving = ps.callbacks.snapshots(keep=ps.snapshot.all_())
    with pytest.warns(ps.loop.RunChangedWarning):
        made.fit(run_dir=path, until=ps.steps(8), callbacks=[*made.callbacks, saving])
    record = ps.open(path)
    assert [record.seat_at(4), record.seat_at(5)] == [Seat(2, 4), None]
    *_, last = ps.replay(record, experiment, 0, 8)
    assert last.digest == record.digest
    assert ps.verify(record, experiment).ok


@pytest.mark.slow
def test_halving_and_a_larger_end_go_on_with_the_bits_of_runs_that_were_never_stopped(tmp_path):
    axes = {"lr": [0.3, 0.1, 0.03, 0.01]}
    straight = digests(sweep(tmp_path / "a", axes, until=ps.epochs(4)))
    halved = sweep(tmp_path / "b", axes, until=ps.epochs(4), halving=2)
    assert [row.left_at for row in halved.rows].count("") == 1
    (best,) = (row for row in halved.rows if not row.left_at)
    # Fewer train together after each rung. Kernels of layers of this size have the same bits for any number.
    assert best.summary.digest == straight[best.run_dir.name]
    sweep(tmp_path / "c", axes, until=ps.epochs(2))
    assert digests(sweep(tmp_path / "c", axes, until=ps.epochs(4))) == straight


@pytest.mark.slow
def test_a_signal_ends_all_of_them_with_snapshots_and_the_same_call_goes_on(tmp_path):
    axes = {"lr": [0.1, 0.01]}
    straight = digests(sweep(tmp_path / "a", axes))
    AT["signal"] = (0.01, 2)
    stopped = sweep(tmp_path / "b", axes)
    assert stopped.interrupted == "SIGINT"
    assert [row.why for row in stopped.rows] == ["SIGINT", "SIGINT"]
    assert all(2 <= row.summary.batches <= 3 for row in stopped.rows)
    assert digests(sweep(tmp_path / "b", axes)) == straight


@pytest.mark.slow
def test_an_error_ends_one_run_and_the_others_go_on(tmp_path):
    straight = digests(sweep(tmp_path / "a", {"lr": [0.1, 0.03, 0.01]}))
    AT["error"] = (0.03, 2)
    with pytest.warns(SweepWarning, match=r"lr=0\.03: ZeroDivisionError: of the run"):
        found = sweep(tmp_path / "b", {"lr": [0.1, 0.03, 0.01]})
    assert [row.why.split(":")[0] for row in found.rows] == [
        "reached 2 epochs",
        "ZeroDivisionError",
        "reached 2 epochs",
    ]
    assert [digests(found)[name] for name in ("lr=0.1", "lr=0.01")] == [
        straight[name] for name in ("lr=0.1", "lr=0.01")
    ]


def test_what_differs_in_more_than_tensors_trains_in_turn(tmp_path):
    found = sweep(tmp_path, {"width": [4, 5], "p": [0.2, 0.5]}, until=ps.steps(1))
    lonely = "in turn: no other run is the same program with tensors of the same shapes"
    assert {row.how for row in found.rows} <= {lonely, "in turn: their models differ"}
    assert all(row.why == "reached 1 steps" for row in found.rows)


@pytest.mark.parametrize("counter", [3, "eager"])
def test_a_step_with_a_warm_up_trains_in_turn(counter):
    one = experiment()
    step = ps.jit(one.step, backend="eager", warmup=counter)
    groups = groups_of(dict.fromkeys("ab", dataclasses.replace(one, step=step)))
    assert groups.together == ()
    assert set(groups.alone.values()) == {
        "its step has a warm-up, and a mapped step is compiled from its first call on"
    }


def test_what_a_loss_function_reads_parts_them(tmp_path):
    """The descriptions of the steps do not show the tensor: a trial does, though Adam moves parameters alike."""
    found = sweep(tmp_path, {"scale": [2.0, 2.001], "seed": [0, 1]}, until=ps.steps(1))
    assert [row.how for row in found.rows] == ["vmapped"] * 4
    assert [ps.open(row.run_dir).seat_at(1) for row in found.rows] == [Seat(0, 2), Seat(1, 2)] * 2
