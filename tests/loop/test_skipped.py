"""A loss scale that refuses every update says so, once, with the first gradient that is not finite."""

import warnings

import pytest
import torch
from torch import nn

import purestep as ps
from purestep import optim
from purestep.loop.skipped_updates import SkippedUpdatesWarning
from purestep.precision import StaticLossScale, policy


def loss_fn(net, batch):
    # The bias of the second layer gets an infinite gradient while the batch says so.
    return net(batch["x"]).mean() + net[1].bias[0] * batch["scale"].max()


def batches(count, bad):
    for i in range(count):
        yield {"x": torch.ones(2, 3), "scale": torch.full((2,), float("inf") if bad(i) else 1.0)}


def fit(bad, *, precision="16-mixed", step=lambda step: step, count=30, **options):
    chosen, tx = policy(precision), optim.sgd(0.1)
    state = chosen.apply(ps.init(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)), tx, seed=0))
    made = step(ps.make_step(loss_fn, tx, policy=chosen, **options.pop("step_options", {})))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ps.fit(made, state, list(batches(count, bad)), until=ps.epochs(2), loggers=[], **options)
    return [str(w.message) for w in caught if w.category is SkippedUpdatesWarning]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"donate": True},
        {"step_options": {"microbatches": 2}},
        {"step": lambda step: ps.jit(step, backend="eager")},
        {"precision": policy("16-mixed", loss_scale=StaticLossScale(8.0))},
    ],
    ids=["plain", "donate", "microbatches", "jit", "static"],
)
def test_a_run_that_accepts_nothing_says_so_once(options):
    (text,) = fit(lambda i: True, **options)
    scale = 8 if "precision" in options else 1
    assert text.startswith("the last 30 updates were skipped: gradients are not finite\n")
    assert "where:   grads['1.bias'] has infinities, the loss is" in text
    assert f"; loss scale {scale}\n" in text
    assert "instead: policy='bf16-mixed'" in text


def test_a_scale_that_settles_says_nothing():
    assert fit(lambda i: i % 20 < 17) == []
    assert fit(lambda i: True, count=9) == []


def test_a_policy_without_a_scale_says_nothing():
    assert fit(lambda i: False, precision="bf16-mixed") == []
