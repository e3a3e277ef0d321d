"""Checkpoints of torch.distributed.checkpoint: torch goes on where purestep was, and the other way round."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn import functional as F

import purestep as ps
from purestep.errors import ConfigError, OptimError, TemplateMismatch

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, which works without a process group here
TX = ps.optim.adamw(0.05, weight_decay=0.1)


def theirs(params):
    return torch.optim.AdamW(params, lr=0.05, weight_decay=0.1)


def net():
    return nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 3))


def batches(count, seed):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(7, 5, generator=draw), torch.randn(7, 3, generator=draw)) for _ in range(count)]


def ours_trained(state, seed):
    step = ps.make_step(lambda net, batch: F.mse_loss(net(batch[0]), batch[1]), TX)
    for batch in batches(4, seed):
        state, _ = step(state, batch)
    return state


def torch_trained(module, optimizer, seed):
    module.train()
    for x, y in batches(4, seed):
        optimizer.zero_grad()
        F.mse_loss(module(x), y).backward()
        optimizer.step()


def same(module, state):
    own = {**state.params, **state.buffers}
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, own[name], rtol=1e-4, atol=1e-6, msg=name)


OPTIONS = {"fsdp2": StateDictOptions(), "torchtitan": StateDictOptions(flatten_optimizer_state_dict=True)}


def theirs_as(layout, model, optimizer):
    return {"model": model, "optimizer": optimizer} if layout == "fsdp2" else {**model, "optimizer": optimizer}


@pytest.mark.parametrize("layout", OPTIONS)
def test_torch_goes_on_and_comes_back(layout, tmp_path):
    state = ours_trained(ps.init(net, TX), 0)
    ps.interop.save_dcp(state, tmp_path / "ours", optimizer=theirs, layout=layout)
    module = net()
    optimizer = theirs(module.parameters())
    model, inner = get_state_dict(module, optimizer, options=OPTIONS[layout])
    there = theirs_as(layout, model, inner)
    dcp.load(there, checkpoint_id=tmp_path / "ours", no_dist=True)
    set_state_dict(
        module, optimizer, model_state_dict=model, optim_state_dict=there["optimizer"], options=OPTIONS[layout]
    )
    same(module, state)
    torch_trained(module, optimizer, 1)
    state = ours_trained(state, 1)
    same(module, state)

    model, inner = get_state_dict(module, optimizer, options=OPTIONS[layout])
    dcp.save(theirs_as(layout, model, inner), checkpoint_id=tmp_path / "theirs", no_dist=True)
    ignore = None if layout == "fsdp2" else "optimizer.*"
    back = ps.init(net, TX, seed=4, weights=ps.Weights(tmp_path / "theirs", ignore=ignore))
    back = ps.interop.load_dcp_optimizer(back, tmp_path / "theirs")
    assert int(back.step) == 8
    torch_trained(module, optimizer, 2)
    same(module, ours_trained(back, 2))


def test_what_does_not_fit_is_named(tmp_path):
    state = ps.init(net, TX)
    saved = ps.interop.save_dcp(state, tmp_path / "a", optimizer=theirs)
    with pytest.raises(ConfigError, match="the directory holds a checkpoint already"):
        ps.interop.save_dcp(state, saved)
    with pytest.raises(TemplateMismatch, match=r"does not fit the parameters\n(.|\n)*left over: 2\.weight"):
        ps.interop.load_dcp_optimizer(ps.init(lambda: net()[:2], TX), saved)
    with pytest.raises(TemplateMismatch, match=r"missing: 3\.weight, 3\.bias"):
        ps.interop.load_dcp_optimizer(ps.init(lambda: net().append(nn.Linear(3, 3)), TX), saved)
    with pytest.raises(OptimError, match="the transformation is not the counterpart"):
        ps.interop.load_dcp_optimizer(ps.init(net, ps.optim.sgd(0.1)), saved)
    model = ps.interop.save_dcp(state, tmp_path / "b")
    with pytest.raises(ConfigError, match="the checkpoint has no entry 'optimizer'"):
        ps.interop.load_dcp_optimizer(state, model)
