"""Models that ask for values, convert themselves or depend on strides are traced, with the bits of the step itself."""

from __future__ import annotations

import warnings

import pytest
import torch
from shared_marks import slow_but
from torch import nn
from torch.nn import functional as F

import purestep as ps
from purestep.errors import ConfigError, TraceError
from purestep.jit import backends, jit, reads, repeats
from purestep.jit.reads import Guard
from purestep.random.philox import philox
from purestep.testing import assert_trees_equal

TX = ps.optim.adamw(1e-2)


def batch(*values, size=6):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(size, 4, generator=generator)
    return {"x": x, "y": torch.tensor(values or [0, 1, 2, 0, 2, 1])[:size]}


def linear():
    return nn.Linear(4, 3)


def asks(net, b):
    """As transformers asks whether a mask hides anything."""
    logits = net(b["x"])
    mask = b["y"] > 0
    if not mask.all():
        logits = torch.where(mask[:, None], logits, logits * 0.5)
    return F.cross_entropy(logits, b["y"])


def checks(net, b):
    """As models check their labels."""
    if b["y"].max() >= 3:
        raise ValueError("a label is too large")
    return F.cross_entropy(net(b["x"]), b["y"])


def counts(net, b):
    return sum(net(b["x"])[k].square().sum() for k in b["y"].tolist())


def classes(net, b):
    return (net(b["x"]) - F.one_hot(b["y"])).square().mean()


def likelihood(net, b):
    out = net(b["x"])
    return -torch.distributions.Normal(out, out.exp()).log_prob(b["x"][:, :3]).mean()


def gaussian(net, b):
    return F.gaussian_nll_loss(net(b["x"]), b["x"][:, :3], net(b["x"]).exp(), full=True)


def constants(net, b):
    """Masks, counts and numbers that no argument decides."""
    kept = torch.arange(3) != 1
    scale = torch.arange(4).max().item() + int(torch.ones(3).sum()) + torch.nonzero(kept).shape[0]
    return (net(b["x"])[:, kept] * scale).square().mean()


def square(net, b):
    return net(b["x"]).square().mean()


class Causal(nn.Module):
    """torch finds out by value whether a mask is causal."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(x[None], mask=nn.Transformer.generate_square_subsequent_mask(len(x)))


class Converting(nn.Module):
    """As the router of a mixture of experts."""

    def __init__(self, dtype):
        super().__init__()
        self.layer, self.dtype = nn.Linear(4, 3), dtype

    def forward(self, x):
        self.layer = self.layer.to(self.dtype)
        return self.layer(x.to(self.dtype)).float()


def logarithm(x, n: int):
    return torch.log(x.abs() + torch.tensor(n))


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch deprecates it, and models still have it
    scripted = torch.jit.script(logarithm)


class Scripted(nn.Linear):
    def forward(self, x):
        return scripted(super().forward(x), 3)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.compile(nn.Linear(4, 4), backend="eager"), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(self.first(x).relu())


class Strided(nn.Module):
    """The softplus of a transposed tensor has other strides than its fake counterpart."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(self, x):
        return F.softplus(self.layer(x[None].expand(2, -1, -1)).transpose(1, 2)) * x.new_ones(2, 8, len(x))


class Skipping(nn.Module):
    """Layers that a draw leaves out, as in LayerDrop."""

    def __init__(self, rate):
        super().__init__()
        self.layer, self.rate = nn.Linear(4, 4), rate

    def forward(self, x):
        if torch.rand([]) >= self.rate:
            x = self.layer(x)
        return self.layer(x)


KINDS = {
    "mask": (linear, asks),
    "labels": (linear, checks),
    "list": (linear, counts),
    "one hot": (linear, classes),
    "distribution": (linear, likelihood),
    "gaussian": (linear, gaussian),
    "constants": (linear, constants),
    "causal": (Causal, square),
    "conversion": (lambda: Converting(torch.float32), square),
    "conversion to double": (lambda: Converting(torch.float64), square),
    "script": (lambda: Scripted(4, 3), square),
    "torch.compile": (Wrapped, square),
    "strides": (Strided, square),
    "no LayerDrop": (lambda: Skipping(0.0), square),
}


def both(model, loss_fn, batches, **options):
    """The states after a step and its compiled form went over some batches, and the compiled step."""
    step = ps.make_step(loss_fn, TX)
    compiled = jit(step, backend="eager", **options)
    expected, actual = ps.init(model, TX), ps.init(model, TX)
    for b in batches:
        expected, rows = step(expected, b)
        actual, found = compiled(actual, b)
        assert_trees_equal(ps.metrics.compute(found), ps.metrics.compute(rows))
    assert_trees_equal(actual, expected)
    return compiled


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch imports what it deprecates
@pytest.mark.parametrize("kind", slow_but(KINDS, *list(KINDS)[::2]), ids=lambda kind: kind.replace(" ", "_"))
def test_it_is_traced_with_the_bits_of_the_step(kind):
    model, loss_fn = KINDS[kind]
    before = nn.Module.to, nn.Module.__call__, torch.jit.ScriptFunction.__call__, torch.compiler.is_compiling()
    compiled = both(model, loss_fn, [batch(), batch()], donate=True)
    assert compiled.retraces == ()
    assert before == (
        nn.Module.to,
        nn.Module.__call__,
        torch.jit.ScriptFunction.__call__,
        torch.compiler.is_compiling(),
    )


# --- guards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("donate", [False, True])
def test_another_value_is_traced_once_more_and_both_are_kept(donate):
    whole, hidden = batch(1, 2, 1, 1, 2, 2), batch(1, 0, 1, 0, 2, 2)
    compiled = both(linear, asks, [whole, whole, hidden, whole, hidden, hidden], donate=donate)
    assert len(compiled.retraces) == 1
    assert compiled.retraces[0].startswith("another value than True was read in test_any_model.py:")
    assert "if not mask.all():" in compiled.retraces[0]


class Drawn(nn.Module):
    """Asks for a truth value of a draw."""

    def __init__(self, ask):
        super().__init__()
        self.layer, self.ask = nn.Linear(4, 4), ask

    def forward(self, x):
        return self.layer(x) if self.ask() else self.layer(x) * 2


def grown():
    draw = torch.rand([])
    draw.add_(1)
    return draw > 1.5


SETTLED = {
    "never": lambda: torch.rand([]) < 0.0,
    "always": lambda: torch.rand([]) >= 0,
    "below one": lambda: torch.rand(3)[1] < 1.0,
    "scaled": lambda: torch.rand([]) * 3 + 2 > 5.5,
}
OPEN = {
    "rate": lambda: torch.rand([]) < 0.4,
    "within a rounding of one": lambda: torch.rand([]) < 1 - 2.0**-24,
    "written": grown,
}


@pytest.mark.parametrize("kind", slow_but(SETTLED, "never", "always"))
def test_a_comparison_that_no_draw_changes_is_no_guard(kind, monkeypatch):
    monkeypatch.setattr(reads, "Guard", None)
    both(lambda: Drawn(SETTLED[kind]), square, [batch()])


@pytest.mark.parametrize("kind", slow_but(OPEN, "rate"))
def test_a_comparison_that_a_draw_changes_is_a_guard(kind, monkeypatch):
    found = []
    monkeypatch.setattr(reads, "Guard", lambda *about: found.append(about) or Guard(*about))
    both(lambda: Drawn(OPEN[kind]), square, [batch()] * 6)
    assert found


def test_a_check_still_checks():
    step = jit(ps.make_step(checks, TX), backend="eager")
    state, _ = step(ps.init(linear, TX), batch())
    with pytest.raises(ValueError, match="a label is too large"):
        step(state, batch(0, 1, 2, 3))


def test_microbatches_pass_guards_one_by_one():
    step = ps.make_step(asks, TX, microbatches=2)
    compiled, data = jit(step, backend="eager"), batch(1, 2, 1, 1, 0, 2)
    state = ps.init(linear, TX)
    assert_trees_equal(compiled(state, data), step(state, data))
    assert len(compiled.grads.retraces) == 1


def test_what_was_written_into_a_tensor_counts_when_it_is_read():
    def f(state, x):
        mask = torch.zeros(3)
        before = mask.sum() > 0
        mask[1:].add_(x)
        return state * 2 if mask.max() > 1 and not before else state

    compiled = jit(f, backend="eager")
    for value in (0.5, 3.0, 0.25):
        x = torch.full((), value)
        assert torch.equal(compiled(torch.ones(2), x), f(torch.ones(2), x))
    assert len(compiled.retraces) == 1


def test_layers_left_out_by_a_draw_are_traced_for_each_pattern_drawn():
    compiled = both(lambda: Skipping(0.5), square, [batch()] * 4)
    assert len(compiled.retraces) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda state, x: state * x.sum().item(),
        lambda state, x: state * 2 if (state * x).sum() > 0 else state,
        lambda state, x: state * 2 if (x + torch.rand(3)).sum() > 0 else state,
        lambda state, x: state * 2 if x.add_(1).sum() > 0 else state,
    ],
    ids=["fraction", "state", "draw", "written"],
)
def test_what_no_guard_can_hold_is_refused(function):
    x = torch.ones(3)
    with pytest.raises(TraceError) as caught:
        jit(function, backend="eager")(torch.ones(3), x)
    assert re_line(caught)
    assert torch.equal(x, torch.ones(3))


def re_line(caught):
    return "test_any_model.py:" in str(caught.value) and "asks for the value of a traced tensor" in str(caught.value)


# --- the branch of a library ------------------------------------------------------------------------------------------


class Branching(nn.Linear):
    """Takes another way where a compiler is at work, which rounds otherwise, and asks for a value where none is."""

    def __init__(self, readable):
        super().__init__(4, 3)
        self.readable = readable

    def forward(self, x):
        if torch.compiler.is_compiling():
            return super().forward(x) + 1
        out = super().forward(x)
        asked = x if self.readable else out
        return out * 2 if asked.isfinite().all() else out


@pytest.mark.parametrize("readable", [True, False])
def test_a_library_is_told_of_a_compiler_only_where_its_own_way_cannot_be_traced(readable):
    model, state = Branching(readable), None
    state = ps.init(lambda: model, TX)
    step = ps.make_eval(square)
    found = ps.metrics.compute(jit(step, backend="eager")(state, batch()))["loss"]
    out = F.linear(batch()["x"], state.params["weight"], state.params["bias"])
    assert found == pytest.approx(float((out * 2 if readable else out + 1).square().mean()), rel=1e-5)
    assert not torch.compiler.is_compiling()


# --- layers that read values themselves -------------------------------------------------------------------------------


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x):
        lengths = torch.tensor([len(x)]).clamp(max=3)
        packed = nn.utils.rnn.pack_padded_sequence(x[None], lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0])[0]


@pytest.mark.parametrize(
    ("model", "loss_fn", "instead"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=None)), square, "momentum=0.1"),
        (Packed, square, "out, _ = lstm(padded)"),
        (lambda: nn.Embedding(3, 4, max_norm=1.0), lambda net, b: net(b["y"]).mean(), "torch.renorm(net.embed.weight"),
        (linear, lambda net, b: net(b["x"])[b["y"] > 0].mean(), "torch.where(mask, x, 0).sum() / mask.sum()"),
    ],
    ids=["batch norm", "packed", "max_norm", "boolean index"],
)
def test_it_is_refused_with_the_line_to_write(model, loss_fn, instead):
    with pytest.raises(TraceError) as caught:
        jit(ps.make_step(loss_fn, TX), backend="eager")(ps.init(model, TX), batch())
    assert instead in str(caught.value)


# --- what cannot be traced --------------------------------------------------------------------------------------------


def chosen(net, b):
    loss = F.cross_entropy(net(b["x"]), b["y"], reduction="none")
    return loss[b["y"] > 0].mean() if loss.max() > 1 else loss.mean()


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("donate", [False, True])
def test_gradients_run_uncompiled_where_they_may(donate, microbatches):
    step = ps.make_step(chosen, TX, microbatches=microbatches)
    compiled = jit(step, backend="eager", donate=donate, unjittable="eager")
    expected, actual = ps.init(linear, TX), ps.init(linear, TX)
    for _ in range(2):
        expected, _ = step(expected, batch())
        actual, _ = compiled(actual, batch())
    assert_trees_equal(actual, expected)
    assert len(compiled.refusals) == 1
    assert "asks for the value of a traced tensor" in compiled.refusals[0]


def test_what_can_be_traced_is_compiled_all_the_same():
    compiled = both(linear, asks, [batch(), batch()], unjittable="eager")
    assert compiled.refusals == ()


def test_an_evaluation_runs_as_it_is():
    state, evaluate = ps.init(linear, TX), ps.make_eval(chosen)
    compiled = jit(evaluate, backend="eager", unjittable="eager")
    assert_trees_equal(compiled(state, batch()), evaluate(state, batch()))
    assert len(compiled.refusals) == 1


def test_only_a_step_donates_where_its_gradients_cannot_be_compiled():
    with pytest.raises(ConfigError, match="only a step of make_step donates"):
        jit(lambda state, b: state, donate=True, unjittable="eager")


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", slow_but(["aot_eager", "inductor"]))
def test_strides_that_come_out_otherwise_through_compilers(backend):
    step, state = ps.make_step(square, TX), ps.init(Strided, TX)
    found, expected = jit(step, backend=backend)(state, batch()), step(state, batch())
    ps.testing.assert_trees_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_tensor_is_laid_out_as_it_was_when_a_view_by_strides_was_recorded():
    from purestep.jit.layouts import laid_out

    generator = torch.Generator().manual_seed(0)
    for shape, order in [((2, 3, 5), (1, 2, 0)), ((4, 1, 3), (2, 0, 1)), ((3,), (0,)), ((2, 3, 4, 5), (0, 2, 3, 1))]:
        wanted = torch.empty([shape[d] for d in order]).permute([order.index(d) for d in range(len(order))])
        x = torch.randn(shape, generator=generator)
        found = laid_out(x, wanted.stride())
        assert found.stride() == wanted.stride()
        assert torch.equal(found, x)
        assert laid_out(found, wanted.stride()) is found


def test_a_view_by_strides_of_a_tensor_that_comes_out_otherwise():
    def f(x):
        y = F.softplus(x.transpose(1, 2))
        return y.as_strided((4, 3), (1, 4), 2) * 2

    compiled, x = jit(f, backend="eager"), torch.randn(2, 3, 4)
    flat = F.softplus(x.transpose(1, 2))
    recorded = torch.empty_strided(flat.shape, _fake_strides(x)).copy_(flat)
    assert torch.equal(compiled(x), recorded.as_strided((4, 3), (1, 4), 2) * 2)


def _fake_strides(x):
    from purestep.jit._torch import fake_tensor_mode

    with fake_tensor_mode(allow_non_fake_inputs=True) as mode:
        return F.softplus(mode.from_tensor(x).transpose(1, 2)).stride()


# --- in place ---------------------------------------------------------------------------------------------------------


def views_after(x):
    y = x.clone()
    y.mul_(2)
    z = y[None].expand(3, -1, -1).clone()
    z[1:].add_(y)
    y.add_(1).relu_()
    return y, z.transpose(1, 2), y.t() @ y


def broadcast_after(x):
    y = x.clone()
    y.mul_(2)
    return y[None].expand(3, -1, -1) * 2


def filled(x):
    y = torch.empty_like(x)
    y.copy_(x.sin())
    before = y * 1
    y.div_(3.0)
    return before, y, y.view(-1)[:2]


@pytest.mark.parametrize("function", [views_after, broadcast_after, filled])
def test_operations_in_place_become_values(function):
    compiled, x = jit(function, backend="eager"), torch.randn(3, 4)
    assert_trees_equal(compiled(x), function(x))
    assert "_(" not in compiled.graph(x).replace("_to_copy(", "")


def test_a_graph_whose_writes_are_whole_is_rewritten_where_it_stands(monkeypatch):
    def refuse(*args):
        raise AssertionError("traced a second time")

    monkeypatch.setattr(torch.func, "functionalize", refuse)
    block = nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3), nn.SiLU(inplace=True), nn.Linear(3, 3), nn.ReLU(inplace=True)
    )
    both(lambda: block, square, [batch(), batch()], donate=True)


def test_a_random_block_is_one_node_and_a_compiler_gets_its_operations(monkeypatch):
    repeated, own, seen = [], repeats._repeated, []
    monkeypatch.setattr(repeats, "_repeated", lambda *args: repeated.append(args) or own(*args))
    compiled = backends.compile
    monkeypatch.setattr(backends, "compile", lambda *args, **kwargs: seen.append(args[0]) or compiled(*args, **kwargs))
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 3), nn.Dropout(0.5))
    both(lambda: model, square, [batch(), batch()])
    graph = seen[0].graph
    blocks = [node for node in graph.graph.nodes if node.target is philox]
    assert len(blocks) >= 4
    assert not repeated
    expanded = backends._broken_up(seen[0], {})
    assert len(repeated) >= 2
    assert philox not in {node.target for node in expanded.graph.nodes}
    tensors = [torch.zeros(x.shape, dtype=x.dtype) for x in seen[0].fakes]
    for one, other in zip(graph(*tensors), expanded(*tensors), strict=True):
        assert torch.equal(one, other)


def drawn(rng, x):
    keep = ps.random.bernoulli(ps.random.fold_in(rng, 3), 0.5, (7,))
    return (x * keep * ps.random.uniform(rng, (7,))).sum() ** 2


MANY, XS = ps.random.split(ps.random.key(3), 4), torch.arange(28.0).reshape(4, 7)
TWICE = torch.stack([ps.random.split(k, 3) for k in MANY])


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (torch.vmap(drawn), (MANY, XS)),
        (torch.vmap(drawn, in_dims=(1, None)), (MANY.T.contiguous(), XS[0])),
        (torch.vmap(torch.vmap(drawn, in_dims=(0, None))), (TWICE, XS)),
        (torch.vmap(torch.func.grad(drawn, argnums=1)), (MANY, XS)),
        (torch.vmap(ps.random.fold_in, in_dims=(None, 0)), (MANY[0], torch.arange(4))),
        (torch.vmap(lambda k, i: ps.random.normal(k, (7,), index=i)), (MANY, torch.arange(28).reshape(4, 7))),
    ],
    ids=["keys", "dim 1", "twice", "gradients", "folded", "index"],
)
def test_a_draw_under_vmap_is_one_node_for_all(function, arguments):
    compiled = jit(function, backend="eager")
    assert_trees_equal(compiled(*arguments), function(*arguments))
    assert "philox(" in compiled.graph(*arguments)
    assert "bitwise_xor" not in compiled.graph(*arguments)
