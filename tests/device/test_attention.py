"""Attention with dropout in a compiled step for a card: torch's fused kernels, memory of a row of the scores, and keys
that the host computes.

Without a card torch chooses no fused kernel, so the choice is made here. Autograd's engine wants a card; gradients are
nothing of the right shape.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from shared_fake_cuda import needs_cuda_build
from torch import nn

import purestep as ps
from purestep import grad
from purestep.jit import donation_graph, host_side
from purestep.jit._torch import fake_tensor_mode
from purestep.jit.trace import trace
from purestep.random import card_attention, remembered

pytestmark = needs_cuda_build
HEADS, POSITIONS, FEATURES = 2, 37, 8
SDPA = F.scaled_dot_product_attention
tx = ps.optim.sgd(0.1)


class Attention(nn.Module):
    """Two layers of attention with dropout."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x):
        for inner in self.inner:
            h = inner(x).unflatten(-1, (HEADS, FEATURES)).transpose(1, 2)
            x = x + SDPA(h, h, h, dropout_p=0.3, is_causal=True).transpose(1, 2).flatten(2)
        return x


def kernel_of(kind):
    """What torch chooses on a card."""

    def chosen(query, key, value, mask, p, causal, *, scale=None, enable_gqa=False):
        name = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention")
        rest = (p, causal) if kind == "flash" else (mask, True, p, causal)
        out = name(query, key, value, *rest, scale=scale)
        # What the kernel returned is what the backward pass is given.
        assert kind in type(out[0].grad_fn).__name__.lower()
        return out[0]

    return chosen


def traced_of(policy, monkeypatch, kind):
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel_of(kind))
    monkeypatch.setattr(grad, "_gradient", lambda value, one, inputs: [torch.empty_like(x) for x in inputs])
    state, x = policy.apply(ps.init(Attention, tx, seed=3, device="cpu")), torch.zeros(4, POSITIONS, 16)
    with fake_tensor_mode(allow_non_fake_inputs=True):
        given = ps.tree.map(lambda t: torch.empty_like(t, device="cuda"), (state, x))
    leaves, structure = ps.tree.flatten((given, {}))
    step = ps.make_step(lambda net, x: net(x).square().mean(), tx, policy=policy)
    names = [str(i) for i in range(len(leaves))]
    found = trace(step, leaves, structure, paths=lambda: names, state_leaves=len(ps.tree.leaves(state)))
    donation_graph.epilogue(found, given[0], len(leaves), donate=True, name="step")
    return found, state


def squares(graph):
    """Nodes with an element for each pair of positions."""
    shapes = {n.name: x.shape for n in graph.graph.nodes if isinstance(x := n.meta.get("val"), torch.Tensor)}
    return [name for name, shape in shapes.items() if shape.count(POSITIONS) > 1]


@pytest.mark.parametrize("kind", ["flash", "efficient", "cudnn"])
def test_a_compiled_step_calls_the_fused_kernel_and_keeps_no_square(monkeypatch, kind):
    found, _ = traced_of(ps.precision.policy("bf16-mixed", dropout="device"), monkeypatch, kind)
    nodes = [n for n in found.graph.graph.nodes if card_attention.is_operator(n.target)]
    assert [n.args[1] for n in nodes] == [kind] * 2
    assert squares(found.graph) == []
    portable, _ = traced_of(ps.precision.policy("bf16-mixed"), monkeypatch, kind)
    assert squares(portable.graph) != []


def test_the_host_computes_the_keys_and_knows_the_next_step(monkeypatch):
    found, state = traced_of(ps.precision.policy("32", dropout="device"), monkeypatch, "flash")
    host = host_side.of(found)
    left = list(host.traced.graph.graph.nodes)
    keys = [n.args[0] for n in left if card_attention.is_operator(n.target)]
    assert [(key.op, str(key.meta["val"].device)) for key in keys] == [("placeholder", "cpu")] * 2
    assert not any("philox" in str(n.target) for n in left)

    # Tensors without memory, of which the host remembers two.
    given = [torch.empty_like(x, device="meta") for x in found.fakes]
    by_path = dict(zip(ps.tree.paths(state), given, strict=False))
    step, rng = by_path[".step"], by_path[".rng"]
    remembered.remember(step, 41)
    remembered.remember(rng, ps.random.key(2**63 + 9).tolist())
    seen = []
    host.run(lambda tensors: seen.extend(tensors[len(given) :]) or [torch.empty(())] * 9)(list(given))
    base = ps.random.fold_in(ps.random.key(2**63 + 9), 41, 0)
    assert [key.tolist() for key in seen] == [ps.random.fold_in(base, call).tolist() for call in range(2)]
    assert remembered.known(step) == 42
    assert remembered.known(rng) == ps.random.key(2**63 + 9).tolist()
