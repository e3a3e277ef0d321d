"""Gradients against torch's own engines."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import purestep as ps
from purestep import tree
from purestep.errors import StepError
from purestep.grad import grad_and_value

ENGINES = ["auto", "autograd", "func"]


def make(seed, sizes=(3, 5, 2)):
    g = torch.Generator().manual_seed(seed)
    params = {"w": torch.randn(*sizes[:2], generator=g), "b": [torch.randn(sizes[1], generator=g)]}
    return params, torch.randn(sizes[2], sizes[0], generator=g)


def loss(params, x):
    return (torch.tanh(x @ params["w"]) + params["b"][0]).pow(2).mean()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [(3, 5, 2), (1, 1, 1), (7, 4, 13)])
def test_gradients_are_those_of_torch(engine, seed, sizes):
    params, x = make(seed, sizes)
    before = tree.digest(params)
    grads, value = grad_and_value(loss, engine=engine)(params, x)
    leaves = [t.clone().requires_grad_() for t in tree.leaves(params)]
    expected = loss(tree.unflatten(tree.structure(params), leaves), x)
    wanted = torch.autograd.grad(expected, leaves)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(grads), wanted, strict=True))
    assert torch.equal(value, expected.detach())
    assert not value.requires_grad
    assert tree.structure(grads) == tree.structure(params)
    assert tree.digest(params) == before
    assert not any(t.requires_grad for t in tree.leaves(params))
    theirs, their_value = torch.func.grad_and_value(loss)(params, x)
    assert tree.equal(theirs, grads)
    assert torch.equal(their_value, value)


@pytest.mark.parametrize("engine", ENGINES)
def test_argnums_aux_and_keyword_arguments(engine):
    params, x = make(0)

    def with_aux(x, params, *, scale):
        value = scale * loss(params, x)
        return value, {"value": value, "n": 3, "none": None, "text": "t", "many": (value * x,)}

    transform = grad_and_value(with_aux, argnums=(1, 0), has_aux=True, engine=engine)
    (dp, dx), (value, aux) = transform(x, params, scale=2.0)
    assert torch.equal(dp["w"], grad_and_value(lambda p: 2.0 * loss(p, x))(params)[0]["w"])
    assert torch.equal(dx, grad_and_value(lambda v: 2.0 * loss(params, v))(x)[0])
    assert torch.equal(aux["value"], value)
    assert (aux["n"], aux["none"], aux["text"]) == (3, None, "t")
    assert not any(t.requires_grad for t in tree.leaves(aux) if isinstance(t, torch.Tensor))
    single, _ = grad_and_value(with_aux, argnums=(0,), has_aux=True, engine=engine)(x, params, scale=2.0)
    assert torch.equal(single[0], dx)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_value_does_not_depend_on_has_gradient_zero(engine):
    grads, _ = grad_and_value(lambda p: (p["a"] ** 2).sum(), engine=engine)({"a": torch.ones(2), "b": torch.ones(3)})
    assert torch.equal(grads["b"], torch.zeros(3))


def test_without_the_shortcut_gradients_are_the_same(monkeypatch, seed):
    """Where torch has no such function, its public one runs, under the modes of the backward pass too."""
    from purestep import grad

    block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            return ps.checkpoint(self.block, x).square().mean()

    model, x = Net(), torch.randn(3, 4)

    def loss_of(params):
        return ps.apply(model, params, {}, x, rng=ps.random.key(1))[0]

    assert grad._engine is not None
    expected = grad_and_value(loss_of)(dict(model.named_parameters()))
    monkeypatch.setattr(grad, "_engine", None)
    assert tree.equal(grad_and_value(loss_of)(dict(model.named_parameters())), expected)


def test_gradients_are_wanted_also_under_no_grad():
    params, x = make(0)
    with torch.no_grad():
        grads, _ = grad_and_value(loss)(params, x)
    assert tree.equal(grads, grad_and_value(loss)(params, x)[0])


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda p: p * 2, r"a loss is one floating-point number(.|\n)*returned float32\[3\](.|\n)*loss\.mean\(\)"),
        (lambda p: 3.0, r"returned float 3\.0"),
        (lambda p: p.sum().to(torch.int64), r"returned int64\[\]"),
        (lambda p: (p.sum(), {}), r"returned tuple"),
        (lambda p: None, r"returned NoneType None"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_value_that_is_no_loss_is_refused(function, text, engine):
    with pytest.raises(StepError, match=text):
        grad_and_value(function, engine=engine)(torch.ones(3))


OTHER = torch.ones(3, requires_grad=True)


@pytest.mark.parametrize(
    "function", [lambda p: p.detach().sum(), lambda p: torch.tensor(1.0), lambda p: (p.detach() * OTHER).sum()]
)
def test_a_value_without_parameters_is_refused(function):
    with pytest.raises(
        StepError, match=r"does not depend on the parameters(.|\n)*float32\[\](.|\n)*net\(batch\[\.\.\.\]\)"
    ):
        grad_and_value(function)(torch.ones(3))


def test_hooks_may_take_the_gradients_and_some_parameters_may_be_unused():
    grads, _ = grad_and_value(lambda p: (p.detach() * OTHER).sum(), collected=True)(torch.ones(3))
    assert grads.tolist() == [0, 0, 0]
    grads, _ = grad_and_value(lambda p: p["a"].sum())({"a": torch.ones(2), "b": torch.ones(1)})
    assert (grads["a"].tolist(), grads["b"].tolist()) == ([1, 1], [0])


@pytest.mark.parametrize("leaf", [torch.ones(2, dtype=torch.int64), 1.0, "x"])
def test_only_floating_tensors_are_differentiated(leaf):
    with pytest.raises(StepError, match=r"only floating tensors can be differentiated(.|\n)*argument\[0\]\['b'\]"):
        grad_and_value(lambda p: p["a"].sum())({"a": torch.ones(2), "b": leaf})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transforms_of_torch_func_go_through():
    params, _ = make(1)
    xs = torch.randn(4, 6, 3)
    grads, values = torch.func.vmap(grad_and_value(loss), in_dims=(None, 0))(params, xs)
    for i, x in enumerate(xs):
        one, value = grad_and_value(loss)(params, x)
        torch.testing.assert_close(grads["w"][i], one["w"])
        torch.testing.assert_close(values[i], value)

    def dw(p, x):
        return grad_and_value(loss)(p, x)[0]["w"]

    tangent = tree.map(torch.ones_like, params)
    _, out = torch.func.jvp(lambda p: dw(p, xs[0]), (params,), (tangent,))
    eps = 1e-3
    shifted = [tree.map(lambda a, s=s: a + s * eps, params) for s in (1, -1)]
    torch.testing.assert_close(out, (dw(shifted[0], xs[0]) - dw(shifted[1], xs[0])) / (2 * eps), atol=1e-3, rtol=1e-2)
    second, _ = grad_and_value(
        lambda x: grad_and_value(lambda y: (y**3).sum(), engine="func")(x)[0].sum(), engine="func"
    )(torch.tensor([2.0, 5.0]))
    assert second.tolist() == [12.0, 30.0]
    assert torch.func.grad(lambda x: grad_and_value(lambda y: (y**3).sum())(x)[0].sum())(torch.tensor(2.0)) == 12.0
