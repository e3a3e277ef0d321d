"""What microbatches contribute, against the mean written out."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.accumulate import Accumulation, Gradients
from purestep.errors import StepError
from purestep.metrics import Mean

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
