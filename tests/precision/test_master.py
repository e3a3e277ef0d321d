"""Master weights: an optimizer in float32 under bfloat16 parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import OptimError
from purestep.precision import MasterWeightsState, master_weights, policy

bf16 = torch.bfloat16


def rounded(params):
    return {n: t.to(bf16) for n, t in params.items()}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "inner", [ps.optim.sgd(0.3, 0.9), ps.optim.adamw(0.1), ps.optim.lamb(0.1)], ids=lambda tx: type(tx).__name__
)
def test_the_master_is_the_inner_optimizer_and_params_are_its_rounding_to_the_bit(seed, inner):
    generator = torch.Generator().manual_seed(seed)
    full = {"a": torch.randn(7, 5, generator=generator), "b": torch.randn(3, generator=generator) * 1e-3}
    params, tx = rounded(full), master_weights(inner)
    state, oracle = tx.init(params), {n: t.float() for n, t in params.items()}
    inner_state = inner.init(oracle)
    for i in range(12):
        grads = {n: torch.randn(t.shape, generator=generator).to(bf16) for n, t in params.items()}
        updates, state = tx.update(grads, state, params, step=torch.tensor(i))
        params = tx.apply(params, updates, state)
        wide = {n: g.float() for n, g in grads.items()}
        steps, inner_state = inner.update(wide, inner_state, oracle, step=torch.tensor(i))
        oracle = ps.optim.apply_updates(oracle, steps)
        assert not ps.diff(state.master, oracle)
        assert not ps.diff(params, rounded(oracle))


def test_a_sum_of_two_roundings_is_not_good_enough():
    """A master weight just above the middle of two bfloat16 values, far from the parameter it replaces."""
    params = {"w": torch.tensor([2.0**-24], dtype=bf16)}
    master = {"w": torch.tensor([1 + 2.0**-8 + 2.0**-23])}
    updates = {"w": master["w"] - params["w"].float()}
    state = MasterWeightsState(master, None)
    assert not ps.diff(master_weights(ps.optim.sgd(0.1)).apply(params, updates, state), rounded(master))
    assert ps.diff(ps.optim.apply_updates(params, updates), rounded(master))


def test_inside_of_another_transformation_params_follow_to_rounding():
    tx = ps.optim.chain(ps.optim.clip_by_global_norm(1.0), master_weights(ps.optim.sgd(0.1)))
    params = rounded({"w": torch.randn(9)})
    state = tx.init(params)
    for _ in range(50):
        updates, state = tx.update({"w": torch.full((9,), 0.01)}, state, params)
        params = ps.optim.apply_updates(params, updates)
    torch.testing.assert_close(params["w"].float(), state.master_weights.master["w"], rtol=2**-8, atol=0)


def test_small_updates_add_up():
    step_of = lambda net, x: net(x).sum()  # noqa: E731
    tx = ps.optim.sgd(2.0**-12)
    weights = {}
    for name in ("bf16-true", "bf16-master", "32"):
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        state, step = policy(name).apply(ps.init(model, tx)), ps.make_step(step_of, tx, policy=name)
        for _ in range(64):
            state, _ = step(state, torch.ones(1, 1))
        weights[name] = state.params["weight"].item()
    assert weights == {"bf16-true": 1.0, "bf16-master": 1 - 2.0**-6, "32": 1 - 2.0**-6}


def test_a_hand_written_step_applies_them_too():
    tx = ps.optim.adam(1e-2)
    state = policy("bf16-master").apply(ps.init(nn.Linear(3, 2), tx))
    grads = {n: torch.ones_like(t) for n, t in state.params.items()}
    new = state.apply_gradients(master_weights(tx), grads)
    assert not ps.diff(new.params, rounded(new.opt_state.master))


def test_params_of_full_precision_are_not_the_master_weights_themselves():
    tx = ps.optim.sgd(0.1)
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    state = policy("bf16-master").apply(ps.init(model, tx))
    step = ps.make_step(lambda net, x: net(x).square().mean(), tx, policy="bf16-master")
    for _ in range(2):
        assert state.params["1.weight"].dtype == torch.float32
        places = [t.data_ptr() for t in ps.tree.leaves((state.params, state.opt_state))]
        assert len(set(places)) == len(places)
        state, _ = step(state, torch.randn(4, 3))


def test_back_and_forth_loses_nothing():
    tx = ps.optim.adamw(1e-2)
    state = ps.init(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), tx)
    state, _ = ps.make_step(lambda net, x: net(x).square().mean(), tx)(state, torch.randn(4, 3))
    assert not ps.diff(policy("32").apply(policy("bf16-master").apply(state)), state)
    half = policy("bf16-true").apply(state)
    assert not ps.diff(policy("bf16-true").apply(policy("32").apply(half)), half)
    assert not ps.diff(policy("32").apply(policy("64").apply(state)), state)


@pytest.mark.parametrize(
    "tx",
    [ps.optim.adam(0.1), ps.optim.adafactor(0.1), ps.optim.sgd(0.1, 0.9), ps.optim.muon(0.1), ps.optim.adadelta(0.1)],
)
@pytest.mark.parametrize("name", ["bf16-true", "64"])
def test_the_optimizer_state_has_the_dtypes_that_init_would_give_it(tx, name):
    state = policy(name).apply(ps.init(nn.Linear(6, 6), tx))
    asked = tx.init(state.params)
    assert [t.dtype for t in ps.tree.leaves(state.opt_state)] == [t.dtype for t in ps.tree.leaves(asked)]


def test_what_was_asked_for_in_another_dtype_stays():
    state = ps.init(nn.Linear(3, 2), ps.optim.adam(0.1, mu_dtype=bf16))
    assert policy("64").apply(state).opt_state.mu["weight"].dtype == bf16


def test_refusals():
    params = {"w": torch.ones(2)}
    with pytest.raises(OptimError, match="inner must be a GradientTransformation"):
        master_weights(0.1)
    with pytest.raises(OptimError, match="holds no master weights"):
        master_weights(ps.optim.sgd(0.1)).update(params, ps.optim.sgd(0.1).init(params), params)
    tx = master_weights(ps.optim.sgd(0.1))
    with pytest.raises(OptimError, match="needs the parameters"):
        tx.update(params, tx.init(params))
