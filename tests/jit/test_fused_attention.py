"""Fused attention with dropout in compiled graphs: seeded from keys that the host computes.

The CPU plays the card: it gets kernels in place of torch's fused ones, which keep a seed and no mask, as those do.
"""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import purestep as ps
from purestep import _torch
from purestep.jit.cuda_graph import Replay
from purestep.random import card, card_attention, card_dropout

SIZES = (3, 2, 37, 5)  # a batch, heads, positions, and features of a head


def kept(seed, weight, p):
    generator = torch.Generator().manual_seed(int(seed))
    with _torch.no_torch_function():
        return torch.empty_like(weight).bernoulli_(1 - p, generator=generator) / (1 - p)


def weights(query, key, causal, scale):
    score = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        score = score.masked_fill(~torch.ones(score.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return score.logsumexp(-1), score.softmax(-1)


def laid_out(like, value):
    """What a kernel returns has the strides of its arguments, which a compiler relies on."""
    return torch.empty_like(like).copy_(value)


def flash(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    seed = torch.tensor(card_dropout._generator(query.device).initial_seed() % 2**63)
    logsumexp, weight = weights(query, key, is_causal, scale)
    out = laid_out(query, (weight * kept(seed, weight, dropout_p)) @ value)
    return out, logsumexp, None, None, query.shape[2], key.shape[2], seed, seed.clone(), query.new_empty(0)


def backward(grad, query, key, value, out, lse, cq, ck, mq, mk, p, causal, seed, offset, *, scale=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    weight = weights(query, key, causal, scale)[1]
    mask = kept(seed, weight, p)
    inner = grad @ value.transpose(-2, -1) * mask
    score = weight * (inner - (inner * weight).sum(-1, keepdim=True)) * scale
    found = score @ key, score.transpose(-2, -1) @ query, (weight * mask).transpose(-2, -1) @ grad
    return tuple(map(laid_out, (query, key, value), found))


@pytest.fixture(scope="module")
def kernels():
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_flash_attention", flash, "CPU")
    library.impl("_scaled_dot_product_flash_attention_backward", backward, "CPU")
    card_attention.implement("CPU")
    yield
    library._destroy()


def chosen(query, key, value, mask=None, p=0.0, causal=False, *, scale=None, enable_gqa=False):
    """Torch's choice on a card."""
    if mask is not None:
        return torch.dropout(query, p, True)  # written out, with a draw from the generator of the device
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, p, causal, scale=scale)[0]


@pytest.fixture
def cpu_as_card(kernels, monkeypatch):
    monkeypatch.setattr(card, "launches", card.plain)
    monkeypatch.setattr(card_dropout, "_generator", lambda device: torch.default_generator)
    monkeypatch.setattr(card_dropout, "traces", lambda x: card_dropout.asked() and _torch.is_fake(x))
    monkeypatch.setattr(F, "scaled_dot_product_attention", chosen)
    monkeypatch.setattr(card_attention, "F", F)


class Attention(nn.Module):
    """Two layers of attention with dropout, with and without a mask."""

    def __init__(self, masked=False, p=0.3):
        super().__init__()
        self.inner, self.masked, self.p = nn.ModuleList(nn.Linear(10, 10) for _ in range(2)), masked, p

    def forward(self, x):
        for inner in self.inner:
            h = inner(x).unflatten(-1, (2, 5)).transpose(1, 2)
            mask = torch.ones(h.shape[2], h.shape[2], dtype=torch.bool) if self.masked else None
            h = SDPA(h, h, h, mask, self.p, is_causal=not self.masked)
            x = x + h.transpose(1, 2).flatten(2)
        return x


SDPA = F.scaled_dot_product_attention
tx = ps.optim.sgd(0.1)
POLICY = ps.precision.policy("32", dropout="device")


def loss_fn(net, x):
    return net(x).square().mean()


def made(masked=False, policy=POLICY, **options):
    state = policy.apply(ps.init(lambda: Attention(masked), tx, seed=5, device="cpu"))
    return ps.make_step(loss_fn, tx, policy=policy, **options), state, torch.randn(4, 37, 10)


def ran(step, state, x, count=3):
    for _ in range(count):
        state, metrics = step(state, x)
    return state, metrics["loss"].compute()


@pytest.mark.parametrize(("microbatches", "donate"), [(1, False), (2, True)])
def test_a_compiled_step_has_the_bits_of_the_step(cpu_as_card, microbatches, donate):
    step, state, x = made(microbatches=microbatches)
    expected, loss = ran(step, state, x)
    before = torch.get_rng_state()
    jitted = ps.jit(step, backend="eager", donate=donate)
    found, same = ran(jitted, state, x)
    assert ps.tree.equal(found, expected)
    assert torch.equal(loss, same)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_inductor_leaves_the_kernels_to_torch(cpu_as_card):
    step, state, x = made()
    expected, _ = ran(step, state, x)
    found, _ = ran(ps.jit(step, donate=True), state, x)
    torch.testing.assert_close(found.params, expected.params)


@pytest.mark.slow
def test_attention_that_torch_writes_out_has_the_portable_mask(cpu_as_card):
    step, state, x = made(masked=True)
    found, _ = ran(ps.jit(step, backend="eager"), state, x)
    step, state, _ = made(masked=True, policy=ps.precision.policy("32"))
    expected, _ = ran(ps.jit(step, backend="eager"), state, x)
    assert ps.tree.equal(found.params, expected.params)


def test_a_recomputation_in_a_graph_draws_the_same(cpu_as_card):
    class Checkpointed(Attention):
        def forward(self, x):
            return ps.checkpoint(super().forward, x)

    step, state, x = made()
    expected, _ = ran(step, state, x)
    state = POLICY.apply(ps.init(Checkpointed, tx, seed=5, device="cpu"))
    jitted = ps.jit(ps.make_step(loss_fn, tx, policy=POLICY), backend="eager")
    assert ps.tree.equal(ran(jitted, state, x)[0].params, expected.params)
    assert jitted.graph(state, x).count("purestep.fused_attention.default(") == 4


class Generator:
    """The generator of a card: its state can be another one's while a graph is recorded."""

    def __init__(self):
        self.state, self.seen = torch.Generator(), []
        self.get_state, self.set_state, self.manual_seed = lambda: self.state, self.graphsafe_set_state, self.reseed

    def reseed(self, seed):
        self.state = torch.Generator().manual_seed(seed)

    def graphsafe_get_state(self):
        return self.state

    def graphsafe_set_state(self, state):
        self.state = state

    def initial_seed(self):
        self.seen.append(self.state)
        return self.state.initial_seed()


def test_each_kernel_of_a_recording_has_a_generator_which_a_replay_seeds(kernels, monkeypatch):
    generator = Generator()
    monkeypatch.setattr(card_dropout, "_generator", lambda device: generator)
    monkeypatch.setattr(card_dropout, "_own_generator", lambda device: torch.Generator())
    queries, recorded = torch.randn(SIZES), []

    def run(tensors):
        given = queries, queries, queries, None, True, 0.3, False, None
        return [torch.ops.purestep.fused_attention(key, "flash", *given)[0] for key in tensors[1:]]

    def record(work, generators):
        generator.seen.clear()
        outputs = work()
        assert all(map(operator.is_, generator.seen, generators))
        recorded.append(list(generators))
        return (lambda: None), outputs

    replay, before = Replay(run, [0], record), generator.state
    state = torch.zeros(2)
    for first in range(3):
        keys = [ps.random.fold_in(ps.random.key(2**64 - 3), first + i) for i in range(2)]
        replay([state, *keys])
        assert [g.initial_seed() for g in recorded[0]] == [int(k[0]) | int(k[1]) << 32 for k in keys]
    assert len(recorded) == 1
    assert generator.state is before


class Named(_torch.DispatchMode):
    """Notes the operators of attention."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        self.names += [str(func)] if "dot_product" in str(func) or "softmax" in str(func) else []
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", [None, "bf16-mixed"])
def test_without_dropout_attention_stays_one_operator(policy):
    fused = "aten._scaled_dot_product_flash_attention_for_cpu"
    step = ps.make_step(lambda net, x: net(x.to(net.inner[0].weight.dtype)).square().mean(), tx, policy=policy)
    state, x = ps.init(lambda: Attention(p=0.0), tx, seed=5, device="cpu"), torch.randn(4, 37, 10)
    state = state if policy is None else ps.precision.policy(policy).apply(state)
    with Named() as eager:
        step(state, x)
    assert eager.names == [f"{fused}.default"] * 2 + [f"{fused}_backward.default"] * 2
    graph = ps.jit(step, backend="eager").graph(state, x)
    assert (graph.count(f"{fused}.default("), graph.count(f"{fused}_backward.default(")) == (2, 2)
    assert "softmax" not in graph
