"""When a call is traced again, and why."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import TraceError
from purestep.jit import jit


def counting(function):
    """The function, and the list of its traces."""
    traces = []

    def counted(*args, **kwargs):
        traces.append(1)
        return function(*args, **kwargs)

    return counted, traces


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (
            {"x": torch.zeros(128, 64)},
            {"x": torch.zeros(37, 64)},
            "b['x'] changed from float32[128, 64] to float32[37, 64]",
        ),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(2, dtype=torch.int64)}, "b['x'] changed from float32[2] to int64[2]"),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(2), "y": torch.zeros(1)}, "b['y'] is new"),
        ({"x": torch.zeros(2), "y": torch.zeros(1)}, {"x": torch.zeros(2)}, "b['y'] is gone"),
        (
            {"x": torch.zeros(3, 2)},
            {"x": torch.zeros(2, 3).T},
            "b['x'] changed from float32[3, 2] to float32[3, 2] of strides (1, 3)",
        ),
        ({"x": torch.zeros(1), "n": 3}, {"x": torch.zeros(1), "n": 4}, "b['n'] changed from int 3 to int 4"),
        ({"x": torch.zeros(1), "n": 1}, {"x": torch.zeros(1), "n": 1.0}, "b['n'] changed from int 1 to float 1.0"),
        ({"x": torch.zeros(1), "n": 1}, {"x": torch.zeros(1), "n": True}, "b['n'] changed from int 1 to bool True"),
    ],
)
def test_a_retrace_says_why(first, second, reason, caplog):
    traces = []

    def f(a, b):
        traces.append(1)
        return b["x"] + a

    step = jit(f, backend="eager")
    with caplog.at_level(logging.INFO, logger="purestep.jit"):
        for batch in (first, second, first, second):
            assert torch.equal(step(torch.ones(()), batch), batch["x"] + 1)
    assert len(traces) == 2
    assert step.retraces == (reason,)
    assert f"f is traced again: {reason}" in caplog.text


def test_paths_carry_the_names_of_the_arguments():
    step = jit(lambda state, batch: state + batch["x"], backend="eager")
    step(torch.zeros(2), {"x": torch.ones(2)})
    step(torch.zeros(2), {"x": torch.ones(1)})
    step(torch.zeros(3), {"x": torch.ones(3)})
    assert step.retraces == (
        "batch['x'] changed from float32[2] to float32[1]",
        "state changed from float32[2] to float32[3]; batch['x'] changed from float32[1] to float32[3]",
    )


def test_a_ragged_last_batch_is_traced_once():
    function, traces = counting(lambda w, x: (w + x.sum(), {}))
    step = jit(function, backend="eager", donate=True)
    w = torch.zeros(())
    for _ in range(3):
        for size in (8, 8, 8, 3):
            w, _ = step(w, torch.ones(size))
    assert float(w) == 3 * 27
    assert len(traces) == 2


def test_many_retraces_warn_once():
    step = jit(lambda x: x * 2, backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in range(1, 13):
            step(torch.ones(size))
    texts = [str(w.message) for w in caught if "was traced more than 8 times again" in str(w.message)]
    assert len(texts) == 1
    assert "x changed from float32[9] to float32[10]" in texts[0]
    assert "torch.tensor(0.1)" in texts[0]
    assert len(step.retraces) == 11


class Scaled(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.function = function

    def forward(self, x):
        return self.function(self.layer(x))


def test_models_of_one_structure_and_other_code_do_not_share_a_graph():
    tx = ps.optim.sgd(0.1)
    step = jit(ps.make_step(lambda net, x: net(x).mean(), tx), backend="eager")
    x = torch.ones(4, 3)

    def times(factor):
        def scaled(x):
            return x * factor

        return scaled

    one, two = ps.init(lambda: Scaled(times(2)), tx), ps.init(lambda: Scaled(times(3)), tx)
    assert ps.tree.structure(one) == ps.tree.structure(two)
    for state in (one, two, one, two):
        expected = step.function(state, x)
        ps.testing.assert_trees_equal(step(state, x), expected)
    assert len(step.retraces) == 1
    assert "the model" in step.retraces[0]


def test_models_of_the_same_code_share_a_graph():
    tx = ps.optim.sgd(0.1)
    step = jit(ps.make_step(lambda net, x: net(x).mean(), tx), backend="eager")
    for seed in range(3):
        step(ps.init(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh()), tx, seed=seed), torch.ones(4, 3))
    assert step.retraces == ()


def test_a_setting_of_a_layer_is_part_of_the_signature():
    tx = ps.optim.sgd(0.1)
    step = jit(ps.make_step(lambda net, x: net(x).mean(), tx), backend="eager")

    class Quiet(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.layer, self.factor = nn.Linear(3, 2), factor

        def forward(self, x):
            return self.layer(x) * self.factor

    x = torch.ones(4, 3)
    for factor in (1.0, 2.0):
        state = ps.init(lambda factor=factor: Quiet(factor), tx)
        ps.testing.assert_trees_equal(step(state, x), step.function(state, x))
    assert len(step.retraces) == 1


@pytest.mark.parametrize("static", ["training", ("training",), 2, (2,)])
def test_static_arguments(static):
    function, _ = counting(lambda w, x, training, *, scale=1.0: w + x * scale if training else w)

    def f(w, x, training, *, scale=1.0):
        return function(w, x, training, scale=scale)

    compiled = jit(f, backend="eager", static=static)
    w, x = torch.zeros(2), torch.ones(2)
    assert compiled(w, x, True).tolist() == [1, 1]
    assert compiled(w, x, training=True).tolist() == [1, 1]
    assert compiled(w, x, False).tolist() == [0, 0]
    assert compiled(w, x, True, scale=3.0).tolist() == [3, 3]
    assert compiled(w, x=x, training=True, scale=3.0).tolist() == [3, 3]
    assert compiled.retraces[0] == "training changed from True to False"
    with pytest.raises(TraceError, match="a static argument has to have a hash"):
        compiled(w, x, [1])


def test_settings_of_torch_are_part_of_the_signature():
    function, traces = counting(lambda x: torch.zeros(2) + x.sum())
    compiled = jit(function, backend="eager")
    x = torch.ones(3)
    assert compiled(x).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert compiled(x).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert compiled(x).dtype == torch.float32
    assert len(traces) == 2
    with torch.no_grad():
        compiled(x)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(x)
    assert len(traces) == 3


def test_clear_forgets():
    function, traces = counting(lambda x: x + 1)
    compiled = jit(function, backend="eager")
    compiled(torch.ones(2))
    compiled.clear()
    compiled(torch.ones(2))
    assert len(traces) == 2
    assert compiled.retraces == ()


def test_results_that_are_no_tensors_come_back():
    compiled = jit(lambda x: {"n": 3, "name": "a", "none": None, "x": x, "y": (x + 1, 2.5)}, backend="eager")
    x = torch.ones(2)
    out = compiled(x)
    assert (out["n"], out["name"], out["none"], out["y"][1]) == (3, "a", None, 2.5)
    assert out["x"] is x
    assert out["y"][0].tolist() == [2, 2]


def test_the_graph_and_compiling_ahead():
    function, traces = counting(lambda state, batch: (state * 2 + batch, {"sum": batch.sum()}))
    step = jit(function, backend="eager", donate=True)
    state = torch.ones(3)
    assert step.compile(state, torch.ones(3)) is step
    text = step.graph(state, torch.ones(3))
    assert "torch.ops.aten.mul.Tensor" in text
    assert "torch.ops.aten.copy_.default" in text
    assert state.tolist() == [1, 1, 1]
    step(state, torch.ones(3))
    assert len(traces) == 1
