"""Checkpoints by rule: the bits of a step without them, and what is computed again, stored, or moved."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout
from torch.utils._python_dispatch import TorchDispatchMode

import purestep as ps
from purestep import activations
from purestep.errors import ConfigError

TX = ps.optim.adamw(1e-2)
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Dropout, batch norm, a submodule that would match too, and a keyword argument."""

    calls = 0

    def __init__(self, p):
        super().__init__()
        self.inner, self.norm, self.p = (
            nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8)),
            nn.BatchNorm1d(8),
            p,
        )

    def forward(self, x, *, scale=1.0):
        Block.calls += 1
        return x + scale * dropout(self.norm(self.inner(x)), self.p, self.training)


class Net(nn.Module):
    def __init__(self, p=0.3):
        super().__init__()
        self.embed, self.blocks = nn.Linear(8, 8), nn.ModuleList(Block(p) for _ in range(3))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return x


def loss_fn(net, x):
    return net(x).square().mean()


def trained(checkpoint, steps=2, **options):
    """Return the digest of a small training, and how often a block was called in it."""
    policy = options.get("policy")
    state = ps.init(Net, TX, seed=1)
    state = state if policy is None else ps.precision.policy(policy).apply(state)
    step = ps.make_step(loss_fn, TX, checkpoint=checkpoint, **options)
    Block.calls = 0
    for _ in range(steps):
        state, _ = step(state, X)
    module = state.model.module
    assert [type(block) for block in module.blocks] == [Block] * 3
    return ps.digest(state), Block.calls


RULES = {
    "glob": "blocks.*",
    "globs": ["blocks.0", "blocks.2"],
    "function": lambda path: path == "blocks.1",
    "kept": ps.Checkpoint("blocks.*", keep=("mm", "addmm")),
    "cpu": ps.Checkpoint("blocks.*", offload=True),
}
AGAIN = {"glob": 3, "globs": 2, "function": 1, "kept": 3, "cpu": 0}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "options", [{}, {"microbatches": 3}, {"policy": "bf16-mixed"}, {"plan": ps.sharding.fsdp()}], ids=str
)
def test_the_bits_do_not_change(rule, options, monkeypatch):
    if rule == "cpu":
        if "plan" in options:
            options = {"plan": ps.sharding.zero2()}  # fsdp refuses it
        monkeypatch.setattr(activations, "_HOSTS", ())  # this CPU stands for a card
    count = 2 * options.get("microbatches", 1)
    assert trained(RULES[rule], **options) == (trained(None, **options)[0], count * (3 + AGAIN[rule]))


def test_a_compiled_step_recomputes_too():
    tx_bits, _ = trained(None)
    state, step = ps.init(Net, TX, seed=1), ps.jit(ps.make_step(loss_fn, TX, checkpoint="blocks.*"), backend="eager")
    graph = step.graph(state, X)
    for _ in range(2):
        state, _ = step(state, X)
    assert ps.digest(state) == tx_bits
    plain = ps.jit(ps.make_step(loss_fn, TX), backend="eager").graph(ps.init(Net, TX, seed=1), X)
    assert graph.count("aten.tanh.default") == 2 * plain.count("aten.tanh.default") == 6


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("keep", "multiplied"), [((), 6), (("addmm",), 0)])
def test_what_is_kept_is_not_computed_again(keep, multiplied):
    counts = []
    for rule in (None, ps.Checkpoint("blocks.*", keep=keep)):
        state, step = ps.init(Net, TX, seed=1), ps.make_step(loss_fn, TX, checkpoint=rule)
        with Counted() as counted:
            step(state, X)
        counts.append(counted.seen)
    assert counts[1]["addmm"] - counts[0]["addmm"] == multiplied
    assert counts[1]["tanh"] - counts[0]["tanh"] == 3


def test_what_is_saved_goes_away_and_comes_back_but_for_parameters(monkeypatch):
    monkeypatch.setattr(activations, "_HOSTS", ())
    moved, back = [], []
    to_cpu, from_cpu = activations._to_cpu, activations._back

    def noted(stays, saved):
        packed = to_cpu(stays, saved)
        moved.append(packed)
        return packed

    monkeypatch.setattr(activations, "_to_cpu", noted)
    monkeypatch.setattr(activations, "_back", lambda packed: (back.append(packed), from_cpu(packed))[1])
    activations._rerouted.cache_clear()
    state = ps.init(Net, TX, seed=1)
    ps.make_step(loss_fn, TX, checkpoint=ps.Checkpoint("blocks.*", offload=True))(state, X)
    away = [packed for packed in moved if isinstance(packed, tuple)]
    assert len(away) > 9
    assert len(back) == len(moved)
    shapes = {tuple(p.shape) for p in state.params.values()}
    assert not any(tuple(there.shape) in shapes - {(8,)} for _, there in away)
    activations._rerouted.cache_clear()


def test_evaluations_and_errors_leave_the_model_as_it_was():
    state = ps.init(Net, TX, seed=1)
    step = ps.make_step(lambda net, x: loss_fn(net, x.flatten()), TX, checkpoint="blocks.*")
    with pytest.raises(RuntimeError):
        step(state, X)
    assert [type(block) for block in state.model.module.blocks] == [Block] * 3


def test_what_would_do_nothing_is_refused():
    state = ps.init(Net, TX, seed=1)
    with pytest.raises(ConfigError, match=r"matches no submodule(.|\n)*'block.\*'; there are: blocks"):
        ps.make_step(loss_fn, TX, checkpoint="block.*")(state, X)
    with pytest.raises(ConfigError, match=r"torch\.ops\.aten has no 'matmull'"):
        ps.Checkpoint("blocks.*", keep="matmull")
    with pytest.raises(ConfigError, match="a compiled step does not move activations"):
        ps.jit(ps.make_step(loss_fn, TX, checkpoint=ps.Checkpoint("blocks.*", offload=True)))
    with pytest.raises(ConfigError, match="nothing to keep"):
        ps.Checkpoint("blocks.*", keep=("mm",), offload=True)
    with pytest.raises(ConfigError, match=r"moved to the CPU under a plan(.|\n)*zero2\(\)"):
        ps.make_step(loss_fn, TX, checkpoint=ps.Checkpoint("blocks.*", offload=True), plan=ps.sharding.fsdp())
