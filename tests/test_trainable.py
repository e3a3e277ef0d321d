"""Freezing and thawing between runs: torch's `add_param_group` is the oracle of what the optimizer then does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import OptimError, StepError
from purestep.trainable import freeze, thaw

RULES = {
    "adam": (ps.optim.adam, torch.optim.Adam),
    "momentum": (lambda lr: ps.optim.sgd(lr, momentum=0.9), lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)),
}


def model():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def loss_fn(net, batch):
    return nn.functional.cross_entropy(net(batch["x"]), batch["y"])


def parts(ours):
    labels = {"head": "4.*", "body": "*"}
    return ps.optim.chain(
        ps.optim.clip_by_global_norm(10.0), ps.optim.partition({"head": ours(0.05), "body": ours(0.01)}, labels)
    )


@pytest.fixture
def batches(seed):
    return [{"x": torch.randn(n, 5), "y": torch.randint(0, 2, (n,))} for n in (6, 3, 8, 5, 7, 4)]


@pytest.mark.parametrize("rule", RULES)
def test_thawed_parameters_train_as_an_added_group_of_torch(rule, batches):
    ours, theirs = RULES[rule]
    net, tx = model(), parts(ours)
    state = ps.init(net, tx, frozen="[02].*")
    step = ps.make_step(loss_fn, tx)
    optimizer = theirs(net[4].parameters(), 0.05)
    for i, batch in enumerate(batches):
        if i == 3:
            state = thaw(state, ["0.*", "2.*"], tx)
            optimizer.add_param_group({"params": [*net[0].parameters(), *net[2].parameters()], "lr": 0.01})
        before = net[0].weight.clone()
        net.zero_grad()
        loss_fn(net, batch).backward()
        optimizer.step()
        state, _ = step(state, batch)
        assert torch.equal(before, net[0].weight) == (i < 3)
    assert list(state.params) == [name for name, _ in net.named_parameters()]
    assert int(state.step) == len(batches)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(state.params[name], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_freezing_keeps_the_rest_and_is_undone_by_thawing(batches):
    tx = ps.optim.adam(0.01)
    step = ps.make_step(loss_fn, tx)
    state = ps.init(model, tx, seed=1)
    for batch in batches:
        state, _ = step(state, batch)
    frozen = freeze(state, "0.*", tx)
    assert list(frozen.params) == ["2.weight", "2.bias", "4.weight", "4.bias"]
    assert torch.equal(frozen.buffers["0.weight"], state.params["0.weight"])
    for name in frozen.params:
        assert torch.equal(ps.optim.get(frozen.opt_state, f"mu.{name}"), ps.optim.get(state.opt_state, f"mu.{name}"))
    assert torch.equal(ps.optim.get(frozen.opt_state, "count"), ps.optim.get(state.opt_state, "count"))
    again = thaw(frozen, "0.*", tx)
    ps.testing.assert_trees_equal(again.params, state.params)
    assert not torch.any(ps.optim.get(again.opt_state, "mu.0.weight"))
    assert torch.equal(ps.optim.get(again.opt_state, "count"), ps.optim.get(state.opt_state, "count"))
    after, _ = step(again, batches[0])
    assert not torch.equal(after.params["0.weight"], again.params["0.weight"])


def test_the_average_goes_on(batches):
    tx = ps.optim.average_params(ps.optim.sgd(0.1), decay=0.5)
    state = ps.init(model, tx, frozen="0.*")
    state, _ = ps.make_step(loss_fn, tx)(state, batches[0])
    thawed = thaw(state, "0.*", tx)
    assert torch.equal(ps.optim.averaged(thawed).params["2.weight"], ps.optim.averaged(state).params["2.weight"])
    assert torch.equal(ps.optim.averaged(thawed).params["0.weight"], state.buffers["0.weight"])


def test_another_run_goes_on_with_it(batches, tmp_path):
    tx = ps.optim.adam(0.01)
    step = ps.make_step(loss_fn, tx)
    first = ps.fit(step, ps.init(model, tx, frozen="0.*"), batches, until=ps.epochs(1), run_dir=tmp_path / "head")
    thawed = ps.thaw(first.state, "0.*", tx)
    second = ps.fit(step, thawed, batches, until=ps.epochs(1), run_dir=tmp_path / "all")
    assert int(second.state.step) == 12
    assert not torch.equal(second.state.params["0.weight"], thawed.params["0.weight"])


def test_what_is_refused():
    tx = ps.optim.adam(0.01)
    state = ps.init(model, tx, frozen="0.*")
    with pytest.raises(StepError, match=r"matches no frozen parameter(.|\n)*frozen: 0.weight, 0.bias"):
        thaw(state, "2.*", tx)
    with pytest.raises(StepError, match="matches no trained parameter"):
        freeze(state, "0.*", tx)
    with pytest.raises(StepError, match="freezes all parameters"):
        freeze(state, "*", tx)
    with pytest.raises(OptimError, match=r"that of another transformation(.|\n)*it has .*count"):
        thaw(state, "0.*", ps.optim.sgd(0.1))
