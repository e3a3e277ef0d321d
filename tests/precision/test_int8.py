"""int8: its products against integer arithmetic written by hand, torchao's as a second oracle, layers, and refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import purestep as ps
from purestep import _torch
from purestep.errors import PrecisionError
from purestep.precision import int8, policy
from purestep.precision.cast_params import casting

TX = ps.optim.sgd(0.05)


# --- the oracle: integers of numpy ------------------------------------------------------------------------------------


def rounded(rows):
    """Each row as whole numbers of int64 up to 127, and what they are multiples of, float32."""
    rows = rows.astype(np.float32)
    scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = np.where(scale > 0, np.rint(rows / scale), 0)
    return whole.astype(np.int64), scale


def by_hand(a, b):
    """`a @ b.T` of the rounded rows: sums of whole numbers, then scales."""
    (x, s), (y, t) = rounded(a), rounded(b)
    return (x @ y.T).astype(np.float32) * s * t.T


SHAPES = [(32, 16, 24), (1, 1, 1), (5, 3, 7), (40, 129, 2), (1, 16, 8), (17, 1, 33)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("recipe", int8.RECIPES)
def test_a_layer_has_the_bits_of_integer_arithmetic_forward_and_backward(shape, recipe, seed):
    m, k, n = shape
    x, w, bias, g = torch.randn(m, k) * 3, torch.randn(n, k), torch.randn(n), torch.randn(m, n)
    x[0] = 0.0  # a row without a largest magnitude
    x.requires_grad_(), w.requires_grad_(), bias.requires_grad_()
    y = int8.linear(x, w, bias, recipe)
    of_x, of_w, of_bias = torch.autograd.grad(y, (x, w, bias), g)
    a, b, d = (t.detach().numpy() for t in (x, w, g))
    assert np.array_equal(y.detach().numpy(), by_hand(a, b) + bias.detach().numpy())
    if recipe == "full":
        assert np.array_equal(of_x.numpy(), by_hand(d, b.T))
        assert np.array_equal(of_w.numpy(), by_hand(d.T, a.T))
    else:
        assert torch.equal(of_x, g @ w)
        assert torch.equal(of_w, g.t() @ x)
    assert torch.equal(of_bias, g.sum(0))
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    assert (
        np.abs(by_hand(a, b) - exact).max() <= 0.02 * np.linalg.norm(a, axis=1).max() * np.linalg.norm(b, axis=1).max()
    )


@pytest.mark.slow
def test_torchao_computes_the_same(seed):
    """To the rounding of its scales: it keeps them in the dtype of the input."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
        from torchao.prototype.quantized_training.int8_mixed_precision import _Int8MixedPrecisionTrainingLinearFunction

    x, w, g = torch.randn(64, 32), torch.randn(48, 32), torch.randn(64, 48)
    x.requires_grad_(), w.requires_grad_()
    theirs = _Int8MixedPrecisionTrainingLinearFunction.apply(x, w, None, Int8MixedPrecisionTrainingConfig())
    mine = int8.linear(x, w, None, "full")
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    pairs = zip(torch.autograd.grad(mine, (x, w), g), torch.autograd.grad(theirs, (x, w), g), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_products_of_every_layout_are_exact_at_small_sizes(seed):
    """torch's own are silently wrong on CPUs where a size is 1."""
    for m, k, n in itertools.product([1, 2, 3, 17], [1, 2, 5, 32], [1, 2, 7, 16]):
        for left, right in itertools.product([False, True], repeat=2):
            a = torch.randint(-127, 128, (k, m) if left else (m, k), dtype=torch.int8)
            b = torch.randint(-127, 128, (k, n) if right else (n, k), dtype=torch.int8)
            a, b = a.t() if left else a, b.t() if right else b
            exact = (a.long() @ b.long().t()).int()
            assert torch.equal(_torch.int8_product(a, b), exact), (m, k, n, left, right)
            # The sizes that a GPU needs.
            rows, columns = _torch._padded(a, 24, 8), _torch._padded(b, 8, 8)
            assert rows.shape[0] > 16
            assert not any(size % 8 for size in (*rows.shape, *columns.shape))
            assert torch.equal(torch._int_mm(rows, columns.t())[:m, :n], exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_in_its_row_only(value, seed):
    x, w = torch.randn(4, 8), torch.randn(3, 8)
    x[1, 2] = value
    y = int8.product(x, w)
    assert not y[1].isfinite().any()
    assert y[[0, 2, 3]].isfinite().all()


# --- the policy -------------------------------------------------------------------------------------------------------


def loss_fn(net, batch):
    return nn.functional.cross_entropy(net(batch["x"]), batch["y"])


def make_model():
    inner = nn.Sequential(nn.Linear(48, 16), nn.LayerNorm(16))
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), inner, nn.Linear(16, 10))


def make_batch(rows=30):
    return {"x": torch.randn(rows, 32), "y": torch.randint(0, 10, (rows,))}


@pytest.mark.parametrize("recipe", int8.RECIPES)
def test_it_trains_near_bfloat16_and_leaves_the_model_alone(recipe, seed):
    model, batch, losses = make_model(), make_batch(), {}
    for chosen in (policy("int8", int8=recipe), policy("bf16-mixed")):
        state, step = ps.init(model, TX), ps.make_step(loss_fn, TX, policy=chosen)
        for _ in range(20):
            state, metrics = step(state, batch)
        losses[chosen.int8] = float(metrics["loss"].compute())
        for m in [*model.modules(), *state.model.module.modules()]:
            assert "Int8" not in type(m).__name__
    assert losses[recipe] == pytest.approx(losses[None], rel=0.05)
    assert losses[recipe] != losses[None]


def test_the_layers_that_rules_exclude_are_not_converted():
    chosen = policy("int8").where(["3", "2"], int8=False)
    kinds = {
        path: type(m).__name__
        for path, m in casting(chosen, make_model()).module.named_modules()
        if "Lin" in str(m)[:9]
    }
    assert kinds == {"0": "Int8Linear", "2.0": "Linear", "3": "Linear"}
    rows = {row.path: row.int8 for row in chosen.describe(make_model()).rows if row.kind == "Linear"}
    assert rows == {"0": "full", "2.0": None, "3": None}
    assert "int8" in str(chosen.describe(make_model()))
    assert "float8" not in str(chosen.describe(make_model()))


def test_sums_that_int32_cannot_hold_are_refused(monkeypatch):
    assert int8.MOST_TERMS * 127**2 < 2**31 <= (int8.MOST_TERMS + 1) * 127**2
    monkeypatch.setattr(int8, "MOST_TERMS", 47)
    with pytest.raises(PrecisionError, match=r'0: 48 out_features(.|\n)*policy.where\("0", int8=False\)'):
        casting(policy("int8"), make_model())
    chosen = policy("int8").where(["0", "2"], int8=False)
    step = ps.make_step(loss_fn, TX, policy=chosen)
    with pytest.raises(PrecisionError, match=r"3: 48 rows of the input(.|\n)*more microbatches"):
        step(ps.init(make_model(), TX), make_batch(48))
    step(ps.init(make_model(), TX), make_batch(47))
    assert ps.make_eval(loss_fn, policy=chosen)(ps.init(make_model(), TX), make_batch(48))["loss"].compute().isfinite()


def test_what_does_not_fit_is_refused():
    with pytest.raises(PrecisionError, match="int8 finds no linear layer"):
        casting(policy("int8"), nn.Conv2d(1, 16, 3))
    with pytest.raises(PrecisionError, match="no such int8 recipe"):
        policy("int8", int8="half")
    with pytest.raises(PrecisionError, match="in float8 or in int8"):
        policy("int8", float8="tensorwise")
    with pytest.raises(PrecisionError, match="int8"):
        policy("int8", autocast=True)


def test_a_layer_that_tensor_parallelism_splits_is_refused():
    plan = ps.sharding.tensor_parallel({"0.weight": ps.sharding.Spec("tensor")}, 1, tensor_parts=2)
    step = ps.make_step(loss_fn, TX, policy=policy("int8"), plan=plan)
    with pytest.raises(PrecisionError, match=r'does not multiply in a layer(.|\n)*policy.where\("0", int8=False\)'):
        step(ps.init(make_model(), TX), make_batch(3))


@pytest.mark.slow
def test_per_sample_gradients_have_the_bits_of_each_sample(seed):
    chosen = policy("int8")
    state, batch = ps.init(make_model(), TX), make_batch(3)
    step = ps.make_step(loss_fn, TX, policy=chosen)
    one = [step(state, {name: column[i : i + 1] for name, column in batch.items()})[0].params for i in range(3)]
    each = torch.func.vmap(step, in_dims=(None, 0))(state, {name: column[:, None] for name, column in batch.items()})[0]
    for name, stacked in each.params.items():
        for i in range(3):
            torch.testing.assert_close(stacked[i], one[i][name])
