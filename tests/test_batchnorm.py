"""`refresh_batchnorm` against `torch.optim.swa_utils.update_bn`, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import purestep as ps
from purestep.errors import DataError


def model():
    return nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3, momentum=0.3), nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4)
    )


def test_it_is_that_of_torch(seed):
    net = model()
    batches = [torch.randn(n, 2, 6) * n for n in (5, 8, 3)]
    tx = ps.optim.average_params(ps.optim.sgd(0.1), decay=None)
    step = ps.make_step(lambda net, batch: net(batch).square().mean(), tx)
    state = ps.init(net, tx)
    for batch in batches:
        state, _ = step(state, batch)
    averaged = ps.optim.averaged(state)
    fresh = ps.refresh_batchnorm(averaged, lambda net, batch: net(batch).mean(), batches)
    theirs = ps.to_module(averaged).train()
    update_bn(batches, theirs)
    for name, buffer in theirs.named_buffers():
        assert torch.equal(fresh.buffers[name], buffer), name
        assert not torch.equal(fresh.buffers[name], state.buffers[name]) or name.endswith("tracked")
    ps.testing.assert_trees_equal(fresh.replace(buffers=averaged.buffers), averaged)
    assert [m.momentum for m in fresh.model.module if isinstance(m, nn.BatchNorm1d)] == [0.3, 0.1]
    # Evaluated like this in a run.
    callback = ps.callbacks.evaluate(
        lambda net, batch: net(batch).square().mean(),
        batches,
        of=lambda s: ps.refresh_batchnorm(ps.optim.averaged(s), lambda net, batch: net(batch), batches),
    )
    with torch.no_grad():
        total = sum(theirs.eval()(batch).square().mean().double() * len(batch) for batch in batches)
    assert callback.evaluate(state, lambda: False)["val/loss"] == pytest.approx(float(total) / 16, rel=1e-5)


def test_without_batchnorm_and_without_batches():
    plain = ps.init(lambda: nn.Linear(2, 1), ps.optim.sgd(0.1))
    assert ps.refresh_batchnorm(plain, lambda net, batch: net(batch), []) is plain
    with pytest.raises(DataError, match="refresh_batchnorm has no batches"):
        ps.refresh_batchnorm(ps.init(model, ps.optim.sgd(0.1)), lambda net, batch: net(batch), [])
