"""Dropout by the kernels of a device, seeded from keys; and values of a card that the host remembers.

The CPU plays the card: torch's own CPU kernels draw from its default generator, as a card's do from theirs.
"""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import purestep as ps
from purestep.errors import PrecisionError
from purestep.random import card, card_dropout, keys, remembered


@pytest.fixture
def cpu_as_card(monkeypatch):
    """Let operations on the CPU be launches of a card, outside of traces and transforms."""
    monkeypatch.setattr(card, "launches", card.plain)
    monkeypatch.setattr(card_dropout, "_generator", lambda device: torch.default_generator)


class Attention(nn.Module):
    def __init__(self, p=0.3):
        super().__init__()
        self.inner, self.drop, self.p = nn.Linear(6, 6), nn.Dropout(p), p

    def forward(self, x):
        h = self.inner(x).unflatten(-1, (2, 3)).transpose(1, 2)
        return self.drop(F.scaled_dot_product_attention(h, h, h, dropout_p=self.p, is_causal=True)).flatten(1)


def by_hand(net, x, key):
    """The same by torch alone: each call that draws is seeded from the key of its number."""

    def seed(call):
        low, high = ps.random.fold_in(key, call).tolist()
        torch.manual_seed(low | high << 32)

    h = net.inner(x).unflatten(-1, (2, 3)).transpose(1, 2)
    seed(0)
    h = F.scaled_dot_product_attention(h, h, h, dropout_p=net.p, is_causal=True)
    seed(1)
    return F.dropout(h, net.p).flatten(1)


def applied(net, x, key):
    return ps.apply(net, dict(net.named_parameters()), {}, x, rng=key)[0]


def test_kernels_of_the_device_draw_by_the_key_and_leave_its_generator(cpu_as_card):
    net, x, key = Attention(), torch.randn(5, 7, 6), ps.random.key(2**63 + 5)
    before = torch.get_rng_state()
    with ps.random.device_dropout():
        out = applied(net, x, key)
    assert torch.equal(before, torch.get_rng_state())
    with torch.random.fork_rng():
        assert torch.equal(out, by_hand(net, x, key))
    assert not torch.equal(out, applied(net, x, key))


def test_a_policy_chooses_them_for_a_step(cpu_as_card):
    tx = ps.optim.sgd(0.1)
    loss_fn = lambda net, x: net(x).square().mean()  # noqa: E731
    policy = ps.precision.policy("32", dropout="device")
    assert policy != ps.precision.policy("32")
    assert str(policy).endswith("dropout=device")
    state, x = ps.init(Attention, tx, seed=3, device="cpu"), torch.randn(5, 7, 6)
    stated = policy.apply(state)
    new, metrics = ps.make_step(loss_fn, tx, policy=policy)(stated, x)
    net = Attention()
    net.load_state_dict(state.params)
    with torch.random.fork_rng():
        loss = loss_fn(lambda x: by_hand(net, x, ps.random.fold_in(state.rng, 0, 0)), x)
    loss.backward()
    torch.testing.assert_close(metrics["loss"].compute(), loss.detach(), check_dtype=False)
    for name, p in net.named_parameters():
        assert torch.equal(new.params[name], p - 0.1 * p.grad)


def test_a_recomputation_draws_the_same(cpu_as_card):
    class Checkpointed(Attention):
        def forward(self, x):
            return ps.checkpoint(super().forward, x)

    tx, x = ps.optim.sgd(0.1), torch.randn(5, 7, 6)
    policy = ps.precision.policy("32", dropout="device")
    step = ps.make_step(lambda net, x: net(x).square().mean(), tx, policy=policy)
    states = [policy.apply(ps.init(make, tx, seed=3, device="cpu")) for make in (Attention, Checkpointed)]
    plain, again = (step(state, x)[0] for state in states)
    assert ps.tree.equal(plain.params, again.params)


def test_transforms_and_traces_draw_as_ever(cpu_as_card):
    net, key = nn.Dropout(0.5), ps.random.key(1)
    expected = ps.random.dropout(ps.random.fold_in(key, 0), torch.ones(3, 4), 0.5)
    with ps.random.device_dropout():
        mapped = torch.vmap(lambda x: applied(net, x, key))(torch.ones(2, 3, 4))
        assert not torch.equal(applied(net, torch.ones(3, 4), key), expected)
    assert torch.equal(mapped, torch.stack([expected, expected]))


def test_another_word_is_refused():
    with pytest.raises(PrecisionError, match='dropout="portable" or dropout="device"'):
        ps.precision.policy("32", dropout="fused")


# --- what the host remembers of a card --------------------------------------------------------------------------------


def elsewhere(*shape):
    """A tensor that the host would have to read; on this machine one without memory."""
    return torch.empty(shape, dtype=torch.int64, device="meta")


def test_a_value_is_known_until_the_tensor_is_written_into():
    t = elsewhere(2)
    assert remembered.known(t) is None
    remembered.remember(t, [3, 4])
    assert remembered.known(t) == remembered.read(t) == [3, 4]
    t.add_(1)
    assert remembered.known(t) is None


def test_nothing_is_kept_of_a_tensor_that_is_gone():
    before = len(remembered._values)
    tensors = [elsewhere() for _ in range(5)]
    for i, t in enumerate(tensors):
        remembered.remember(t, i)
    remembered.remember(tensors[0], 7)
    assert len(remembered._values) == before + 5
    del tensors, t
    gc.collect()
    assert len(remembered._values) == before


def test_a_sum_is_known_where_its_parts_are():
    old, new, other = elsewhere(), elsewhere(), elsewhere()
    remembered.follow(old, new, 1)
    assert remembered.known(new) is None
    remembered.remember(old, 8)
    remembered.follow(old, new, 1)
    remembered.follow(new, other, 1)
    assert remembered.known(other) == 10


def test_the_key_of_a_step_is_folded_on_the_host_where_the_host_knows_both():
    rng, step = elsewhere(2), elsewhere()
    expected = ps.random.fold_in(ps.random.key(9), 41, 2)
    assert keys.step_key(rng, step, 2).is_meta
    remembered.remember(rng, ps.random.key(9).tolist())
    assert keys.step_key(rng, step, 2).is_meta
    remembered.remember(step, 41)
    assert torch.equal(keys.step_key(rng, step, 2), expected)
    assert torch.equal(keys.step_key(ps.random.key(9), torch.tensor(41), 2), expected)
