"""Tensors of which ranks have parts, on one rank that has all of them: values, gradients, and what is refused.

The oracle is torch on the whole tensor.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import purestep as ps
from purestep.errors import ConfigError
from purestep.parallel import split_tensor
from purestep.parallel.split_tensor import Split
from purestep.parallel.tensor_parallel import Team, split, whole
from purestep.random.torch_random import KeyedRandom

TEAM = Team(None, 2)
B, T, H, D = 3, 5, 4, 6  # batch, positions, heads, width of a head


def cut(tensor, at, blocks=None):
    at %= tensor.ndim
    blocks = blocks or (tensor.shape[at],)
    return split(TEAM.cut(tensor, at, blocks), at, blocks, TEAM)


def qkv(x):
    q, k, v = x.unflatten(-1, (3, H, D)).unbind(-3)
    return torch.cat([f.transpose(1, 2).flatten(0, 1) for f in (q, k, v)], 1)


def rotated(x):
    first, second = x[..., : D // 2], x[..., D // 2 :]
    return x * 0.5 + torch.cat((-second, first), -1) * torch.linspace(0, 1, D)


def in_place(x):
    x = x * 2
    x += torch.arange(24.0)
    return x.mul_(0.5).masked_fill_(x > 3, 0.0)


# By name: the function, the shapes of its arguments, and for each the dim that is cut (None: whole), with its blocks.
# All of these have rules: no whole tensor is made.
RULES = {
    "pointwise": (lambda x, y: F.gelu(x + y) * 2.0 - torch.sigmoid(y), [(B, T, 24), (24,)], [2, None]),
    "pointwise, both": (lambda x, y: torch.where(x > 0, x / (1 + y.abs()), -1.0), [(B, T, 24)] * 2, [2, 2]),
    "broadcast": (lambda x, y: x * y + 1.0, [(B, T, 24), (B, T, 1)], [2, None]),
    "other operand is larger": (lambda x, y: (x + y).tanh(), [(24,), (B, T, 24)], [0, None]),
    "in place": (in_place, [(B, T, 24)], [2]),
    "casts": (lambda x: x.double().to(torch.float32).type_as(x).contiguous() + x.detach(), [(B, 24)], [1]),
    "heads": (lambda x: x.view(B, T, H, D).transpose(1, 2).reshape(B * H, T, D), [(B, T, 24)], [2]),
    "heads and back": (
        lambda x: x.view(T, B * H, D).transpose(0, 1).view(B, H, T, D).permute(2, 0, 1, 3).reshape(T * B, 24),
        [(T, B, 24)],
        [2],
    ),
    "fused": (qkv, [(B, T, 72)], [(2, (24, 24, 24))]),
    "fused, sections": (
        lambda x: torch.cat([*[2 * a for a in x.split([16, 4, 4], -1)][1:], x[..., 16:20]], -2),
        [(B, T, 24)],
        [(2, (16, 4, 4))],
    ),
    "chunks": (lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], [(B, T, 24)], [(2, (12, 12))]),
    "views": (
        lambda x: x[:, 1:4:2].unsqueeze(1).expand(-1, 2, -1, -1).squeeze().movedim(2, 0).mT,
        [(B, T, 24)],
        [2],
    ),
    "items": (lambda x: x[0, ..., None, :] + x[-1][:, None], [(B, T, 24)], [2]),
    "repeated": (lambda x: x[:, :, None].expand(B, H, 2, T, D).reshape(B, 2 * H, T, D), [(B, H, T, D)], [1]),
    "repeated heads": (lambda x: x.repeat_interleave(2, 1), [(B, H, T, D)], [1]),
    "rotary": (rotated, [(B, H, T, D)], [1]),
    "stacked": (lambda x, y: torch.stack([x, y]).unbind()[1], [(B, 24)] * 2, [1, None]),
    "mean of squares": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), [(B, 6, 24)], [1]),
    "sums": (lambda x: x.sum(0) + x.amax(0) + x.max(0).values + x.var(0, unbiased=False), [(B, 24)], [1]),
    "sums over parts": (lambda x: x.sum(-1) + x.mean((1, 2)).unsqueeze(1) + x.mean(), [(B, T, 24)], [2]),
    "softmax": (lambda x: torch.softmax(x, -1) + x.log_softmax(0) + x.cumsum(2), [(B, H, T, D)], [1]),
    "columns": (lambda x, w, b: F.linear(x, w, b), [(B, T, 8), (24, 8), (24,)], [None, 0, 0]),
    "columns, bias whole": (lambda x, w, b: F.linear(x, w, b), [(B, T, 8), (24, 8), (24,)], [None, 0, None]),
    "rows": (lambda x, w, b: F.linear(x, w, b), [(B, T, 24), (8, 24), (8,)], [2, 1, None]),
    "rows of a whole": (lambda x, w: F.linear(x, w), [(B, T, 24), (8, 24)], [None, 1]),
    "positions": (lambda x, w: F.linear(x, w), [(B, 6, 24), (8, 24)], [1, None]),
    "addmm": (lambda b, x, w: torch.addmm(b, x, w), [(24,), (T, 8), (8, 24)], [0, None, 1]),
    "addmm, rows": (lambda b, x, w: torch.addmm(b, x, w), [(8,), (T, 24), (24, 8)], [None, 1, 0]),
    "products of heads": (lambda x, y: (x @ y.mT).matmul(y), [(B, H, T, D)] * 2, [1, 1]),
    "products of heads, one whole": (lambda x, y: torch.matmul(x, y), [(B, H, T, D), (D, T)], [1, None]),
    "rows of products": (lambda x, y: x @ y, [(B, 6, D), (D, T)], [1, None]),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (24,), w, b), [(B, 6, 24), (24,), (24,)], [1, None, None]),
    "rms norm": (lambda x, w: F.rms_norm(x, (D,), w, 1e-6), [(B, H, T, D), (D,)], [1, None]),
    "glu": (lambda x: F.glu(x, 1), [(B, 8, 24)], [2]),
    "attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        [(B, H, T, D)] * 3,
        [1, 1, 1],
    ),
    "attention, fewer keys": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        [(B, 8, T, D), (B, H, T, D), (B, H, T, D)],
        [1, 1, 1],
    ),
    "attention, keys whole": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        [(B, 8, T, D), (B, 1, T, D), (B, 1, T, D)],
        [1, None, None],
    ),
    "embedding, columns": (lambda w: F.embedding(torch.tensor([[1, 7], [7, 3]]), w), [(8, 24)], [1]),
    "vocabulary": (lambda w: F.embedding(torch.tensor([[1, 7], [7, 3]]), w, padding_idx=7), [(8, 24)], [0]),
    "vocabulary and loss": (
        lambda x: F.cross_entropy(x, torch.tensor([1, -100, 9, 4]), label_smoothing=0.1),
        [(4, 10)],
        [1],
    ),
    "loss of each": (lambda x: F.cross_entropy(x.mT, torch.ones(B, T).long(), reduction="none"), [(B, T, 8)], [2]),
    "caches": (lambda x: torch.cat([torch.tensor([]), x], -2), [(B, H, T, D)], [1]),
}
# These have no rule for what is cut: they get the whole.
WHOLE = {
    "norm over parts": (lambda x: F.layer_norm(x, (24,)), [(B, T, 24)], [2]),
    "softmax over parts": (lambda x: x.softmax(-1), [(B, T, 24)], [2]),
    "plain weight": (lambda x, w: F.linear(x, w), [(B, T, 24), (8, 24)], [2, None]),
    "cut across heads": (lambda x: x.view(B, T, 3, 8).transpose(1, 2), [(B, T, 24)], [2]),
    "slice across parts": (lambda x: x[..., 3:7] + x.flip(-1)[..., :4], [(B, T, 24)], [2]),
    "convolution": (lambda x, w: F.conv1d(x, w), [(B, 8, T), (4, 8, 3)], [1, 0]),
    "two cuts": (lambda x, y: x + y, [(B, 6, 24)] * 2, [1, 2]),
    "einsum": (lambda x, y: torch.einsum("bhtd,bhsd->bhts", x, y), [(B, H, T, D)] * 2, [1, 1]),
}


def both_ways(row, seed):
    """Return what a function gives whole tensors and split ones, each with the gradients of its arguments."""
    function, shapes, cuts = row
    g = torch.Generator().manual_seed(seed)
    found = []
    values = [torch.randn(shape, generator=g) for shape in shapes]
    for parted in (False, True):
        given = [x.clone().requires_grad_() for x in values]
        args = [
            x if at is None or not parted else cut(x, *(at if isinstance(at, tuple) else (at,)))
            for x, at in zip(given, cuts, strict=True)
        ]
        out = whole(function(*args))
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 1))
        grads = torch.autograd.grad((out * weights).sum(), given, allow_unused=True)
        found.append([out, *grads])
    return found


@pytest.mark.parametrize("name", RULES)
def test_a_rule_gives_what_torch_gives(name, seed, monkeypatch):
    def no_whole(func, *args, **kwargs):
        raise AssertionError(f"{func} got the whole of a split tensor")

    monkeypatch.setattr(split_tensor, "on_whole", no_whole)
    expected, found = both_ways(RULES[name], seed)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WHOLE)
def test_a_function_without_a_rule_gets_the_whole(name, seed, monkeypatch):
    taken, on_whole = [], split_tensor.on_whole
    monkeypatch.setattr(split_tensor, "on_whole", lambda f, *a, **k: (taken.append(f), on_whole(f, *a, **k))[1])
    expected, found = both_ways(WHOLE[name], seed)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    if name != "two cuts":  # that one is gathered and cut anew
        assert taken


def test_a_split_tensor_has_the_shape_of_the_whole():
    x = cut(torch.arange(24.0).view(2, 12), 1)
    assert isinstance(x, Split)
    assert (x.shape, x.ndim, x.size(1), len(x), x.dtype) == ((2, 12), 2, 12, 2, torch.float32)
    assert [tuple(part.shape) for part in x.parts] == [(2, 6)] * 2
    assert float(x.sum()) == 276.0
    assert x[1, 3].item() == 15.0
    assert x.tolist() == torch.arange(24.0).view(2, 12).tolist()
    assert not x.requires_grad
    assert (x * torch.ones(12, requires_grad=True)).requires_grad


def test_a_write_into_a_view_is_seen_in_the_whole():
    x = cut(torch.zeros(4, 6), 1)
    assert float(x.flip(0).sum()) == 0.0  # the whole was made
    x.view(2, 2, 6).add_(1.0)
    assert float(x.flip(0).sum()) == 24.0


def test_the_mask_of_dropout_is_that_of_the_whole():
    x = torch.ones(4, 24)
    for drop in (F.dropout, lambda x, p: F.dropout(x * 1, p, inplace=True), F.feature_alpha_dropout):
        found = []
        for value in (x, cut(x, 1)):
            with KeyedRandom(ps.random.key(3)):
                found.append(whole(drop(value, 0.5)))
        assert torch.equal(*found)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_what_would_lose_gradients_is_refused():
    x, plain = cut(torch.ones(4, 6, requires_grad=True), 1), torch.ones(4, 6, requires_grad=True)
    with pytest.raises(ConfigError, match=r"autograd.Function of the model was given a tensor that is split"):
        Doubled.apply(x)
    with torch.no_grad():
        assert float((x * 2).sum()) == 48.0  # no gradient is lost here

    class Added(Doubled):
        @staticmethod
        def forward(ctx, x, y):
            return x + y

    with pytest.raises(ConfigError, match="leave the layer out of the rules"):
        Added.apply(plain, cut(torch.ones(4, 6), 1)).sum()
    with pytest.raises(ConfigError, match=r"__setitem__ writes into a tensor that is split over ranks"):
        x[0] = 1.0
    plain = torch.zeros(4, 6)
    plain[1:] = x[1:]
    assert float(plain.detach().sum()) == 18.0


class Encoder(nn.Module):
    def __init__(self, norm_first=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.1, batch_first=norm_first, norm_first=norm_first)
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.encoder(self.embed(ids), mask=mask, is_causal=True))


def loss_fn(net, batch):
    logits = net(batch)
    return F.cross_entropy(logits.flatten(0, 1), batch.flatten()), {
        "right": (logits.argmax(-1) == batch).float().mean()
    }


@pytest.mark.parametrize("sequence", [False, True])
def test_an_encoder_trains_in_parts_as_it_does_whole(sequence, seed):
    rules = {**ps.sharding.tensor_rules("transformer"), ("embed.*", "head.*"): ps.sharding.Spec("tensor")}
    tx, found = ps.optim.sgd(0.5), []
    ids = torch.randint(0, 20, (4, 8), generator=torch.Generator().manual_seed(seed))
    for plan in (None, ps.sharding.tensor_parallel(rules, 1, tensor_parts=4, sequence_parallel=sequence)):
        state = ps.init(Encoder, tx, seed=seed, plan=plan)
        step = ps.make_step(loss_fn, tx, plan=plan)
        state, _ = step(state, ids)
        state, metrics = step(state, ids)
        ends = ps.make_eval(loss_fn, plan=plan)(state, ids)
        found.append([state.params, float(metrics["loss"]), float(ends["loss"]), float(ends["right"])])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_compiled_step_has_the_same_bits(seed):
    def model():
        return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 10))

    rules = {("0.*",): ps.sharding.Spec("tensor"), "3.weight": ps.sharding.Spec(None, "tensor")}
    plan, tx = ps.sharding.tensor_parallel(rules, 1, tensor_parts=2), ps.optim.sgd(0.5)
    step = ps.make_step(lambda net, x: net(x).square().mean(), tx, plan=plan)
    found = []
    for each in (step, ps.jit(step, backend="eager")):
        state = ps.init(model, tx, seed=seed, plan=plan)
        for x in torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(seed)):
            state, metrics = each(state, x)
        found.append(ps.digest([state, metrics]))
    assert found[0] == found[1]
