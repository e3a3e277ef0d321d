"""Batches sliced into microbatches; what those contribute, against the mean written out and against the whole batch."""

from __future__ import annotations

import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

import purestep as ps
from purestep.errors import MetricError, StepError
from purestep.metrics import Mean
from purestep.microbatch import Accumulation, Gradients, split_batch
from purestep.sharding.local_batches import microbatch_sizes

NAN = float("nan")


def part(grad, weight, buffer=0.0, count=0, loss=1.0):
    buffers = {"mean": torch.tensor([buffer, 5.0]), "count": torch.tensor(count)}
    grads = {"w": torch.as_tensor(grad)}
    return Gradients(grads, weight, buffers, {"loss": Mean(torch.tensor(loss), torch.tensor(1.0))})


def accumulated(parts, sizes):
    state = types.SimpleNamespace(buffers={"mean": torch.tensor([1.0, 5.0]), "count": torch.tensor(0)})
    total = Accumulation(state, sizes)
    for index, p in enumerate(parts):
        total.add(p, index)
    return total.result()


def test_gradients_and_buffers_are_averaged_by_what_they_weigh():
    even = accumulated([part([1.0, 2.0], 2, 3.0, 7), part([4.0, 0.0], 2, 5.0, 8)], [2, 2])
    assert even.grads["w"].tolist() == [2.5, 1.0]
    assert even.buffers["mean"].tolist() == [4.0, 5.0]
    assert int(even.buffers["count"]) == 7
    assert even.weight == 4
    assert float(even.metrics["loss"]) == 1.0
    uneven = accumulated([part([1.0, 2.0], 3, 3.0), part([4.0, 0.0], 1, 7.0)], [3, 1])
    assert uneven.grads["w"].tolist() == [1.75, 1.5]
    assert uneven.buffers["mean"].tolist() == [4.0, 5.0]


def test_a_microbatch_of_weight_zero_does_not_count():
    parts = [
        part([1.0, 2.0], torch.tensor(3.0)),
        part([4.0, 0.0], torch.tensor(1.0)),
        part([NAN, 1.0], torch.tensor(0.0)),
    ]
    mean = accumulated(parts, [1, 1, 1])
    assert mean.grads["w"].tolist() == [1.75, 1.5]
    half = [part(torch.ones(2, dtype=torch.bfloat16), 1) for _ in range(3)]
    assert accumulated(half, [1, 1, 2]).grads["w"].dtype == torch.bfloat16


def test_one_microbatch_is_the_mean_and_nothing_given_is_written_to():
    only = part([1.0, 2.0], 2)
    assert accumulated([only], [2, 0]) is only
    parts = [part([float(i), 1.0], 2) for i in range(8)]
    before = [ps.digest(p) for p in parts]
    accumulated(parts, [2] * 8)
    assert [ps.digest(p) for p in parts] == before


def test_a_loss_is_weighted_for_all_microbatches_or_for_none():
    with pytest.raises(StepError, match="weighted for some microbatches of a batch only"):
        accumulated([part([1.0, 2.0], 2), part([4.0, 0.0], torch.tensor(1.0))], [2, 2])


def test_a_buffer_that_nobody_touched_is_passed_on_and_not_copied():
    """Frozen parameters are buffers, and may be most of a model."""
    tx = ps.optim.sgd(0.1)
    state = ps.init(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), tx, frozen="0.*")
    step = ps.make_step(lambda net, batch: net(batch).square().mean(), tx, microbatches=2)
    new, _ = step(state, torch.randn(6, 3))
    assert set(new.buffers) == {"0.weight", "0.bias"}
    assert all(new.buffers[name] is state.buffers[name] for name in new.buffers)


# --- slicing a batch -----------------------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(1, 40))
def test_microbatch_sizes_are_even_and_complete(samples, parts):
    sizes = microbatch_sizes(samples, parts)
    assert len(sizes) == parts
    assert sum(sizes) == samples
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 60), st.integers(1, 20))
def test_a_split_batch_is_the_batch(samples, parts):
    batch = {"x": torch.arange(samples), "pair": (torch.randn(samples, 2), None), "scalar": torch.tensor(3), "n": 7}
    pieces = split_batch(batch, parts)
    assert len(pieces) == min(parts, samples)
    assert sum(n for _, n in pieces) == samples
    assert torch.equal(torch.cat([b["x"] for b, _ in pieces]), batch["x"])
    assert torch.equal(torch.cat([b["pair"][0] for b, _ in pieces]), batch["pair"][0])
    assert all(b["scalar"] is batch["scalar"] and b["n"] == 7 for b, _ in pieces)


def test_batches_that_cannot_be_split_are_refused():
    batch = {"x": torch.zeros(4, 2), "y": torch.zeros(3)}
    with pytest.raises(
        StepError, match=r"differ in their number of samples(.|\n)*batch\['y'\]: float32\[3\]; the first leaf has 4"
    ):
        split_batch(batch, 2)
    assert len(split_batch(batch, 1)) == 1
    with pytest.raises(MetricError, match=r"number of samples is unknown(.|\n)*batch\['n'\]: int 1"):
        split_batch({"n": 1}, 2)
    assert split_batch(None, 3) == [(None, 1)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("parts", range(1, 10))
@pytest.mark.parametrize("samples", [1, 2, 7, 16, 23])
@pytest.mark.parametrize("weights", ["samples", "tokens"])
def test_microbatch_gradients_are_those_of_the_whole_batch(parts, samples, weights, seed):
    batch = {"x": torch.randn(samples, 5, 4, dtype=torch.float64), "y": torch.randint(0, 3, (samples, 5))}
    if weights == "tokens":
        batch["y"][torch.rand(samples, 5) < 0.4] = -100
        batch["y"][: samples // 3 + 1] = -100  # a whole microbatch of padding
        batch["y"][-1, -1] = 1
    seen = []

    def loss_fn(net, batch):
        logits, labels = net(batch["x"]).flatten(0, 1), batch["y"].flatten()
        value = cross_entropy(logits, labels, ignore_index=-100)
        seen.append(len(batch["x"]))
        return ps.weighted(value, (labels != -100).sum()) if weights == "tokens" else value

    tx = ps.optim.sgd(1.0)
    start = ps.init(lambda: Net().double(), tx, seed=1)
    whole, m = ps.make_step(loss_fn, tx)(start, batch)
    cut, n = ps.make_step(loss_fn, tx, microbatches=parts)(start, batch)
    assert seen[1:] == [s for s in microbatch_sizes(samples, parts) if s]
    for name in start.params:
        torch.testing.assert_close(cut.params[name], whole.params[name], atol=1e-12, rtol=1e-12)
        assert torch.isfinite(cut.params[name]).all()
    assert float(n["loss"]) == pytest.approx(float(m["loss"]), abs=1e-12)


@pytest.mark.parametrize("microbatches", [1, 2, 3])
@pytest.mark.parametrize("plan", [None, ps.sharding.ddp()], ids=["alone", "ddp"])
def test_a_batch_that_is_all_padding_has_the_gradient_0(microbatches, plan):
    def loss_fn(net, batch):
        mean = cross_entropy(net(batch["x"]), batch["y"], ignore_index=-100)
        return ps.weighted(mean, (batch["y"] != -100).sum())

    tx = ps.optim.sgd(1.0)
    state = ps.init(lambda: nn.Linear(3, 4), tx, seed=1)
    step = ps.make_step(loss_fn, tx, microbatches=microbatches, plan=plan)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    new, metrics = step(state, {"x": x, "y": torch.full((5,), -100)})
    ps.testing.assert_trees_equal(new.params, state.params)
    assert metrics["loss"].weight == 0
    trained, _ = step(state, {"x": x, "y": torch.tensor([1, -100, -100, -100, 0])})
    whole, _ = ps.make_step(loss_fn, tx)(state, {"x": x, "y": torch.tensor([1, -100, -100, -100, 0])})
    ps.testing.assert_trees_close(trained.params, whole.params, rtol=1e-5, atol=1e-6)
