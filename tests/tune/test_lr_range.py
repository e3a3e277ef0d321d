"""The learning-rate range test: its curve against a loop by hand, its suggestion against numpy, what it refuses."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import ConfigError
from purestep.tune.lr_range import diverged, smooth


def loss_fn(net, batch):
    return (net(batch["x"]) - batch["y"]).square().mean()


@pytest.fixture(scope="module")
def data():
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(70, 5, generator=draw)
    return ps.data.batches({"x": x, "y": x @ torch.randn(5, 1, generator=draw)}, 16, seed=1)


def state_of(tx):
    return ps.init(lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)), tx, seed=2)


INJECTED = ps.optim.inject_hyperparams(ps.optim.adam)(learning_rate=0.1)


def by_hand(state, data, rates):
    """Each step with an optimizer of its own number, in a plain loop."""
    epochs = -(-len(rates) // 4)
    batches = [batch for epoch in range(epochs) for batch in data.open(epoch, 0, None)]
    losses = []
    for rate, batch in zip(rates, batches, strict=False):
        state = state.replace(opt_state=ps.optim.set(state.opt_state, learning_rate=rate))
        state, row = ps.make_step(loss_fn, INJECTED)(state, batch)
        losses.append(ps.metrics.compute(ps.metrics.as_metrics(row, 1))["loss"])
    return losses


@pytest.mark.parametrize("mode", ["exponential", "linear"])
def test_each_step_has_the_loss_of_its_learning_rate(data, mode):
    state = state_of(INJECTED)
    before = ps.digest(state)
    step = ps.make_step(loss_fn, INJECTED)
    found = ps.tune.lr_range(step, state, data, min_lr=1e-4, max_lr=0.5, num_steps=21, mode=mode, early_stop=None)
    wanted = np.geomspace(1e-4, 0.5, 21) if mode == "exponential" else np.linspace(1e-4, 0.5, 21)
    np.testing.assert_allclose(found.lrs, wanted, rtol=1e-12)
    assert list(found.losses) == by_hand(state, data, found.lrs)
    assert ps.digest(state) == before
    assert (found.why, int(found.state.step)) == ("reached 21 steps", 21)
    again = ps.tune.lr_range(step, state, data, min_lr=1e-4, max_lr=0.5, num_steps=21, mode=mode, early_stop=None)
    assert (again.lrs, again.losses, ps.digest(again.state)) == (found.lrs, found.losses, ps.digest(found.state))


def test_tx_makes_the_step_that_an_injected_one_is(data):
    fixed = state_of(ps.optim.adam(0.1))
    options = {"min_lr": 1e-3, "max_lr": 0.1, "num_steps": 9}
    wanted = ps.tune.lr_range(ps.make_step(loss_fn, INJECTED), state_of(INJECTED), data, **options).losses
    for given in (
        loss_fn,
        ps.make_step(loss_fn, ps.optim.adam(0.1)),
        ps.jit(ps.make_step(loss_fn, INJECTED), backend="eager"),
    ):
        assert ps.tune.lr_range(given, fixed, data, tx=ps.optim.adam, **options).losses == wanted
    started = state_of(INJECTED)
    started = ps.fit(ps.make_step(loss_fn, INJECTED), started, data, until=ps.steps(5)).state
    assert ps.tune.lr_range(ps.make_step(loss_fn, INJECTED), started, data, **options).lrs[0] == pytest.approx(1e-3)


def test_it_ends_where_the_loss_diverges_and_no_step_later(data):
    found = ps.tune.lr_range(loss_fn, state_of(INJECTED), data, tx=ps.optim.sgd, min_lr=1e-3, max_lr=1e4, num_steps=50)
    assert found.why == "the loss diverged"
    assert diverged(found.losses, 4.0) == len(found.losses) - 1 < 49
    assert diverged(found.losses[:-1], 4.0) is None


@pytest.mark.parametrize("seed", range(4))
def test_smoothing_and_divergence_are_those_of_their_formulas(seed):
    losses = list(np.random.default_rng(seed).exponential(size=40).cumsum() ** (seed - 1))
    beta, average, smoothed = 0.98, 0.0, []
    for count, loss in enumerate(losses):
        average = beta * average + (1 - beta) * loss
        smoothed.append(average / (1 - beta ** (count + 1)))
    assert smooth(losses) == pytest.approx(smoothed)
    first = next((i for i in range(1, 40) if smoothed[i] > 1.5 * min(smoothed[:i])), None)
    assert diverged(losses, 1.5) == first
    assert diverged([1.0, math.nan, 1.0], 4.0) == 1


@pytest.mark.parametrize("mode", ["exponential", "linear"])
def test_the_suggestion_is_where_the_line_through_the_neighbours_falls_most(mode):
    draw = np.random.default_rng(7)
    lrs = np.geomspace(1e-5, 1, 60) if mode == "exponential" else np.linspace(1e-5, 1, 60)
    axis = np.log10(lrs) if mode == "exponential" else lrs
    losses = 2 / (1 + np.exp(8 * (axis - axis.mean()) / np.ptp(axis))) + draw.normal(scale=0.02, size=60)
    found = ps.tune.LearningRateRange(tuple(lrs), tuple(losses), mode, "reached 60 steps")
    slopes = {
        i: np.polyfit(axis[max(i - 6, 0) : i + 7], losses[max(i - 6, 0) : i + 7], 1)[0] for i in range(10, 60 - 1)
    }
    assert found.suggestion == lrs[min(slopes, key=slopes.get)]
    assert dataclasses.replace(found, skip_begin=45).suggestion >= lrs[45]
    broken = dataclasses.replace(found, losses=(*losses[:50], *[math.nan] * 10))
    assert broken.suggestion == found.suggestion


@pytest.mark.parametrize("losses", [tuple(range(1, 30)), (1.0,) * 12, ()])
def test_without_a_fall_there_is_no_suggestion(losses):
    lrs = tuple(np.geomspace(1e-4, 1, len(losses))) if losses else ()
    found = ps.tune.LearningRateRange(lrs, losses, "exponential", "reached")
    assert found.suggestion is None
    assert ("the loss falls nowhere" if len(losses) > 12 else "too few steps") in str(found)
    assert "<svg" in found._repr_html_() or not losses


def test_it_shows_and_draws_itself(data):
    found = ps.tune.lr_range(loss_fn, state_of(INJECTED), data, tx=ps.optim.sgd, num_steps=40, max_lr=3.0)
    assert {"suggestion", "log10"} <= set(str(found).split())
    assert f"{found.suggestion:.3g}" in found._repr_html_()
    (axes,) = found.plot(title="t").axes
    assert (axes.get_xlabel(), len(axes.lines)) == ("log10 learning_rate", 3)


TWO = ps.optim.partition(
    {"a": ps.optim.inject_hyperparams(ps.optim.sgd)(learning_rate=0.1), "b": INJECTED}, lambda n: "ab"["0." in n]
)
SCHEDULED = ps.optim.inject_hyperparams(ps.optim.sgd)(learning_rate=ps.optim.cosine_decay_schedule(0.1, 9))


@pytest.mark.parametrize(
    ("tx", "options", "words"),
    [
        (
            ps.optim.adam(0.1),
            {},
            ["cannot be set", "adam(learning_rate=0.1)", "inject_hyperparams(ps.optim.adamw)", "tx=ps.optim"],
        ),
        (TWO, {}, ["cannot be set", "its state has 2: a.hyp", "b.hyp", "name='a.hyperparams.learning_rate'"]),
        (SCHEDULED, {}, ["a schedule sets", "cosine_decay_schedule", "tx=ps.optim.adamw"]),
        (INJECTED, {"min_lr": 2.0}, ["max_lr is above min_lr", "min_lr=2.0, max_lr=1.0"]),
        (INJECTED, {"metric": "accuracy"}, ["no metric 'accuracy'", "metrics: loss"]),
        (INJECTED, {"early_stop": 0.5}, ["early_stop must be"]),
    ],
)
def test_it_says_what_it_cannot_do(data, tx, options, words):
    with pytest.raises(ConfigError) as caught:
        ps.tune.lr_range(ps.make_step(loss_fn, tx), state_of(tx), data, num_steps=3, **options)
    for word in words:
        assert word in str(caught.value)


def test_one_of_several_learning_rates_is_named(data):
    name = "a.hyperparams.learning_rate"
    found = ps.tune.lr_range(ps.make_step(loss_fn, TWO), state_of(TWO), data, num_steps=5, name=name)
    assert float(ps.optim.get(found.state.opt_state, name)) == pytest.approx(found.lrs[-1])
    assert float(ps.optim.get(found.state.opt_state, "b.hyperparams.learning_rate")) == pytest.approx(0.1)


def test_a_policy_needs_the_state_that_was_made_under_it(data):
    step = ps.make_step(loss_fn, INJECTED, policy="bf16-mixed")
    with pytest.raises(ConfigError, match="under a policy or a plan"):
        ps.tune.lr_range(step, state_of(INJECTED), data, tx=ps.optim.sgd)
    with pytest.raises(ConfigError, match="a TrainState"):
        ps.tune.lr_range(step, {"a": torch.ones(2)}, data)
