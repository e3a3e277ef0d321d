"""Loss scales against jmp's and against torch.amp.GradScaler: the same history for any pattern of overflows."""

from __future__ import annotations

import jax.numpy as jnp
import jmp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purestep import tree
from purestep.errors import PrecisionError
from purestep.precision import DynamicLossScale, NoLossScale, StaticLossScale, all_finite

PATTERNS = st.lists(st.booleans(), min_size=1, max_size=24)


@given(PATTERNS, st.integers(1, 4), st.sampled_from([2.0, 4.0]), st.sampled_from([1.0, 0.25]))
def test_the_history_is_that_of_jmp(pattern, period, factor, least):
    ours = DynamicLossScale(8.0, period=period, factor=factor, min_scale=least).on("cpu")
    theirs = jmp.DynamicLossScale(
        jnp.float32(8.0), period=period, factor=int(factor), min_loss_scale=jnp.float32(least)
    )
    for finite in pattern:
        ours, theirs = ours.adjust(torch.tensor(finite)), theirs.adjust(jnp.asarray(finite))
        assert float(ours.value) == float(theirs.loss_scale)
        assert int(ours.counter) == int(theirs.counter)


@given(PATTERNS, st.integers(1, 4))
def test_the_history_is_that_of_torch(pattern, period):
    ours = DynamicLossScale(2.0**16, period=period, min_scale=2.0**-100).on("cpu")
    scaler = torch.amp.GradScaler("cpu", growth_interval=period)
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for finite in pattern:
        ours = ours.adjust(torch.tensor(finite))
        scaler.scale(weight.sum()).backward()
        weight.grad.fill_(1.0 if finite else float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert float(ours.value) == scaler.get_scale()


def test_it_stops_at_its_bounds():
    yes, no = torch.tensor(True), torch.tensor(False)
    assert float(DynamicLossScale(2.0, min_scale=2.0).on().adjust(no).value) == 2.0
    top = DynamicLossScale(2.0**127, period=1).on()
    assert float(top.adjust(yes).value) == 2.0**127


@pytest.mark.parametrize("scale", [DynamicLossScale(2.0**10), StaticLossScale(2.0**10), NoLossScale()], ids=repr)
def test_scaling_and_unscaling_leave_the_values(scale):
    scale = scale.on("cpu")
    values = {"a": torch.tensor(np.random.default_rng(1).standard_normal(5)), "b": torch.tensor(3.0)}
    assert tree.equal(scale.unscale(scale.scale(values)), values)
    assert tree.structure(scale.adjust(torch.tensor(False))) == tree.structure(scale)
    again = tree.unflatten(tree.structure(scale), tree.leaves(scale))
    assert again == scale


def test_half_gradients_are_unscaled_in_float32():
    tiny = torch.tensor([2.0**-24], dtype=torch.float16)
    out = StaticLossScale(2.0**10).on("cpu").unscale(tiny)
    assert out.dtype == torch.float32
    assert out.item() == 2.0**-34


def test_a_state_owns_its_numbers():
    scale = DynamicLossScale().on("cpu")
    again = scale.on("cpu")
    assert again == scale
    assert again.value.data_ptr() != scale.value.data_ptr()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_finite(bad, dtype):
    good = {"a": torch.randn(7, 3).to(dtype), "b": torch.zeros(0, dtype=dtype), "c": torch.tensor(1.0)}
    assert bool(all_finite(good))
    for at in range(21):
        worse = good["a"].clone()
        worse.view(-1)[at] = bad
        assert not bool(all_finite(good | {"a": worse}))
    largest = torch.full((3,), torch.finfo(dtype).max, dtype=dtype)
    assert bool(all_finite(largest))


@pytest.mark.parametrize(
    "make",
    [
        lambda: DynamicLossScale(0.0),
        lambda: DynamicLossScale(float("inf")),
        lambda: StaticLossScale(-1.0),
        lambda: DynamicLossScale(factor=1.0),
        lambda: DynamicLossScale(period=0),
        lambda: DynamicLossScale(min_scale=0.0),
    ],
)
def test_refusals(make):
    with pytest.raises(PrecisionError, match="loss scale"):
        make()
