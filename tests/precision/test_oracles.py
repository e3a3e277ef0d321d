"""Torch's own mixed precision as the oracle: autocast with GradScaler, and a loop in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import purestep as ps
from purestep.precision import DynamicLossScale, policy


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 5))


def loss_fn(net, batch):
    # `blow` stands for what overflows in float16 and only there.
    return cross_entropy(net(batch["x"]), batch["y"]) * batch["blow"]


def batches(count: int, seed: int, bad: tuple[int, ...]):
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        yield {
            "x": torch.randn(20, 12, generator=generator),
            "y": torch.randint(0, 5, (20,), generator=generator),
            "blow": torch.tensor(1e6 if i in bad else 1.0),
        }


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("clip", [False, True])
def test_grad_scaler_with_autocast(seed, autocast, clip):
    count, bad, period = 24, (3, 4, 15), 5
    scale = DynamicLossScale(2.0**20, period=period)  # too high, so the first steps overflow by themselves
    p = policy("16-mixed", autocast=autocast, loss_scale=scale)
    parts = [ps.optim.clip_by_global_norm(0.5)] * clip + [ps.optim.adam(1e-2)]
    tx = ps.optim.chain(*parts)
    torch.manual_seed(seed)
    model = make_model()
    state, step = p.apply(ps.init(model, tx)), ps.make_step(loss_fn, tx, policy=p)

    optimizer = torch.optim.Adam(model.parameters(), 1e-2, foreach=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=period)
    for batch in batches(count, seed, bad):
        before = state
        state, metrics = step(state, batch)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_fn(model, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        old = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped = scaler.get_scale() < old
        assert int(metrics["skipped"].compute()) == skipped
        assert float(state.loss_scale.value) == scaler.get_scale()
        if skipped:
            assert not ps.diff(state.replace(loss_scale=None), before.replace(loss_scale=None))
    applied = int(state.step)
    limit = 2e-2 if not autocast else 1e-4 if clip else 0.0  # torch adds 1e-6 to the norm it clips by
    assert 8 <= applied < count
    for name, value in model.named_parameters():
        torch.testing.assert_close(state.params[name], value.detach(), rtol=0, atol=limit)


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_scale(microbatches, kind):
    scale = DynamicLossScale(2.0**10) if kind == "dynamic" else ps.precision.StaticLossScale(2.0**10)
    p = policy("16-mixed", loss_scale=scale)
    tx = ps.optim.chain(
        ps.optim.clip_by_global_norm(1.0), ps.optim.adamw(ps.optim.linear_schedule(1e-2, 0.0, transition_steps=10))
    )
    model = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.Dropout(0.2), nn.Linear(24, 5))
    state = p.apply(ps.init(model, tx))
    step = ps.make_step(loss_fn, tx, policy=p, microbatches=microbatches)
    good, bad = list(batches(2, 0, (1,)))
    state, metrics = step(state, good)
    assert int(metrics["skipped"].compute()) == 0
    bad = bad | {"x": bad["x"].clone()}
    bad["x"][-1, 0] = torch.inf  # in the last microbatch only
    new, metrics = step(state, bad)
    assert int(metrics["skipped"].compute()) == 1
    assert not ps.diff(new.replace(loss_scale=None), state.replace(loss_scale=None))
    assert float(new.loss_scale.value) == (2.0**9 if kind == "dynamic" else 2.0**10)
    went_on, metrics = step(new, good)
    assert int(went_on.step) == int(state.step) + 1
    assert int(metrics["skipped"].compute()) == 0


def test_clipping_sees_unscaled_gradients():
    tx = ps.optim.chain(ps.optim.clip_by_global_norm(1e9), ps.optim.sgd(1.0))
    news = []
    for scale in (1.0, 2.0**10):
        p = policy("32", loss_scale=ps.precision.StaticLossScale(scale))
        torch.manual_seed(0)
        state = p.apply(ps.init(make_model(), tx))
        (batch,) = batches(1, 0, ())
        news.append(ps.make_step(loss_fn, tx, policy=p)(state, batch)[0].params)
    assert not ps.diff(*news)


def test_it_works_together_with_a_transformation_that_skips():
    p = policy("16-mixed", loss_scale=DynamicLossScale(4.0, period=1))
    tx = ps.optim.skip_large_updates(ps.optim.sgd(0.1), max_norm=1e-6)
    state = p.apply(ps.init(make_model(), tx))
    (batch,) = batches(1, 0, ())
    new, metrics = ps.make_step(loss_fn, tx, policy=p)(state, batch)
    assert int(metrics["skipped"].compute()) == 1
    assert int(new.step) == 0
    assert int(new.opt_state.skipped) == 1  # the transformation ran and counted
    assert float(new.loss_scale.value) == 8.0  # the gradients were finite


def test_float64_is_torch_in_float64():
    tx = ps.optim.adamw(1e-2, weight_decay=0.1)
    torch.manual_seed(0)
    model = make_model()
    state = policy("64").apply(ps.init(model, tx))
    step = ps.make_step(loss_fn, tx, policy="64")
    oracle = [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in batches(5, 0, ())]
    torch.set_default_dtype(torch.float64)
    try:
        model = model.double()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1, foreach=True)
        for batch in oracle:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    for batch in batches(5, 0, ()):
        state, _ = step(state, batch)
    for name, value in model.named_parameters():
        torch.testing.assert_close(state.params[name], value.detach(), rtol=0, atol=1e-15)


def test_without_a_policy_a_float32_model_has_the_bits_of_policy_32():
    tx = ps.optim.adamw(1e-2)
    state = ps.init(make_model(), tx)
    (batch,) = batches(1, 0, ())
    plain, _ = ps.make_step(loss_fn, tx)(state, batch)
    under, _ = ps.make_step(loss_fn, tx, policy="32")(state, batch)
    assert not ps.diff(plain, under)


def test_gradients_of_microbatches_are_summed_in_the_reduce_dtype():
    tx, seen = ps.optim.sgd(0.1), []
    for reduce in ("bf16", "f32"):
        p = policy("bf16-true", reduce=reduce)
        torch.manual_seed(0)
        state = p.apply(ps.init(make_model(), tx))
        (batch,) = batches(1, 0, ())
        step = ps.make_step(loss_fn, tx, policy=p, microbatches=4)
        part = step.grads(state, {k: v[:5] if v.ndim else v for k, v in batch.items()})
        assert {g.dtype for g in part.grads.values()} == {p.reduce}
        seen.append(step(state, batch)[0])
    assert ps.diff(seen[0].params, seen[1].params)
    assert {t.dtype for t in seen[1].params.values()} == {torch.bfloat16}
