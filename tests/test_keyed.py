"""Random operations of torch under a key: deterministic, with the numbers of torch, never the global generators."""

from __future__ import annotations

import math
import types

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import get_overridable_functions

from purestep import random
from purestep.errors import RandomnessError
from purestep.random.torch_mode import _handlers, refused
from purestep.random.torch_random import KeyedRandom

X = torch.linspace(-2, 3, 4 * 6 * 5 * 5).reshape(4, 6, 5, 5)
P = torch.softmax(torch.linspace(-1, 1, 12).reshape(3, 4), -1)


def fresh(shape=(500,), dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


Q, K, V = torch.randn(3, 2, 4, 7, 8, generator=torch.Generator().manual_seed(0))


def sdpa(p, **options):
    return F.scaled_dot_product_attention(Q, K, V, dropout_p=p, **options)


CALLS = {
    "F.dropout": lambda: F.dropout(X, 0.5),
    "F.dropout inplace": lambda: F.dropout(X.clone(), 0.5, inplace=True),
    "nn.Dropout": lambda: nn.Dropout(0.3)(X),
    "torch.dropout": lambda: torch.dropout(X, 0.5, True),
    "torch.dropout_": lambda: torch.dropout_(X.clone(), 0.5, True),
    "torch.native_dropout": lambda: torch.native_dropout(X, 0.5, True),
    "nn.Dropout1d": lambda: nn.Dropout1d(0.5)(X[0]),
    "nn.Dropout2d": lambda: nn.Dropout2d(0.5)(X),
    "nn.Dropout3d": lambda: nn.Dropout3d(0.5)(X),
    "torch.feature_dropout": lambda: torch.feature_dropout(X, 0.5, True),
    "nn.AlphaDropout": lambda: nn.AlphaDropout(0.5)(X),
    "torch.alpha_dropout": lambda: torch.alpha_dropout(X, 0.5, True),
    "nn.FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(0.5)(X),
    "torch.feature_alpha_dropout": lambda: torch.feature_alpha_dropout(X, 0.5, True),
    "attention": lambda: sdpa(0.4),
    "F.rrelu": lambda: F.rrelu(X, training=True),
    "nn.RReLU inplace": lambda: nn.RReLU(inplace=True)(X.clone()),
    "torch.rrelu": lambda: torch.rrelu(X, training=True),
    "F.gumbel_softmax": lambda: F.gumbel_softmax(X),
    "F.gumbel_softmax hard": lambda: F.gumbel_softmax(X, hard=True),
    "nn.FractionalMaxPool2d": lambda: nn.FractionalMaxPool2d(2, output_ratio=0.6)(X),
    "nn.FractionalMaxPool3d": lambda: nn.FractionalMaxPool3d(2, output_size=3)(X),
    "torch.rand": lambda: torch.rand(2, 3),
    "torch.rand tuple": lambda: torch.rand((2, 3), dtype=torch.float64),
    "torch.rand size": lambda: torch.rand(size=(2, 3)),
    "torch.rand out": lambda: torch.rand(2, 3, out=torch.empty(0)),
    "torch.randn": lambda: torch.randn(torch.Size([2, 3])),
    "torch.randn complex": lambda: torch.randn(2, 3, dtype=torch.complex64),
    "torch.rand_like": lambda: torch.rand_like(X),
    "torch.randn_like": lambda: torch.randn_like(X, dtype=torch.float64),
    "torch.randint": lambda: torch.randint(1000, (20,)),
    "torch.randint low": lambda: torch.randint(5, 1000, (20,)),
    "torch.randint names": lambda: torch.randint(low=5, high=1000, size=(20,)),
    "torch.randint high": lambda: torch.randint(high=1000, size=(20,), dtype=torch.int32),
    "torch.randint_like": lambda: torch.randint_like(X, 1000),
    "torch.randint_like low": lambda: torch.randint_like(X, 5, 1000),
    "torch.randint_like names": lambda: torch.randint_like(X, low=5, high=1000),
    "torch.randperm": lambda: torch.randperm(40),
    "torch.bernoulli": lambda: torch.bernoulli(P.repeat(20, 1)),
    "torch.bernoulli p": lambda: torch.bernoulli(X, 0.3),
    "Tensor.bernoulli_": lambda: fresh().bernoulli_(0.3),
    "torch.normal": lambda: torch.normal(X, 2.0),
    "torch.normal std": lambda: torch.normal(1.0, X.abs()),
    "torch.normal both": lambda: torch.normal(X, X.abs()),
    "torch.normal size": lambda: torch.normal(1.0, 2.0, (3, 4)),
    "torch.normal size=": lambda: torch.normal(mean=1.0, std=2.0, size=(3, 4)),
    "Tensor.normal_": lambda: fresh().normal_(1.0, 2.0),
    "Tensor.normal_ names": lambda: fresh().normal_(mean=1.0, std=2.0),
    "Tensor.uniform_": lambda: fresh().uniform_(-1, 2),
    "Tensor.uniform_ names": lambda: fresh().uniform_(**{"from": -1, "to": 2}),
    "Tensor.random_": lambda: fresh(dtype=torch.int64).random_(),
    "Tensor.random_ to": lambda: fresh().random_(1000),
    "Tensor.random_ range": lambda: fresh().random_(5, 1000),
    "Tensor.exponential_": lambda: fresh().exponential_(2.0),
    "Tensor.cauchy_": lambda: fresh().cauchy_(1.0, 2.0),
    "Tensor.geometric_": lambda: fresh().geometric_(0.3),
    "Tensor.log_normal_": lambda: fresh().log_normal_(0.5, 0.3),
    "torch.multinomial": lambda: torch.multinomial(P.repeat(9, 1), 2),
    "torch.multinomial replacement": lambda: torch.multinomial(P, 30, replacement=True),
    "Tensor.multinomial": lambda: P.repeat(9, 1).multinomial(2),
    "Normal.sample": lambda: torch.distributions.Normal(X, 1.0).sample(),
    "Normal.rsample": lambda: torch.distributions.Normal(X, 1.0).rsample(),
    "Categorical.sample": lambda: torch.distributions.Categorical(P).sample((9,)),
    "Bernoulli.sample": lambda: torch.distributions.Bernoulli(P).sample((9,)),
    "Uniform.sample": lambda: torch.distributions.Uniform(-1.0, 2.0).sample((9,)),
    "Exponential.sample": lambda: torch.distributions.Exponential(torch.ones(9)).sample(),
    "MultivariateNormal.sample": lambda: torch.distributions.MultivariateNormal(torch.zeros(5), torch.eye(5)).sample(),
    "xavier_uniform_": lambda: nn.init.xavier_uniform_(fresh((5, 5))),
    "trunc_normal_": lambda: nn.init.trunc_normal_(fresh((5, 5))),
}
REFUSED = {
    "poisson": lambda: torch.poisson(P),
    "binomial": lambda: torch.binomial(P, P),
    "standard_gamma": lambda: torch.distributions.Gamma(P, P).sample(),
    "dirichlet": lambda: torch.distributions.Dirichlet(P).sample(),
    "svd_lowrank": lambda: torch.svd_lowrank(nn.Parameter(P)),
    "pca_lowrank": lambda: torch.pca_lowrank(nn.Parameter(P)),
    "lobpcg": lambda: torch.lobpcg(nn.Parameter(torch.eye(9)), k=1),
    "rrelu_": lambda: torch.rrelu_(X.clone(), training=True),
    "kaiming_uniform_": lambda: nn.init.kaiming_uniform_(fresh((5, 5))),
    "rand": lambda: torch.ops.aten.rand([3]),
    "bernoulli_": lambda: torch.ops.aten.bernoulli_(fresh(), 0.5),
}


def under(seed, call):
    torch.manual_seed(99)
    np.random.seed(99)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    with KeyedRandom(None if seed is None else random.key(seed)) as mode:
        out = call()
    assert torch.equal(torch.get_rng_state(), state), "the global generator moved"
    assert (np.random.get_state()[1] == numpy_state).all()
    assert mode.calls > 0
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize("name", CALLS)
def test_each_operation_is_a_function_of_the_key(name):
    call = CALLS[name]
    a, b, c = under(1, call), under(1, call), under(2, call)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    torch.manual_seed(0)
    plain = call()
    plain = plain if isinstance(plain, torch.Tensor) else plain[0]
    assert (a.shape, a.dtype, a.device) == (plain.shape, plain.dtype, plain.device)


@pytest.mark.parametrize("name", CALLS)
def test_without_a_key_the_operation_is_refused(name):
    with pytest.raises(RandomnessError, match=r"but was given no key(.|\n)*rng=ps\.random\.fold_in"):
        under(None, CALLS[name])


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_keyed_form_is_refused_by_name(name):
    with pytest.raises(RandomnessError, match=rf"{name}\w*(\.\w+)? draws from the global generator(.|\n)*ps\.random"):
        under(0, REFUSED[name])


def seeded_names():
    """Names of the aten operations that torch marks as drawing from a generator."""
    found = set()
    for full in torch._C._dispatch_get_all_op_names():
        if full.startswith("aten::"):
            name, _, overload = full.removeprefix("aten::").partition(".")
            op = getattr(getattr(torch.ops.aten, name, None), overload or "default", None)
            if op is not None and torch.Tag.nondeterministic_seeded in op.tags:
                found.add(name)
    return found


def test_no_random_function_of_torch_is_forgotten():
    seeded = seeded_names()
    assert {"rand", "bernoulli_", "dropout", "lstm", "multinomial"} <= seeded
    forgotten = []
    for functions in get_overridable_functions().values():
        for f in functions:
            hides = isinstance(f, types.FunctionType) and set(f.__code__.co_names) & seeded
            if (getattr(f, "__name__", "") in seeded or hides) and f not in _handlers:
                forgotten.append(f)
    assert not forgotten


def test_a_generator_is_refused_as_hidden_state():
    with (
        pytest.raises(RandomnessError, match=r"was given a torch\.Generator(.|\n)*leave generator= out"),
        KeyedRandom(random.key(0)),
    ):
        torch.rand(3, generator=torch.Generator())
    with KeyedRandom(random.key(0)):
        assert torch.rand(3, generator=None).shape == (3,)


def test_calls_are_numbered_and_a_number_can_be_started_from():
    with KeyedRandom(random.key(3)) as mode:
        a, b, c = torch.rand(4), torch.rand(4), torch.rand(4)
    assert mode.calls == 3
    assert len({tuple(t.tolist()) for t in (a, b, c)}) == 3
    with KeyedRandom(random.key(3), calls=1):
        assert torch.equal(torch.rand(4), b)
    with pytest.raises(RandomnessError, match=r"^mine$"), KeyedRandom(random.key(3), refusal="mine"):
        torch.rand(4)


def test_a_key_may_be_made_when_it_is_needed():
    made = []

    def make():
        made.append(random.fold_in(random.key(3), 7))
        return made[-1]

    with KeyedRandom(make):
        torch.add(X, 1)
        assert not made
        a = torch.rand(4)
        torch.rand(4)
    assert len(made) == 1
    with KeyedRandom(random.fold_in(random.key(3), 7)):
        assert torch.equal(torch.rand(4), a)


def test_ordinary_functions_pass_and_out_and_requires_grad_are_honoured():
    out = torch.empty(0)
    with KeyedRandom(random.key(3)) as mode:
        assert torch.equal(torch.add(X, 1, alpha=2), X + 2)
        assert nn.Dropout(0.5).eval()(X) is X
        assert F.dropout(X, 0.0) is X
        assert mode.calls == 0
        assert torch.rand(2, 3, out=out) is out
        assert torch.rand(2, requires_grad=True).requires_grad
        assert torch.rand_like(X, requires_grad=True).requires_grad
        with torch.device("meta"):
            assert torch.rand(2).is_meta
    assert out.shape == (2, 3)
    assert out.unique().numel() == 6


# --- the numbers are those of torch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_dropout_has_its_rate_and_scale(p):
    x = torch.ones(20_000)
    with KeyedRandom(random.key(0)):
        for y in (F.dropout(x, p), F.dropout(x.clone(), p, inplace=True), torch.native_dropout(x, p, True)[0]):
            assert abs((y == 0).float().mean() - p) < 5 * math.sqrt(p * (1 - p) / 20_000)
            torch.testing.assert_close(y[y != 0].unique(), torch.tensor([1 / (1 - p)]))


@pytest.mark.parametrize(
    ("drop", "shape"), [(F.dropout1d, (40, 50, 3)), (F.dropout2d, (40, 50, 3, 2)), (F.dropout3d, (40, 50, 2, 2, 2))]
)
def test_dropout_of_channels_drops_whole_ones(drop, shape):
    with KeyedRandom(random.key(0)):
        y = drop(torch.ones(shape), 0.3).flatten(2)
        single = drop(torch.ones(shape[1:]), 0.3).flatten(1)
    assert (y == y[..., :1]).all()
    assert abs((y[..., 0] == 0).float().mean() - 0.3) < 0.06
    torch.testing.assert_close(y.max(), torch.tensor(1 / 0.7))
    assert (single == single[..., :1]).all()
    assert single.unique().numel() == 2


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_alpha_dropout_keeps_mean_and_variance(p):
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    with KeyedRandom(random.key(0)):
        y = F.alpha_dropout(x, p, training=True)
        z = F.feature_alpha_dropout(x.reshape(1000, 100, 1), p, training=True)
        assert (F.alpha_dropout(x, 1.0, training=True) == 0).all()
    for t in (y, z):
        assert abs(t.mean()) < 0.03
        assert abs(t.var() - 1) < 0.05


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("drop", [F.dropout, F.dropout2d, F.alpha_dropout])
def test_a_bad_probability_is_refused(p, drop):
    with pytest.raises(RandomnessError, match=r"a dropout probability lies in \[0, 1\]"), KeyedRandom(random.key(0)):
        drop(X, p, training=True)


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": torch.rand(7, 7, generator=torch.Generator().manual_seed(1)) > 0.3},
    "float": {"attn_mask": torch.linspace(-2, 2, 49).reshape(7, 7)},
    "scale": {"scale": 0.37},
}


@pytest.mark.parametrize("mask", MASKS)
def test_attention_without_dropout_is_torchs_and_with_it_right_in_the_mean(mask):
    options = MASKS[mask]
    plain = sdpa(0.0, **options)
    with KeyedRandom(random.key(0)):
        assert torch.equal(sdpa(0.0, **options), plain)
    total = torch.zeros_like(plain)
    for i in range(400):
        with KeyedRandom(random.key(i)):
            total += sdpa(0.1, **options)
    assert (total / 400 - plain).abs().max() < 0.25
    with KeyedRandom(random.key(0)):
        torch.testing.assert_close(sdpa(1e-12, **options), plain)


def test_grouped_queries_attend_as_in_torch():
    q, k, v = torch.randn(2, 6, 5, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    plain = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with KeyedRandom(random.key(0)):
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, dropout_p=1e-12, enable_gqa=True), plain)
        with_dropout = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, enable_gqa=True)
    assert not torch.allclose(with_dropout, plain)


@pytest.mark.parametrize("weights", [True, False])
def test_multihead_attention_and_transformer_layers(weights):
    attention, x = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True), torch.randn(3, 5, 8)

    def call():
        return attention(x, x, x, need_weights=weights)[0]

    assert torch.equal(under(1, call), under(1, call))
    assert not torch.equal(under(1, call), under(2, call))
    attention.dropout = 0.0
    with KeyedRandom(random.key(0)):
        no_dropout = call()
    assert torch.equal(no_dropout, call())
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    assert torch.equal(under(1, lambda: layer(x)), under(1, lambda: layer(x)))
    assert not torch.equal(under(1, lambda: layer(x)), under(2, lambda: layer(x)))
    layer.eval()
    with KeyedRandom(None):
        torch.testing.assert_close(layer(x), layer(x))


RNNS = [(nn.LSTM, {}), (nn.GRU, {}), (nn.RNN, {}), (nn.RNN, {"nonlinearity": "relu"}), (nn.LSTM, {"proj_size": 2})]


@pytest.mark.parametrize(("kind", "extra"), RNNS, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("form", ["batch_first", "time_first", "packed", "single"])
def test_rnns_draw_between_their_layers_only(kind, extra, bidirectional, form):
    torch.manual_seed(0)
    net = kind(4, 8, num_layers=3, dropout=0.5, bidirectional=bidirectional, batch_first=form == "batch_first", **extra)
    x = torch.randn(5, 6, 4) if form != "single" else torch.randn(5, 4)
    given = nn.utils.rnn.pack_padded_sequence(x, [5, 5, 4, 2, 1, 1]) if form == "packed" else x

    def call():
        out, hidden = net(given)
        hidden = hidden if isinstance(hidden, tuple) else (hidden,)
        return [out.data if form == "packed" else out, *hidden]

    def keyed(seed):
        with KeyedRandom(random.key(seed)) as mode:
            return call(), mode.calls

    (a, calls), (b, _), (c, _) = keyed(1), keyed(1), keyed(2)
    assert calls == 2
    assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))
    assert not torch.equal(a[0], c[0])
    # The first layer sees no dropout, so its final state is that of torch.
    plain = call()
    directions = 2 if bidirectional else 1
    torch.testing.assert_close(a[1][:directions], plain[1][:directions])
    net.dropout = 0.0
    without = call()
    assert [t.shape for t in a] == [t.shape for t in without]
    net.dropout = 1e-12
    for u, v in zip(keyed(1)[0], without, strict=True):
        torch.testing.assert_close(u, v)
    net.dropout = 0.0
    assert all(torch.equal(u, v) for u, v in zip(keyed(1)[0], without, strict=True))


def test_fractional_pooling_and_gumbel_softmax_are_well_formed():
    with KeyedRandom(random.key(1)):
        pooled, where = nn.FractionalMaxPool2d(2, output_size=3, return_indices=True)(X)
        hard = F.gumbel_softmax(X, hard=True)
        counts = torch.stack([F.gumbel_softmax(P.log(), hard=True) for _ in range(600)]).mean(0)
    assert torch.equal(X.flatten(2).gather(2, where.flatten(2)).reshape(pooled.shape), pooled)
    assert torch.equal(hard.sum(-1), torch.ones(hard.shape[:-1]))
    assert (counts - P).abs().max() < 0.1


DISTRIBUTIONS = {
    "uniform": (lambda t: t.uniform_(-1, 2), scipy.stats.uniform(-1, 3)),
    "normal": (lambda t: t.normal_(1, 2), scipy.stats.norm(1, 2)),
    "exponential": (lambda t: t.exponential_(2.5), scipy.stats.expon(scale=1 / 2.5)),
    "cauchy": (lambda t: t.cauchy_(1, 2), scipy.stats.cauchy(1, 2)),
    "log_normal": (lambda t: t.log_normal_(0.5, 0.3), scipy.stats.lognorm(0.3, scale=math.exp(0.5))),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_filled_tensors_have_the_distribution(name):
    fill, distribution = DISTRIBUTIONS[name]
    with KeyedRandom(random.key(7)):
        x = fill(torch.zeros(20_000, dtype=torch.float64))
    assert scipy.stats.kstest(x.numpy(), distribution.cdf).pvalue > 1e-4


def test_discrete_draws_have_the_distribution():
    n = 20_000
    with KeyedRandom(random.key(7)):
        geometric = torch.zeros(n).geometric_(0.3)
        replaced = torch.multinomial(P[0], n, replacement=True)
        first = torch.multinomial(P[0].expand(n, 4), 2)
        every = torch.multinomial(P, 4)
        small = torch.zeros(n, dtype=torch.uint8).random_()
    assert abs(geometric.mean() - 1 / 0.3) < 0.1
    assert geometric.min() == 1
    expected = (P[0].double() / P[0].double().sum() * n).numpy()
    assert scipy.stats.chisquare(torch.bincount(replaced).numpy(), expected).pvalue > 1e-4
    assert scipy.stats.chisquare(torch.bincount(first[:, 0]).numpy(), expected).pvalue > 1e-4
    assert (first[:, 0] != first[:, 1]).all()
    assert every.sort(-1).values.tolist() == [[0, 1, 2, 3]] * 3
    assert small.unique().numel() == 256
    with pytest.raises(RandomnessError, match="more than there is without replacement"), KeyedRandom(random.key(7)):
        torch.multinomial(P, 5)
    assert refused in _handlers.values()
