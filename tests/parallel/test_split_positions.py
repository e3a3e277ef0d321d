"""Tensors cut into runs of positions, on one rank that has all parts: values, gradients, and what is refused.

The oracle is torch on the whole tensor.
"""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import purestep as ps
from purestep.errors import ConfigError
from purestep.parallel import split_tensor
from purestep.parallel.split_tensor import Split
from purestep.parallel.tensor_parallel import Team, split, whole
from purestep.sharding import context_parallel, ddp, tensor_parallel

TEAM = Team(None, 4, context=True)
B, H, T, D, V = 2, 4, 8, 6, 7
MASK = torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(1)) < 0.7
MASK[..., 0] = True
IDS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(2))


def attend(**settings):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **settings)


# By name: the function, the shapes of its arguments, and for each the dim that is cut (None: whole).
HEADS = [(B, H, T, D)] * 3
ROWS = {
    "causal": (attend(is_causal=True), HEADS, [2, 2, 2]),
    "of all": (attend(scale=0.3), HEADS, [2, 2, 2]),
    "masked": (attend(attn_mask=MASK), HEADS, [2, 2, 2]),
    "biased": (attend(attn_mask=torch.linspace(-2, 1, T * T).view(T, T)), HEADS, [2, 2, 2]),
    "grouped": (attend(is_causal=True, enable_gqa=True), [(B, H, T, D), *[(B, 2, T, D)] * 2], [2, 2, 2]),
    "to others": (attend(), [(B, H, T, D), *[(B, H, 5, D)] * 2], [2, None, None]),
    "formula": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, HEADS, [2, 2, 2]),
    "loss": (lambda x: F.cross_entropy(x.flatten(0, 1), IDS.flatten(), ignore_index=3), [(B, T, V)], [1]),
    "loss, summed": (
        lambda x: F.cross_entropy(x.mT, IDS, reduction="sum", label_smoothing=0.1),
        [(B, T, V)],
        [1],
    ),
    "losses": (lambda x: F.cross_entropy(x.mT, IDS, reduction="none") * torch.arange(T), [(B, T, V)], [1]),
    "linear": (lambda x, w, b: F.layer_norm(F.linear(x, w, b), (V,)), [(B, T, D), (V, D), (V,)], [1, None, None]),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_rule_has_the_values_and_gradients_of_the_whole(name, monkeypatch):
    function, shapes, dims = ROWS[name]
    refused = pytest.fail
    monkeypatch.setattr(split_tensor, "on_whole", lambda func, *a, **k: refused(f"{func} has no rule"))
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]

    def gradients(arguments):
        out = whole(function(*arguments))
        return out, torch.autograd.grad((out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum(), leaves)

    wanted, expected = gradients(leaves)
    cut = [
        x if at is None else split(TEAM.cut(x, at, (x.shape[at],)), at, (x.shape[at],), TEAM)
        for x, at in zip(leaves, dims, strict=True)
    ]
    found, grads = gradients(cut)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_embeddings_of_ids_that_are_cut():
    table = torch.randn(V, D, requires_grad=True)
    ids = split(TEAM.cut(IDS, 1, (T,)), 1, (T,), TEAM)
    out = F.embedding(ids, table, 2)
    assert isinstance(out, Split)
    (found,) = torch.autograd.grad(whole(out).square().sum(), table)
    (wanted,) = torch.autograd.grad(F.embedding(IDS, table, 2).square().sum(), table)
    torch.testing.assert_close(found, wanted)


def test_a_causal_part_sees_no_later_key():
    q, k, v = torch.randn(3, 1, 1, T, D)
    late = k.clone()
    late[..., 4:, :] = torch.nan
    cut = [split(TEAM.cut(x, 2, (T,)), 2, (T,), TEAM) for x in (q, late, v)]
    out = F.scaled_dot_product_attention(*cut, is_causal=True)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(whole(out)[..., :4, :], wanted[..., :4, :])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)

    def forward(self, mask, ids=None):
        return self.head(self.embed(ids) * mask)


def stepped(loss_fn, plan=None):
    plan = plan or context_parallel(1, parts=4)
    tx = ps.optim.sgd(0.1)
    return ps.make_step(loss_fn, tx, plan=plan)(ps.init(Net, tx, plan=plan), IDS)


def test_the_first_tensor_with_positions_is_cut():
    seen = []

    def loss_fn(net, ids):
        logits = net(torch.tensor(2.0), ids=ids)
        seen.append((isinstance(logits, Split), tuple(logits.shape)))
        return logits.square().mean()

    stepped(loss_fn)
    assert seen == [(True, (B, T, V))]


def test_a_model_is_let_go():
    models = []

    def loss_fn(net, ids):
        models.append(weakref.ref(net))
        return net(torch.tensor(2.0), ids=ids).square().mean()

    stepped(loss_fn)
    gc.collect()
    assert [model() for model in models] == [None] * len(models) != []


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ConfigError, match="7 positions cannot be cut into 4 equal parts"):
        stepped(lambda net, ids: net(torch.tensor(2.0), ids[:, :-1]).mean())
    with pytest.raises(ConfigError, match="did not call the model"):
        stepped(lambda net, ids: net.head(net.embed(ids)).mean())
    with pytest.raises(ConfigError, match="without a tensor of two dims"):
        stepped(lambda net, ids: net(torch.tensor(2.0), ids[0]).mean())


def test_products_that_split_matrices_too_are_refused():
    with pytest.raises(ConfigError, match="context parallelism and tensor parallelism do not go together"):
        ddp() * tensor_parallel("llama", 2) * context_parallel(2)
    with pytest.raises(ConfigError, match="3 parts cannot be shared by 2 ranks"):
        context_parallel(2, parts=3).tensor_axis  # noqa: B018


def test_a_dry_run_counts_the_sums_of_gradients_over_the_axis():
    run = (ddp(2) * context_parallel(4)).dry_run({"w": torch.zeros(8, 4)}, microbatches=4)
    # Two microbatches a rank, each an exchange of slices and one of sums, and an all-reduce over `data`.
    assert run.sent == {"gather": 0, "reduce": 128, "context": 2 * 2 * 128 * 3 // 4}
