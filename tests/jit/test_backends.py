"""Every backend gives the results of the function itself."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import ConfigError
from purestep.jit import constants, disk_cache, jit
from purestep.jit._torch import fake_tensor_mode
from purestep.jit.trace import trace
from purestep.testing import assert_trees_close, assert_trees_equal, check_pure


@contextlib.contextmanager
def spelled_out(recurrent):
    """A graph spells out what a recurrent layer does; eager takes oneDNN's kernel, which rounds otherwise."""
    before = torch.backends.mkldnn.enabled
    torch._C._set_mkldnn_enabled(before and not recurrent)
    yield
    torch._C._set_mkldnn_enabled(before)


def test_the_traced_step_has_the_bits_of_the_step(case, batches, trained):
    data = batches(3, seed=3)
    with spelled_out(case.recurrent):
        expected, rows = trained(case.step(), case.state(3), data)
    step = jit(case.step(), backend="eager")
    actual, found = trained(step, case.state(3), data)
    assert_trees_equal(actual, expected, "state")
    assert found == rows
    check_pure(step, case.state(3), data[0])
    donated, found = trained(jit(case.step(), backend="eager", donate=True), case.state(3), data)
    assert_trees_equal(donated, expected, "state")
    assert found == rows


def test_torch_compiles_the_traced_step_to_the_same_bits(cases, batches, trained):
    case, data = cases["batch norm"], batches(3)
    expected, rows = trained(case.step(), case.state(), data)
    for donate in (False, True):
        actual, found = trained(jit(case.step(), backend="aot_eager", donate=donate), case.state(), data)
        assert_trees_equal(actual, expected, "state")
        assert found == rows


def close(actual, expected, rtol=1e-5):
    """Within 1e-5 of the largest element of each leaf: what single elements near 0 lose is no matter."""
    for path, a, b in zip(ps.tree.paths(expected), ps.tree.leaves(actual), ps.tree.leaves(expected), strict=True):
        scale = float(b.abs().max()) if b.numel() else 0.0
        assert a.dtype == b.dtype
        assert float((a - b).abs().max()) <= rtol * scale, path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dropout", "batch norm", "attention"])
def test_inductor_agrees_with_eager_after_50_steps(cases, batches, trained, name):
    # Adam would divide the rounding of a gradient that is zero (of a bias before a norm, of the keys) by itself.
    tx = cases["plain"].tx if name == "dropout" else ps.optim.sgd(0.05, momentum=0.9)
    case, data = dataclasses.replace(cases[name], tx=tx), batches(50, seed=5)
    expected, rows = trained(case.step(), case.state(5), data)
    actual, found = trained(jit(case.step(), donate=True), case.state(5), data)
    close(actual.params, expected.params)
    close(actual.buffers, expected.buffers)
    assert_trees_equal(actual.step, expected.step)
    for row, other in zip(found, rows, strict=True):
        assert row == pytest.approx(other, rel=1e-5)
    if name == "dropout":  # to compile twice costs twice
        kept, found_kept = trained(jit(case.step()), case.state(5), data)
        assert_trees_equal(kept, actual, "state")
        assert found_kept == found


@pytest.mark.slow
def test_inductor_compiles_microbatches_in_pieces(cases, batches, trained):
    case, data = dataclasses.replace(cases["plain"], options={"microbatches": 3}), batches(3, 12)
    expected, _ = trained(case.step(), case.state(), data)
    actual, _ = trained(jit(case.step(), donate=True), case.state(), data)
    assert_trees_close(actual.params, expected.params, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_dynamo_agrees_with_eager(cases, batches, trained):
    case, data = cases["plain"], batches(3)
    expected, _ = trained(case.step(), case.state(), data)
    actual, _ = trained(jit(case.step(), backend="dynamo"), case.state(), data)
    assert_trees_close(actual.params, expected.params, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_random_bits_are_those_of_eager():
    """Shifts, products and masks of 64-bit words are where a C++ compiler may disagree with torch."""

    def draw(key, step):
        folded = ps.random.fold_in(key, step, 3)
        return {
            "bits": ps.random.bits(folded, (37,)),
            "wide": ps.random.uniform(key, (9,), dtype=torch.float64),
            "slice": ps.random.bits(key, (10,), index=torch.arange(20, 30)),
        }

    compiled = jit(draw)
    for seed in (0, 1, 2**63 + 5, 2**64 - 1):
        key, step = ps.random.key(seed), torch.tensor(seed % 1000)
        assert_trees_equal(compiled(key, step), draw(key, step))


def test_an_eval_step(cases, batches):
    state, batch = cases["dropout"].state(), batches(1)[0]

    def loss_fn(net, batch):
        return nn.functional.cross_entropy(net(batch["x"]), batch["y"])

    evaluate = ps.make_eval(loss_fn)
    assert_trees_equal(jit(evaluate, backend="eager")(state, batch), evaluate(state, batch))


@pytest.mark.parametrize("donate", [False, True])
def test_a_hand_written_step_over_a_dict(donate, batches):
    model = nn.Sequential(nn.Linear(7, 6), nn.Dropout(0.2), nn.Linear(6, 5))
    tx = ps.optim.sgd(0.1, momentum=0.9)

    def train_step(state, batch):
        def loss_of(params):
            logits, _ = ps.apply(model, params, {}, batch["x"], rng=ps.random.fold_in(state["rng"], state["step"]))
            return nn.functional.cross_entropy(logits, batch["y"])

        grads, loss = ps.grad_and_value(loss_of)(state["params"])
        updates, opt = tx.update(grads, state["opt"], state["params"], step=state["step"])
        params = ps.optim.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt, "rng": state["rng"], "step": state["step"] + 1}, {"loss": loss}

    def fresh():
        params = {n: p.detach().clone() for n, p in model.named_parameters()}
        return {"params": params, "opt": tx.init(params), "rng": ps.random.key(1), "step": torch.tensor(0)}

    expected, actual = fresh(), fresh()
    step = jit(train_step, backend="eager", donate=donate)
    for batch in batches(3, 11):
        expected, loss = train_step(expected, batch)
        actual, found = step(actual, batch)
        assert_trees_equal((actual, found), (expected, loss))


def test_inside_a_transform_it_is_the_function_itself(cases, batches):
    def f(x):
        return (x**3).sum()

    x = torch.randn(4)
    assert torch.equal(torch.func.grad(jit(f, backend="eager"))(x), 3 * x**2)
    doubled = jit(lambda x: 2 * jit(f, backend="eager")(x), backend="eager")
    assert torch.equal(doubled(x), 2 * f(x))


def test_parameters_that_require_gradients_are_values(cases):
    weight = nn.Parameter(torch.ones(3, 3))
    out = jit(lambda w, x: w @ x, backend="eager")(weight, torch.ones(3, 3))
    assert not out.requires_grad


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"backend": "xla"}, "jit has no such backend"),
        ({"mode": "fast"}, "jit has no such mode"),
        ({"mode": "reduce-overhead", "backend": "eager"}, "only a compiler has modes"),
        ({"static": "training"}, "static= names no argument of the function"),
    ],
)
def test_options_are_checked(options, text):
    with pytest.raises(ConfigError, match=text):
        jit(lambda state, batch: state, **options)


def test_it_compiles_functions_only():
    with pytest.raises(ConfigError, match="jit compiles a function"):
        jit(3)


@pytest.mark.slow
def test_the_disk_cache_of_inductor_serves_the_same_graph_again(monkeypatch):
    """A graph that Inductor refuses to cache compiles anew in every process, silently, if it is not on the shelf."""
    monkeypatch.setattr(disk_cache, "take", lambda name: None)
    from torch._dynamo.utils import counters

    def f(state, batch):
        return {"w": state["w"] * 0.5 + batch.sum()}, {"seen": batch.mean()}

    hits = []
    for _ in range(2):
        before = counters["inductor"]["fxgraph_cache_hit"]
        jit(f, donate=True).compile({"w": torch.ones(11)}, torch.ones(7, 3))
        hits.append(counters["inductor"]["fxgraph_cache_hit"] - before)
    assert hits[1] == 1


def test_shared_numbers_are_computed_outside_of_loops():
    from torch.fx.experimental.proxy_tensor import make_fx

    from purestep.jit.hoist import hoist_scalars

    def f(count, x, y):
        scale = 1 / (1 - 0.9**count)
        return x * scale, y * scale, scale + 1

    arguments = torch.tensor(3.0), torch.randn(5), torch.randn(2, 3)
    graph = make_fx(f, tracing_mode="fake")(*arguments)
    assert hoist_scalars(graph) == 1
    stored = [n for n in graph.graph.nodes if n.target is torch.ops.aten.as_strided.default]
    assert [len(n.users) for n in stored] == [2]
    assert_trees_equal(list(graph(*arguments)), list(f(*arguments)))


def test_what_each_model_of_an_ensemble_shares_is_computed_once():
    from torch.fx.experimental.proxy_tensor import make_fx

    from purestep.jit.hoist import hoist_scalars

    def f(count, bias, x):
        scale = (1 / (1 - 0.9 ** count.to(torch.float64))).to(torch.float32)
        return x * scale[:, None], x + (bias * 2)[:, None], scale + 1

    arguments = torch.tensor([3.0, 4.0]), torch.randn(2), torch.randn(2, 16)
    graph = make_fx(f, tracing_mode="fake")(*arguments)
    assert hoist_scalars(graph) == 1  # not `bias * 2`, which costs less than to store it
    assert_trees_equal(list(graph(*arguments)), list(f(*arguments)))
    narrow = arguments[0], arguments[1], torch.randn(2, 15)
    assert hoist_scalars(make_fx(f, tracing_mode="fake")(*narrow)) == 0


def test_an_element_of_a_vector_is_not_taken_for_a_number_of_its_own():
    from torch.fx.experimental.proxy_tensor import make_fx

    from purestep.jit.hoist import hoist_scalars

    def f(rates, x):
        first, second = (rates * 2).unbind()
        return x * second, x * first, x * rates[1]

    graph = make_fx(f, tracing_mode="fake")(torch.tensor([1.0, 3.0]), torch.ones(5))
    assert hoist_scalars(graph) == 0


@pytest.mark.slow
def test_elements_of_vectors_have_their_values_when_compiled():
    def f(rates, xs):
        scaled = rates.exp()
        return [x * scaled[i] + (rates * 3)[i] for i, x in enumerate(xs)], scaled[2] * xs[0]

    arguments = torch.randn(3), [torch.randn(40), torch.randn(7, 5), torch.randn(())]
    assert_trees_close(jit(f)(*arguments), f(*arguments), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_the_first_compilation_of_a_process_knows_the_decomposition_of_max_pooling():
    # It needs torch._inductor.lowering, which only a process that compiled before has imported.
    code = (
        "import torch; from purestep.jit import backends; from purestep.jit.trace import trace\n"
        "from purestep import tree\n"
        "pool = lambda x: torch.nn.functional.max_pool2d(x, 2)\n"
        "leaves, structure = tree.flatten(((torch.ones(1, 1, 4, 4),), {}))\n"
        "with backends._decompositions(torch.device('cpu')) as table:\n"
        "    print(backends._broken_up(trace(pool, leaves, structure, paths=lambda: []), table).code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "window", "options"),
    [
        ((3, 5, 12, 13), 2, {}),
        ((2, 4, 9, 11), 3, {"stride": 2, "padding": 1}),
        ((2, 3, 11, 10), (3, 2), {"stride": (1, 2), "dilation": 2, "ceil_mode": True}),
        ((4, 10, 7), 7, {}),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_max_pooling_is_torchs_and_fits_what_is_around_it(shape, window, options, layout):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, shape, generator=generator).float()  # with ties
    if x.dim() == 4:
        x = x.to(memory_format=layout)

    def gradient(x, scale):
        def loss_of(y):
            return (torch.nn.functional.max_pool2d(y.relu() * scale, window, **options) ** 2).sum()

        return torch.func.grad(loss_of)(x) * 2

    for scale in (torch.tensor(1.5), torch.tensor(-0.5)):
        close(jit(gradient)(x, scale), gradient(x, scale))


def test_a_constant_is_put_on_the_card_when_the_graph_is_compiled(monkeypatch):
    def scaled(x):
        return x * torch.tensor([0.5, 2.0], device=x.device, dtype=x.dtype)

    with fake_tensor_mode(allow_non_fake_inputs=True):
        leaves, structure = ps.tree.flatten(((torch.empty(3, 2, device="cuda"),), {}))
    traced = trace(scaled, leaves, structure, paths=lambda: ["x"])
    monkeypatch.setattr(constants, "_moved", lambda constant, like: constant)  # no card is here
    assert "aten._to_copy" in traced.graph.code
    constants.place(traced)
    assert "aten._to_copy" not in traced.graph.code
    x = torch.randn(3, 2)
    assert torch.equal(traced.graph(x)[0], scaled(x))
