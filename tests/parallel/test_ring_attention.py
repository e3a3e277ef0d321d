"""Ring attention on one rank that has all parts: values, gradients, dropout, and what is refused.

The oracle is torch on the whole tensor. On several ranks see test_context_parallel.py.
"""

import pytest
import torch
from torch.nn import functional as F

import purestep as ps
from purestep import random
from purestep.errors import ConfigError
from purestep.loop.identity import conditions
from purestep.parallel import split_positions
from purestep.parallel.split_tensor import Split
from purestep.parallel.tensor_parallel import Team, split, whole
from purestep.sharding import Plan, context_parallel, ddp, mesh

CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
# [..., heads, positions, width]: neither a width nor a number of heads is a multiple of anything, and none has heads.
SHAPES = [(2, 4, 8, 6), (1, 2, 24, 5), (3, 2, 16, 64), (2, 12, 3), (2, 1, 4, 8, 5)]


def masks(kind, length, g):
    seen = torch.rand(length, length, generator=g) < 0.4
    seen[1] = False  # a query that sees nothing
    padding = torch.arange(length) < length // 2 + 1  # whole parts of the keys are seen by nobody
    bias = torch.randn(length, length, generator=g)
    return {"bool": seen, "bias": bias, "padding": padding[None], "other": None}[kind]


def cut(x, team):
    return split(team.cut(x, x.ndim - 2, (x.shape[-2],)), x.ndim - 2, (x.shape[-2],), team)


def ring(parts):
    return Team(None, parts, context=True, ring=True)


@pytest.fixture
def blocks(monkeypatch):
    """The keys that each block had: how many at a time."""
    seen, attend = [], split_positions.ring_attention._Block.attend

    def watched(block, q, k, v):
        seen.append(k.shape[-2])
        return attend(block, q, k, v)

    monkeypatch.setattr(split_positions.ring_attention._Block, "attend", watched)
    return seen


def compared(shapes, function, parts, dtype, seed, key=None):
    g = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    grad = torch.randn(shapes[0], generator=g, dtype=torch.float64).to(dtype)
    for made, given in (("wanted", leaves), ("found", [cut(x, ring(parts)) for x in leaves])):
        out = function(*given)
        assert isinstance(out, Split) == (made == "found")
        yield [whole(out), *torch.autograd.grad(whole(out), leaves, grad)]


def check(shapes, function, parts, dtype, seed=0):
    wanted, found = compared(shapes, function, parts, dtype, seed)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        # Gradients of half a hundred keys add up, so their error is measured by the largest.
        torch.testing.assert_close(one, other, rtol=0, atol=CLOSE[dtype] * max(1.0, float(other.detach().abs().max())))


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("kind", ["whole", "causal", "bool", "bias", "padding"])
def test_values_and_gradients_are_those_of_the_whole(kind, dtype, blocks):
    for seed, shape in enumerate(SHAPES):
        mask = masks(kind if kind in ("bool", "bias", "padding") else "other", shape[-2], torch.Generator())
        mask = mask.to(dtype) if kind == "bias" else mask
        scale = None if seed % 2 else 0.3

        def attend(q, k, v, mask=mask, scale=scale):
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=kind == "causal", scale=scale)

        for parts in (1, 2, 4):
            blocks.clear()
            check([shape] * 3, attend, parts, dtype, seed)
            met = parts * (parts + 1) // 2 if kind == "causal" else parts**2
            assert blocks == [shape[-2] // parts] * met


@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (3, 3)])
def test_heads_of_queries_share_one_of_keys(heads, blocks):
    shapes = [(2, heads[0], 8, 5), *[(2, heads[1], 8, 5)] * 2]
    check(shapes, lambda *x: F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True), 4, torch.float64)
    assert len(blocks) == 10


def test_keys_of_another_length_and_values_of_another_width():
    shapes = [(2, 3, 8, 5), (2, 3, 12, 5), (2, 3, 12, 5)]
    check(shapes, lambda q, k, v: F.scaled_dot_product_attention(q, k, v), 4, torch.float64)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 8, n, generator=g, dtype=torch.float64) for n in (5, 5, 7))
    found = whole(F.scaled_dot_product_attention(*(cut(x, ring(4)) for x in (q, k, v))))
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rate", [0.3, 1.0])
@pytest.mark.parametrize("causal", [False, True])
def test_dropout_draws_the_mask_of_one_process(rate, causal):
    key, length = random.key(5), 8
    seen = torch.ones(length, length, dtype=torch.bool).tril() if causal else torch.ones(length, length) > 0

    def attend(q, k, v):
        if isinstance(q, Split):
            return q.keyed_attention(k, v, None, rate, key, causal, 0.4, True)
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        weight = (q @ k.mT * 0.4).masked_fill(~seen, -torch.inf).softmax(-1)
        return random.dropout(key, weight, rate) @ v

    for parts in (1, 2, 4):
        check([(3, 4, length, 5), *[(3, 2, length, 5)] * 2], attend, parts, torch.float64)


def test_a_model_that_drops_attention_weights_has_the_loss_of_one_process(blocks):
    batch = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(1))
    losses = []
    for plan in (None, context_parallel(1, parts=4, attention="ring")):
        tx = ps.optim.sgd(0.1)
        layer = lambda: torch.nn.TransformerEncoderLayer(12, 3, 16, 0.4, batch_first=True)  # noqa: E731
        state = ps.init(layer, tx, seed=3, plan=plan)
        step = ps.make_step(lambda net, x: net(x).square().mean(), tx, plan=plan)
        for _ in range(2):
            state, metrics = step(state, batch)
        losses.append([float(metrics["loss"].compute()), *state.params["linear1.weight"].flatten()[:9].tolist()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-7)
    assert blocks == [2] * 16 * 2


def test_a_trained_mask_is_refused():
    q = torch.randn(1, 1, 8, 4)
    bias = torch.zeros(8, 8, requires_grad=True)
    with pytest.raises(ConfigError, match=r"no gradient of an attention mask") as refused:
        F.scaled_dot_product_attention(*[cut(q, ring(4))] * 3, attn_mask=bias)
    assert 'attention="gather"' in str(refused.value)
    with torch.no_grad():
        F.scaled_dot_product_attention(*[cut(q, ring(4))] * 3, attn_mask=bias)


def test_only_runs_of_positions_go_round():
    with pytest.raises(ConfigError, match="which context parallelism cuts"):
        Plan(mesh({"tensor": 2}), fallback="replicate", attention="ring")
    with pytest.raises(ConfigError, match="attention"):
        context_parallel(2, attention="zigzag")
    plan = ddp(2) * context_parallel(2, attention="ring")
    assert (plan.attention, (ddp(2) * context_parallel(2)).attention) == ("ring", "gather")
    step = ps.make_step(lambda net, x: net(x).mean(), ps.optim.sgd(0.1), plan=plan)
    assert conditions(step)["attention"] == "ring"
    assert "attention=ring" in repr(plan.view())
