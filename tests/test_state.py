"""The train state: made from a module or a factory, advanced by gradients, and turned back into a module."""

from __future__ import annotations

import copy
import random as python_random
from typing import Any

import numpy as np
import pytest
import torch
from shared_models import Tied
from torch import nn
from torch.nn.utils import parametrizations

import purestep as ps
from purestep import optim, tree
from purestep.errors import ConfigError, OptimError, StepError
from purestep.functional import apply
from purestep.state import TrainState, init, to_module


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 3, num_layers=2)

    def forward(self, x):
        return self.rnn(x)[0]


def generators():
    return python_random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


# --- init -------------------------------------------------------------------------------------------------------------


def noisy():
    model = net()
    model.numpy = nn.Parameter(torch.from_numpy(np.random.rand(3)))
    model.python = nn.Parameter(torch.tensor(python_random.random()))
    return model


def test_a_factory_is_called_under_the_seed_and_moves_no_generator(seed):
    states = []
    for i in range(2):
        torch.manual_seed(i)
        np.random.seed(i)
        python_random.seed(i)
        before = generators()
        states.append(init(noisy, optim.adam(0.1), seed=5))
        assert generators() == before
    assert not tree.diff(*states)
    assert tree.digest(init(noisy, optim.adam(0.1), seed=6).params) != tree.digest(states[0].params)
    assert tree.structure(states[0]) == tree.structure(states[1])


def test_a_factory_that_fails_moves_no_generator_either():
    before = generators()

    def fails():
        noisy()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        init(fails, optim.sgd(0.1))
    assert generators() == before


def test_a_module_is_copied_and_left_alone():
    model = net().eval()
    digest = tree.digest(model.state_dict())
    state = init(model, optim.sgd(0.1))
    assert state.step == 0
    assert state.params.keys() == dict(model.named_parameters()).keys()
    assert state.buffers.keys() == dict(model.named_buffers()).keys()
    assert not any(t.requires_grad for t in tree.leaves(state))
    with torch.no_grad():
        model[0].weight.zero_()
    assert state.params["0.weight"].any()
    assert tree.digest(init(net, optim.sgd(0.1)).params) == tree.digest(init(net, optim.sgd(0.1)).params)
    state.params["0.bias"].zero_()
    assert tree.digest(model.state_dict()) != digest  # by our own zero_ above
    assert model[0].bias.any()
    assert not model.training


@pytest.mark.parametrize("frozen", ["0.*", ["0.*", "nothing"], lambda name: name.startswith("0.")])
def test_frozen_parameters_are_buffers_without_optimizer_state(frozen):
    state = init(net, optim.adam(0.1), frozen=frozen)
    assert set(state.params) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert {"0.weight", "0.bias", "1.running_mean"} <= set(state.buffers)
    assert not any("'0." in p for p in tree.paths(state.opt_state))
    step = ps.make_step(lambda net, batch: net(batch).square().mean(), optim.adam(0.1))
    new, _ = step(state, torch.randn(6, 4))
    assert torch.equal(new.buffers["0.weight"], state.buffers["0.weight"])
    assert not torch.equal(new.params["2.weight"], state.params["2.weight"])


def test_requires_grad_false_is_frozen_too():
    model = net()
    model[0].requires_grad_(False)
    state = init(model, optim.sgd(0.1), frozen="2.bias")
    assert set(state.params) == {"1.weight", "1.bias", "2.weight"}


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (lambda: nn.LazyLinear(3), {}, r"a lazy module has no shapes yet(.|\n)*'weight'(.|\n)*model\(example_input\)"),
        (net, {"frozen": "*"}, r"no parameter to train(.|\n)*Sequential with 6 parameters"),
        (nn.ReLU, {}, r"no parameter to train"),
        (net, {"frozen": "body.*"}, r"frozen= matches no parameter(.|\n)*'body\.\*'; parameters: 0\.weight"),
        (lambda: None, {}, r"init needs a module, or a function that makes one(.|\n)*NoneType"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_cannot_be_initialised_is_refused(make, options, text):
    with pytest.raises(StepError, match=text):
        init(make, optim.sgd(0.1), **options)


# --- replace and apply_gradients --------------------------------------------------------------------------------------


def test_replace_makes_a_new_state_and_refuses_unknown_fields():
    state = init(net, optim.sgd(0.1))
    new = state.replace(step=torch.tensor(9))
    assert (int(state.step), int(new.step)) == (0, 9)
    assert new.params is state.params
    with pytest.raises(StepError, match=r"TrainState has no field 'parms'(.|\n)*fields: step, params, buffers"):
        state.replace(parms={})


def test_a_subclass_is_a_state_of_its_own():
    @ps.pytree
    class EmaState(TrainState):
        ema: Any = None

    base = init(net, optim.sgd(0.1))
    state = EmaState(**vars(base), ema=base.params)
    step = ps.make_step(lambda net, batch: net(batch).square().mean(), optim.sgd(0.1))
    new, _ = step(state, torch.randn(6, 4))
    assert type(new) is EmaState
    assert new.ema is base.params
    assert "state.ema['0.weight']" in tree.paths(new, "state")
    assert tree.map(lambda t: t, new).ema.keys() == base.params.keys()


def test_a_skipped_update_changes_no_bit_but_its_own_count():
    tx = optim.apply_if_finite(optim.adam(0.1))
    state = init(net, tx)
    good = tree.map(torch.ones_like, state.params)
    bad = {**good, "2.bias": torch.tensor([1.0, float("nan")])}
    other = tree.map(lambda t: t + 1, state.buffers)
    state = state.apply_gradients(tx, good, buffers=other)
    assert int(state.step) == 1
    skipped = state.apply_gradients(tx, bad, buffers=tree.map(lambda t: t + 1, state.buffers))
    for field in ("step", "params", "buffers", "rng"):
        assert not tree.diff(getattr(skipped, field), getattr(state, field))
    assert not tree.diff(skipped.opt_state.inner, state.opt_state.inner)
    assert int(skipped.opt_state.total_notfinite) == 1
    assert int(skipped.apply_gradients(tx, good).step) == 2


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda g: g.pop("0.bias"),
            r"gradients do not have the structure of state\.params(.|\n)*'0\.bias' is only in the params",
        ),
        (lambda g: g.update(extra=g["0.bias"]), r"'extra' is only in the gradients"),
        (lambda g: g.update({"0.bias": (g["0.bias"],)}), r"is only in the"),
        (lambda g: g.update({"0.bias": torch.tensor(1.0)}), r"'0\.bias': float32\[\], state\.params: float32\[5\]"),
        (lambda g: g.update({"0.bias": None}), r"'0\.bias' is only in the params"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(change, text):
    tx = optim.sgd(0.1)
    state = init(net, tx)
    grads = tree.map(torch.ones_like, state.params)
    change(grads)
    with pytest.raises(StepError, match=text):
        state.apply_gradients(tx, grads)


def test_other_mistakes_are_refused():
    tx = optim.adam(0.1)
    state = init(net, tx)
    grads = tree.map(torch.ones_like, state.params)
    with pytest.raises(StepError, match=r"buffers do not have the structure of state\.buffers"):
        state.apply_gradients(tx, grads, buffers={})
    with pytest.raises((OptimError, StepError, AttributeError)):
        state.replace(opt_state=()).apply_gradients(tx, grads)
    for given, shown in ((torch.optim.SGD, "the class torch.optim.sgd.SGD"), (None, "a builtins.NoneType")):
        with pytest.raises(ConfigError, match=f"a step needs a gradient transformation(.|\n)*{shown}"):
            init(net, given)


def test_separately_built_models_stack_into_an_ensemble():
    tx = optim.adam(0.05)
    step = ps.make_step(lambda net, batch: (net(batch["x"]) - batch["y"]).square().mean(), tx)

    def body():
        return nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 1))

    states = [init(body, tx, seed=i) for i in range(3)]
    batch = {"x": torch.randn(16, 3), "y": torch.randn(16, 1)}
    stacked = tree.map(lambda *xs: torch.stack(xs), *states)
    for _ in range(3):
        stacked, metrics = torch.func.vmap(step, in_dims=(0, None))(stacked, batch)
        states, singles = zip(*[step(s, batch) for s in states], strict=True)
    for i, state in enumerate(states):
        for name, p in state.params.items():
            torch.testing.assert_close(stacked.params[name][i], p, atol=1e-6, rtol=1e-5)
        assert float(singles[i]["loss"]) == pytest.approx(
            float(metrics["loss"].total[i] / metrics["loss"].weight[i]), abs=1e-5
        )
    assert stacked.step.tolist() == [3, 3, 3]


# --- back to a module -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        net,
        Tied,
        Recurrent,
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))),
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3))),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_a_module_made_from_a_state_computes_what_the_state_does(make, given):
    tx = optim.sgd(0.5)
    step = ps.make_step(lambda net, batch: net(batch).square().mean(), tx)
    state = init(make, tx)
    x = torch.randn(6, 4)
    state, _ = step(state, x)
    module = to_module(state, make() if given else None)
    assert not module.training
    assert all(p.requires_grad for p in module.parameters())
    out, _ = apply(state.model.module, state.params, state.buffers, x, train=False)
    assert torch.equal(module(x), out)
    assert {n for n, _ in module.named_parameters()} == set(state.params)
    digest = tree.digest(state)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    assert tree.digest(state) == digest
    module(x).sum().backward()
    copy.deepcopy(module)
    if make is Tied:
        assert module.head.weight is module.embed.weight


def test_frozen_parameters_come_back_frozen_and_without_a_model_one_has_to_be_given():
    state = init(net, optim.sgd(0.1), frozen="0.*")
    assert [n for n, p in to_module(state).named_parameters() if not p.requires_grad] == ["0.weight", "0.bias"]
    with pytest.raises(StepError, match=r"the state holds no model(.|\n)*ps\.to_module\(state, module\)"):
        to_module(state.replace(model=None))
    with pytest.raises(StepError, match=r"does not fit the module Linear(.|\n)*missing in the module, float32\[5\]"):
        to_module(state, nn.Linear(2, 2))
    with pytest.raises(StepError, match=r"'0\.weight': float32\[7, 4\] in the module, float32\[5, 4\] in the state"):
        to_module(state, nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Linear(7, 2)))
