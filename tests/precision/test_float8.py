"""float8 through torchao: which layers, what is refused, and that the model it was given stays as it was."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import MissingExtra, PrecisionError
from purestep.precision import float8, policy
from purestep.precision.cast_params import casting
from purestep.precision.float8 import RECIPES

TX = ps.optim.sgd(0.05)


def loss_fn(net, batch):
    return nn.functional.cross_entropy(net(batch["x"]), batch["y"])


def make_batch(rows=32):
    return {"x": torch.randn(rows, 32), "y": torch.randint(0, 10, (rows,))}


def make_model():
    return nn.Sequential(
        nn.Linear(32, 48), nn.GELU(), nn.Sequential(nn.Linear(48, 16), nn.LayerNorm(16)), nn.Linear(16, 10)
    )


ROWS = pytest.mark.skipif(torch.__version__ < "2.12", reason="before 2.12 torch has no scales of rows on CPUs")


@pytest.mark.parametrize("recipe", [pytest.param(r, marks=() if r == "tensorwise" else ROWS) for r in RECIPES])
def test_it_trains_near_bfloat16_and_leaves_the_model_alone(recipe, seed):
    model = make_model()
    p = policy("float8", float8=recipe).where("3", float8=False)
    batch, losses = make_batch(), {}
    for chosen in (p, policy("bf16-mixed")):
        state, step = ps.init(model, TX), ps.make_step(loss_fn, TX, policy=chosen)
        for _ in range(20):
            state, metrics = step(state, batch)
        losses[chosen] = float(metrics["loss"].compute())
        for m in [*model.modules(), *state.model.module.modules()]:
            assert "Float8" not in type(m).__name__
    assert losses[p] == pytest.approx(losses[policy("bf16-mixed")], rel=0.05)
    assert losses[p] != losses[policy("bf16-mixed")]


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
@pytest.mark.parametrize("wrap", [lambda step: step, ps.jit], ids=["eager", "jit"])
def test_a_recipe_that_this_torch_has_not_on_cpus_is_refused(recipe, wrap, monkeypatch):
    if torch.__version__ >= "2.12":  # an older one has none of its own accord
        monkeypatch.setattr(float8, "_SCALES_ROWS_ON_CPU", False)
    step = wrap(ps.make_step(loss_fn, TX, policy=policy("float8", float8=recipe).where("3", float8=False)))
    with pytest.raises(PrecisionError, match=rf"cannot multiply by the recipe '{recipe}' on CPUs(.|\n)*tensorwise"):
        step(ps.init(make_model(), TX), make_batch())


def test_the_layers_that_rules_exclude_are_not_converted():
    model = make_model()
    kinds = {
        path: type(m).__name__
        for path, m in casting(policy("float8").where(["3", "2"], float8=False), model).module.named_modules()
        if isinstance(m, nn.Linear)
    }
    assert kinds == {"0": "Float8Linear", "2.0": "Linear", "3": "Linear"}


@pytest.mark.parametrize(
    ("layer", "where"),
    [
        (nn.Linear(32, 10), "1.0: Linear[10, 32], out_features=10"),
        (nn.Linear(20, 16), "1.0: Linear[16, 20], in_features=20"),
        (nn.Linear(7, 9), "1.0: Linear[9, 7], in_features=7, out_features=9"),
    ],
)
def test_sizes_that_are_no_multiples_of_16_are_refused(layer, where):
    model = nn.Sequential(nn.Linear(32, 32), nn.Sequential(layer))
    with pytest.raises(PrecisionError) as caught:
        ps.make_step(loss_fn, TX, policy="float8")(ps.init(model, TX), make_batch())
    assert where in str(caught.value)
    assert 'policy.where("1.0", float8=False)' in str(caught.value)
    ps.precision.cast_params.casting(policy("float8").where("1.0", float8=False), model)


@pytest.mark.parametrize("rows", [1, 17, 40])
def test_a_number_of_rows_that_is_no_multiple_of_16_trains_not_but_evaluates(rows):
    p = policy("float8").where("3", float8=False)
    state = ps.init(make_model(), TX)
    with pytest.raises(PrecisionError, match=rf"0: input \({rows}, 32\), {rows} rows"):
        ps.make_step(loss_fn, TX, policy=p)(state, make_batch(rows))
    assert ps.make_eval(loss_fn, policy=p)(state, make_batch(rows))["loss"].compute().isfinite()


def test_a_model_without_linear_layers_is_refused():
    state = ps.init(nn.Conv2d(1, 16, 3), TX)
    with pytest.raises(PrecisionError, match="float8 finds no linear layer"):
        ps.make_step(loss_fn, TX, policy="float8")(state, torch.ones(16, 1, 3, 3))


def test_a_state_goes_between_float8_and_other_mixed_policies_as_it_is():
    state = ps.init(make_model(), TX)
    assert not ps.diff(policy("float8").where("3", float8=False).apply(state), state)


def test_under_vmap_torch_says_why_not():
    p = policy("float8").where("3", float8=False)
    states = [ps.init(make_model(), TX, seed=i) for i in range(2)]
    stacked = ps.tree.map(lambda *xs: torch.stack(xs), *states)
    with pytest.raises(RuntimeError):
        torch.func.vmap(ps.make_step(loss_fn, TX, policy=p), in_dims=(0, None))(stacked, make_batch())


def test_without_torchao_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(MissingExtra, match=r'pip install "purestep\[float8\]"'):
        casting(policy("float8").where("3", float8=False), make_model())


def test_a_float8_policy_does_not_load_torchao(bare):
    code = "import sys, purestep as ps; ps.precision.policy('float8'); sys.exit('torchao' in sys.modules)"
    assert bare.run(code).returncode == 0


def test_a_step_may_be_compiled_before_it_ran():
    """The conversion of the model is no part of the graph."""
    model = nn.Linear(16, 16)
    p = policy("float8")
    state, batch = p.apply(ps.init(model, TX)), torch.randn(16, 16)
    step = ps.make_step(lambda net, x: net(x).square().mean(), TX, policy=p)
    assert not ps.diff(ps.jit(step, backend="eager")(state, batch), step(state, batch))
