"""Attributes that a model changes in its forward pass: found in the first step, and caches are let through."""

from __future__ import annotations

import collections
import dataclasses
import random as python_random
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import purestep as ps
from purestep.errors import StepError
from purestep.loop import HiddenStateWarning
from purestep.preflight import hidden_attributes
from purestep.testing import check_pure

X = torch.ones(4, 3)


class Net(nn.Module):
    """A model whose forward pass begins with a function of the model, which gives a factor."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.lin, self.function = nn.Linear(3, 3), function
        self.inner = nn.Module()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.lin(x) * self.function(self, x)


def loss_fn(net, batch):
    return net(batch).square().mean()


TX = ps.optim.sgd(0.01)
STEP = ps.make_step(loss_fn, TX)


def fit(model, *, step=STEP, steps=3, **options):
    return ps.fit(step, ps.init(model, TX), [X] * steps, until=ps.steps(steps), **options)


def counter(net, x):
    net.calls += 1
    return 1.0 + 0.1 * net.calls


def growing(net, x):
    net.history.append(float(len(net.history)))
    return 1.0 + sum(net.history)


def keyed(net, x):
    net.table[len(net.table)] = 1.0
    return len(net.table)


def smoothed(net, x):
    net.mean = 0.9 * net.mean + 0.1 * x.detach().mean()
    return net.mean


def own_generator(net, x):
    return net.rng.random()


def inside(net, x):
    net.stats.n += 1
    return net.stats.n


def deeper(net, x):
    net.inner.calls = getattr(net.inner, "calls", 0) + 1
    return net.inner.calls


def dynamic_rope(net, x):
    """Scaled anew when a sequence is longer than all before, as in transformers."""
    if len(x) > net.longest:
        net.longest = len(x)
        net.scale = net.scale * 2.0
    return net.scale


# The change that is told: path and values.
HIDDEN = {
    "counter": (lambda: Net(counter, calls=0), "model.calls (Net): 1, then 2"),
    "list": (lambda: Net(growing, history=[]), "model.history (Net): [0.0], then [0.0, 1.0]"),
    "dict": (lambda: Net(keyed, table={}), "model.table (Net): {0: 1.0}, then {0: 1.0, 1: 1.0}"),
    "tensor": (lambda: Net(smoothed, mean=torch.tensor(0.0)), "model.mean (Net): float32[] 0.1, then float32[] 0.19"),
    "generator": (
        lambda: Net(own_generator, rng=np.random.default_rng(0)),
        "model.rng (Net): Generator in state",
    ),
    "object": (
        lambda: Net(inside, stats=types.SimpleNamespace(n=0)),
        "model.stats (Net): SimpleNamespace(n=1), then SimpleNamespace(n=2)",
    ),
    "submodule": (lambda: Net(deeper), "model.inner.calls (Module): 1, then 2"),
    "changed once": (lambda: Net(dynamic_rope, longest=2, scale=1.0), "model.longest (Net): 2, then 4"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_an_attribute_that_results_depend_on_is_an_error_in_the_first_step(name):
    model, where = HIDDEN[name]
    if name == "changed once":  # as a buffer, its scale is part of the state, and the number that guards it is not
        model = lambda: _with_buffer(HIDDEN[name][0]())  # noqa: E731
    with pytest.raises(StepError) as error:
        fit(model)
    lines = str(error.value).splitlines()
    assert lines[0] == "the model changes an attribute of itself, and computes other numbers because of it"
    assert lines[1].startswith(f"  where:   {where}")
    assert "self.register_buffer(" in str(error.value)


def _with_buffer(net):
    scale = net.__dict__.pop("scale")
    net.register_buffer("scale", torch.tensor(scale), persistent=False)
    return net


@pytest.mark.parametrize("name", [n for n in HIDDEN if n != "changed once"])
def test_check_pure_names_it(name):
    model, where = HIDDEN[name]
    with pytest.raises(AssertionError) as error:
        check_pure(STEP, ps.init(model, TX), X)
    assert f"  where:   {where}" in str(error.value)


def test_check_pure_names_what_changed_once():
    state = ps.init(lambda: _with_buffer(HIDDEN["changed once"][0]()), TX)
    with pytest.raises(AssertionError, match="other bits the second time") as error:
        check_pure(STEP, state, X)
    assert "the first time it changed model.longest (Net): 2, then 4" in str(error.value)


def only_counted(net, x):
    net.calls += 1
    return 1.0


def test_an_attribute_that_no_result_depends_on_is_a_warning_and_keeps_its_value():
    with pytest.warns(HiddenStateWarning, match=r"each time it is called\n  where:   model\.calls \(Net\): 1, then 2"):
        result = fit(lambda: Net(only_counted, calls=0), steps=5)
    assert result.state.model.module.calls == 5


@pytest.mark.parametrize(
    "step",
    [
        ps.donate(STEP),
        ps.jit(STEP, backend="eager"),
        lambda state, batch: STEP(state, batch),
    ],
    ids=["donated", "compiled", "hand-written"],
)
def test_other_kinds_of_steps(step):
    kind = StepError if not hasattr(step, "donate") else HiddenStateWarning
    seen = pytest.raises if kind is StepError else pytest.warns
    with seen(kind, match=r"model\.calls \(Net\): 1, then 2"):
        fit(lambda: Net(counter, calls=0), step=step)


def test_a_module_outside_of_the_state_is_looked_at_too():
    teacher = Net(counter, calls=0)
    weights = dict(teacher.named_parameters())
    step = ps.make_step(lambda net, x: (net(x) - ps.apply(teacher, weights, {}, x)[0]).square().mean(), TX)
    with pytest.raises(StepError, match=r"Net\.calls \(Net\)"):
        fit(lambda: nn.Linear(3, 3), step=step)


def test_a_step_that_reads_values_is_checked_by_its_real_calls():
    def reads(net, x):
        net.calls += int(x.sum() > 0)
        return float(net.calls)

    with pytest.raises(StepError, match=r"model\.calls \(Net\): 1, then 2"):
        fit(lambda: Net(reads, calls=0))


@pytest.mark.filterwarnings("ignore::purestep.loop.RunChangedWarning")  # the data is longer
def test_a_resumed_run_is_checked_as_well(tmp_path):
    switched = {"on": False}

    def later(net, x):
        net.calls += switched["on"]
        return 1.0 + net.calls

    fit(lambda: Net(later, calls=0), run_dir=tmp_path)
    switched["on"] = True
    with pytest.raises(StepError, match=r"model\.calls"):
        fit(lambda: Net(later, calls=0), steps=5, run_dir=tmp_path)


# --- what is fine -----------------------------------------------------------------------------------------------------


def lazy(net, x):
    if net.table is None:
        net.table = torch.arange(3.0)
    return net.table


def by_size(net, x):
    return net.cache.setdefault(tuple(x.shape), torch.ones(x.shape[-1]))


def flagged(net, x):
    net.ready = True
    return 1.0


def auxiliary(net, x):
    net.aux, net.shape, net.last = x.mean() * net.lin.weight.sum(), tuple(x.shape), Output(x * 2, [x.mean()])
    net.recent.append(float(net.lin.weight.shape[0]))
    return 1.0 + net.aux


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden_attributes: list


def closures(net, x):
    net.again, net.weak, net.names = (lambda: x), iter([1]), {"a", "b"}
    return 1.0


def not_a_number(net, x):
    net.value, net.nans = float("nan"), torch.full((2,), float("nan"))
    return 1.0


FINE = {
    "lazy table": lambda: Net(lazy, table=None),
    "cache by size": lambda: Net(by_size, cache={}),
    "flag": lambda: Net(flagged, ready=False),
    "results kept for the loss": lambda: Net(auxiliary, recent=collections.deque([3.0], maxlen=1)),
    "closures": lambda: Net(closures),
    "not a number": lambda: Net(not_a_number),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
    "spectral norm, older": lambda: spectral_norm(nn.Linear(3, 3)),
    "recurrent": lambda: nn.Sequential(nn.Linear(3, 3), Recurrent()),
    "attention": lambda: nn.TransformerEncoderLayer(3, 1, 8, batch_first=True),
}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 3)

    def forward(self, x):
        return self.rnn(x)[0]


@pytest.mark.parametrize("name", FINE)
def test_what_does_not_change_again_is_fine(name):
    calls = []

    def counted(net, batch):
        if next(net.parameters()).device.type == "cpu":
            calls.append(1)
        return loss_fn(net, batch)

    result = fit(FINE[name], step=ps.make_step(counted, TX))
    assert result.reason == "reached 3 steps"
    assert len(calls) <= 4  # one more where an attribute changed at first
    check_pure(STEP, ps.init(FINE[name], TX), X)


def test_a_model_that_changes_nothing_is_called_as_often_as_it_trains():
    calls = []

    def counted(net, batch):
        calls.append(next(net.parameters()).device.type)
        return loss_fn(net, batch)

    fit(lambda: nn.Linear(3, 3), step=ps.make_step(counted, TX))
    assert calls == ["meta", "cpu", "cpu", "cpu"]


def test_numbers_that_differ_by_chance_are_not_an_error():
    noise = iter(range(100))

    def hand_written(state, batch):
        new, metrics = STEP(state, batch)
        return new.replace(buffers={"noise": torch.tensor(float(next(noise)))}), metrics

    def model():
        net = Net(lazy, table=None)
        net.register_buffer("noise", torch.tensor(0.0))
        return net

    fit(model, step=hand_written)


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        (1, 1.0, False),
        (1.0, 1.0, True),
        ([1, (2, 3)], [1, (2, 3)], True),
        ([1, (2, 3)], [1, (2, 4)], False),
        (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.ones(3), False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (np.ones(2), np.ones(2), True),
        (np.ones(2), np.zeros(2), False),
        ({1, 2}, {2, 1}, True),
        ({1, 2}, {1, 3}, False),
        (None, torch.ones(1), False),
    ],
)
def test_values_are_compared(old, new, same):
    a, b = nn.Module(), nn.Module()
    a.value, b.value = old, new
    before, after = hidden_attributes.attributes({"model": a}), hidden_attributes.attributes({"model": b})
    assert (not hidden_attributes.changed(before, after)) == same


def attributes(module):
    return hidden_attributes.attributes({"model": module})


def test_attributes_are_put_back_with_what_is_in_them():
    module = nn.Linear(2, 2)
    module.plain, module.items, module.rng = 1, [1, {"a": {2}}], np.random.default_rng(0)
    module.fields, module.ring = types.SimpleNamespace(n=1, untouched=np), collections.deque([1, 2], maxlen=2)
    module.python, module.torch = python_random.Random(0), torch.Generator()
    before, saved = attributes(module), hidden_attributes.Saved({"model": module})
    module.plain, module.new = 2, 3
    module.items[1]["a"].add(3), module.items.append(4)
    module.fields.n, module.fields.more = 2, 3
    module.ring.append(3)
    module.rng.random(), module.python.random(), torch.rand(1, generator=module.torch)
    paths = {change.path.removeprefix("model.") for change in hidden_attributes.changed(before, attributes(module))}
    assert paths == {"plain", "new", "items", "fields", "ring", "rng", "python", "torch"}
    saved.put_back()
    assert not hidden_attributes.changed(before, attributes(module))
    assert not hasattr(module, "new")


def test_a_large_attribute_is_looked_at_in_part():
    module = nn.Module()
    module.table = {i: [i] * 10 for i in range(100_000)}
    assert not hidden_attributes.changed(attributes(module), attributes(module))
    before = attributes(module)
    module.table[-1] = []
    assert hidden_attributes.changed(before, attributes(module))
