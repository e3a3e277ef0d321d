"""What `jit` cannot take is refused in words that say what to write."""

from __future__ import annotations

import os
import re

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import CompileError, RandomnessError, TraceError
from purestep.jit import backends, errors, jit

TABLE = torch.arange(6.0).reshape(2, 3)


def refused(function, *args, error=TraceError, **options):
    with pytest.raises(error) as caught:
        jit(function, backend="eager", **options)(*args)
    return str(caught.value)


def test_the_line_of_a_library_whose_name_begins_with_torchs():
    file = f"{os.path.dirname(torch.__file__)}vision/boxes.py"
    library: dict[str, object] = {}
    exec(compile("def clipped(x):\n    return x if x.sum() > 0.5 else -x\n", file, "exec"), library)
    text = refused(library["clipped"], torch.ones(3))
    assert "boxes.py:2 in clipped" in text


# --- captured tensors -------------------------------------------------------------------------------------------------


def test_a_tensor_in_a_closure():
    mask = torch.ones(3)
    text = refused(lambda x: x * mask, torch.ones(3))
    assert "the function uses a tensor that is not among its arguments" in text
    assert "mask: float32[3]" in text
    assert "put it in the state or the batch" in text
    assert "test_refusals.py" in text


def test_a_global_tensor():
    def f(x):
        return x + TABLE

    text = refused(f, torch.ones(2, 3))
    assert "TABLE: float32[2, 3]" in text
    assert "return x + TABLE" in text


def test_the_module_itself_in_place_of_the_bound_one():
    model = nn.Linear(3, 2)
    tx = ps.optim.sgd(0.1)
    state = ps.init(model, tx)

    def loss_fn(net, batch):
        return model(batch).square().mean() + net(batch).mean()

    text = refused(ps.make_step(loss_fn, tx), state, torch.ones(4, 3))
    assert "model.weight: float32[2, 3]" in text
    assert "use the `net` that the loss function is given" in text


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.mask = torch.tensor([1.0, 0.0, 1.0])

    def forward(self, x):
        return self.layer(x) * self.mask


def test_a_plain_tensor_attribute_of_a_module():
    tx = ps.optim.sgd(0.1)
    step = ps.make_step(lambda net, batch: net(batch).mean(), tx)
    text = refused(step, ps.init(Masked, tx), torch.ones(4, 3))
    assert "the model.mask: float32[3]" in text
    assert "self.register_buffer('name', tensor)" in text


def test_constants_made_inside_are_fine():
    def f(x):
        return x * torch.tensor([1.0, 2.0, 3.0]) + torch.arange(3) + torch.full((3,), 0.5)

    x = torch.randn(3)
    assert torch.equal(jit(f, backend="eager")(x), f(x))


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2 if x.sum() > 3 else x,
        lambda x: x * x.sum().item(),
        lambda x: x * float(x.sum()),
        lambda x: x + x.tolist()[0],
        lambda x: x + torch.from_numpy(x.numpy()),
    ],
    ids=["if", "item", "float", "tolist", "numpy"],
)
def test_the_value_of_a_traced_tensor(function):
    text = refused(function, torch.ones(3))
    assert "the function asks for the value of a traced tensor" in text
    assert re.search(r"test_refusals.py:\d+ in <lambda>: lambda x:", text)
    assert "torch.where(loss > 3, a, b)" in text


def test_a_shape_that_depends_on_values():
    text = refused(lambda x: x[x > 0].mean(), torch.ones(3))
    assert "the shape of a result depends on the values of a tensor" in text
    assert "torch.where(mask, x, 0).sum() / mask.sum()" in text


def test_errors_of_the_function_stay_what_they_are():
    def f(x):
        raise KeyError("label")

    with pytest.raises(KeyError, match="label"):
        jit(f, backend="eager")(torch.ones(2))


# --- inputs and randomness --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda state, batch: ({"w": state["w"].add_(batch)}, {}), "add_"),
        (lambda state, batch: ({"w": state["w"].view(-1)[:2].mul_(2.0)}, {}), "mul_"),
        (lambda state, batch: ({"w": state["w"].detach().zero_()}, {}), "zero_"),
    ],
)
@pytest.mark.parametrize("donate", [False, True])
def test_an_argument_changed_in_place(function, operator, donate):
    state = {"w": torch.ones(2, 2)}
    text = refused(function, state, torch.ones(2, 2), donate=donate)
    assert "the function changes one of its arguments in place" in text
    assert f"state['w']: float32[2, 2], by {operator}" in text
    assert f"x = x.{operator[:-1]}(...)" in text
    assert torch.equal(state["w"], torch.ones(2, 2))


def test_in_place_operations_on_own_tensors_are_fine():
    def f(x):
        y = x.clone()
        y[1:].mul_(3)
        y.relu_()
        return y, x + 1

    x = torch.randn(4)
    ps.testing.assert_trees_equal(jit(f, backend="eager")(x), f(x))


@pytest.mark.parametrize("draw", [torch.rand_like, torch.bernoulli, lambda x: nn.functional.dropout(x, 0.5)])
def test_the_global_generator(draw):
    text = refused(lambda x: x + draw(x), torch.full((3,), 0.5), error=RandomnessError)
    assert "the function draws from the global generator of torch" in text
    assert "ps.random.fold_in(state.rng, state.step" in text


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "what", "instead"),
    [
        (torch.ones(3).numpy(), "a numpy array is no tensor", "torch.as_tensor(array)"),
        (torch.ones(3).to_sparse(), "jit takes dense tensors", "x.to_dense()"),
        (torch.ones(3, dtype=torch.complex64).conj(), "jit takes dense tensors", "x.resolve_conj()"),
        ({1, 2}, "this one has no hash", "@ps.pytree"),
    ],
)
def test_leaves_that_no_graph_can_take(leaf, what, instead):
    text = refused(lambda batch: batch["x"], {"x": leaf})
    assert what in text
    assert "batch['x']: " in text
    assert instead in text


# --- compilers --------------------------------------------------------------------------------------------------------


def test_no_compiler_falls_back_to_the_traced_graph_once(monkeypatch):
    from torch._inductor.exc import InvalidCxxCompiler

    calls = []

    def broken(traced, mode):
        calls.append(traced)
        raise RuntimeError("backend failed") from InvalidCxxCompiler()

    monkeypatch.setitem(backends._BACKENDS, "inductor", broken)
    step = jit(lambda x: x.softmax(-1) * 2, donate=False)
    x = torch.randn(3, 5)
    with pytest.warns(UserWarning, match="runs without being compiled") as caught:
        out = step(x)
    assert "apt install g++" in str(caught[0].message)
    assert torch.equal(out, x.softmax(-1) * 2)
    step(torch.randn(2, 5))  # a new signature warns no more (warnings are errors here)
    assert len(calls) == 1


def test_an_operator_that_the_backend_cannot_take(monkeypatch):
    def broken(traced, mode):
        raise RuntimeError(
            "MissingOperatorWithoutDecomp: missing lowering\n  target: aten.strange.default\n  args[0]: x"
        )

    monkeypatch.setitem(backends._BACKENDS, "inductor", broken)
    with pytest.raises(CompileError) as caught:
        jit(lambda x: x + 1)(torch.ones(2))
    text = str(caught.value)
    assert "inductor cannot compile <lambda>" in text
    assert "target: aten.strange.default" in text
    assert 'backend="eager"' in text


def test_a_missing_compiler_is_found_in_a_chain_of_errors():
    from torch._inductor.exc import InvalidCxxCompiler

    outer = ValueError("outer")
    outer.__cause__ = RuntimeError("in between")
    outer.__cause__.__cause__ = InvalidCxxCompiler()
    assert errors.no_compiler(outer)
    assert not errors.no_compiler(ValueError("outer"))
