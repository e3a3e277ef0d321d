"""An ensemble trains each member as alone, up to rounding; as one run it is logged, evaluated, saved and resumed."""

from __future__ import annotations

import pytest
import torch
from shared_marks import slow_but
from torch import nn

import purestep as ps
from purestep.errors import ConfigError, TreeError

TX = ps.optim.adam(1e-2)
X = ps.random.normal(ps.random.key(7), (77, 3))


def loss_fn(net, batch):
    prediction = net(batch["x"])
    return (prediction - batch["y"]).square().mean(), {"positive": (prediction > 0).float().mean()}


def make_model():
    return nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))


STEP = ps.make_step(loss_fn, TX)


def data(seed=0):
    return ps.data.batches({"x": X, "y": X.sin().sum(1, keepdim=True)}, 16, seed=seed, drop_last=False)


def members(number=3):
    return [ps.init(make_model, TX, seed=seed) for seed in range(number)]


def close(a, b):
    for one, other in zip(ps.tree.leaves(a), ps.tree.leaves(b), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("microbatches", slow_but([1, 2], 1))
def test_each_member_trains_as_alone(microbatches):
    step = ps.make_step(loss_fn, TX, microbatches=microbatches)
    train = data().replace(drop_last=True)
    evaluating = ps.callbacks.evaluate(ps.ensemble(ps.make_eval(loss_fn)), data(), name="val")
    together = ps.fit(ps.ensemble(step), ps.stack(members()), train, until=ps.epochs(2), callbacks=[evaluating])
    for number, (state, found) in enumerate(zip(members(), ps.unstack(together.state), strict=True)):
        alone = ps.fit(step, state, train, until=ps.epochs(2), callbacks=[ps.callbacks.evaluate(loss_fn, data())])
        close(found, alone.state)
        for name in ("loss", "positive"):
            assert together.metrics[f"val/{name}/{number}"] == pytest.approx(alone.metrics[f"val/{name}"], rel=1e-3)
    values = [together.metrics[f"val/loss/{number}"] for number in range(3)]
    assert together.metrics["val/loss"] == pytest.approx(sum(values) / 3)  # of the samples of all members
    assert len({round(value, 6) for value in values}) == 3


def test_as_one_run_it_resumes_with_its_bits(tmp_path):
    def train(until, run_dir=None):
        saving = [ps.callbacks.snapshots(every=ps.every.steps(2))] if run_dir else []
        return ps.fit(
            ps.ensemble(STEP), ps.stack(members()), data(), until=until, run_dir=run_dir, callbacks=saving, strict=True
        )

    train(ps.steps(3), tmp_path)
    assert ps.digest(train(ps.steps(7), tmp_path).state) == ps.digest(train(ps.steps(7)).state)
    columns = ps.open(tmp_path).metrics
    assert {"train/loss_epoch", "train/loss/0_epoch", "train/positive/2_epoch"} <= set(columns)


def test_members_may_have_batches_of_their_own():
    batches = [next(iter(data(seed).epoch(0))) for seed in range(3)]
    states, metrics = ps.ensemble(STEP, own_batches=True)(ps.stack(members()), ps.stack(batches))
    for number, (state, batch, found) in enumerate(zip(members(), batches, ps.unstack(states), strict=True)):
        alone, expected = STEP(state, batch)
        close(found.params["4.weight"], alone.params["4.weight"])
        close(metrics[f"loss/{number}"].compute(), expected["loss"].compute())


def test_hyperparameters_in_the_state_differ_between_members():
    tx = ps.optim.inject_hyperparams(ps.optim.sgd)(learning_rate=0.1)
    step, state = ps.make_step(loss_fn, tx), ps.init(make_model, tx, seed=0)
    batch = next(iter(data().epoch(0)))
    rates = [0.0, 0.5]
    states, _ = ps.ensemble(step)(ps.stack([ps.optim.set(state, learning_rate=rate) for rate in rates]), batch)
    still, moved = ps.unstack(states)
    assert ps.tree.equal(still.params, state.params)
    close(moved.params, step(ps.optim.set(state, learning_rate=0.5), batch)[0].params)


@pytest.mark.slow
def test_a_compiled_ensemble_trains_as_one_that_is_not():
    one, other = (
        ps.fit(step, ps.stack(members()), data().replace(drop_last=True), until=ps.steps(4))
        for step in (ps.ensemble(STEP), ps.jit(ps.ensemble(STEP), donate=True, backend="eager"))
    )
    close(one.state.params["4.weight"], other.state.params["4.weight"])


def test_stacking_is_undone():
    assert all(ps.tree.equal(*pair) for pair in zip(ps.unstack(ps.stack(members())), members(), strict=True))


def test_what_does_not_fit_is_refused():
    other = ps.init(lambda: nn.Linear(3, 2), TX)
    with pytest.raises(TreeError):
        ps.stack([members()[0], other])
    with pytest.raises(TreeError) as caught:
        ps.stack([{"w": torch.ones(2)}, {"w": torch.ones(3)}])
    assert "w: float32[2] in states[0], float32[3] in states[1]" in str(caught.value)
    with pytest.raises(TreeError, match="this is no stacked state\n  where:   step: int64"):
        ps.unstack(members()[0].replace(params={}, buffers={}, opt_state=None, rng=None))
    with pytest.raises(TreeError, match="an ensemble has at least one member"):
        ps.stack([])
    with pytest.raises(ConfigError, match="a step of a plan is not mapped"):
        ps.ensemble(ps.make_step(loss_fn, TX, plan=ps.sharding.ddp()))
    with pytest.raises(ConfigError, match="a step that consumes its state is not mapped"):
        ps.ensemble(ps.jit(STEP, donate=True))
