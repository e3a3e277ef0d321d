"""Steps whose units are compiled each by itself: their bits, what is shared, what a unit may do, what is refused."""

from __future__ import annotations

import functools

import pytest
import torch
from shared_marks import slow_but
from torch import nn
from torch.nn import functional as F

import purestep as ps
from purestep.errors import ConfigError
from purestep.jit import backends
from purestep.jit.joint import joint
from purestep.sharding import ddp, fsdp

TX = ps.optim.chain(ps.optim.clip_by_global_norm(0.5), ps.optim.adamw(1e-2))


class Block(nn.Module):
    """A norm, a dropout, a residual; its number is an attribute, as in models of transformers."""

    def __init__(self, number, width=8):
        super().__init__()
        self.number, self.norm, self.drop = number, nn.LayerNorm(width), nn.Dropout(0.3)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Normed(nn.Module):
    """Batch norm: a unit that writes into its buffers."""

    def __init__(self, number):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.register_buffer("constant", torch.arange(8.0))

    def forward(self, x):
        return torch.relu(self.norm(self.linear(x)) + self.constant)


class Handing(nn.Module):
    """Takes keywords, and returns a view, a tensor without a gradient and a number."""

    def __init__(self, number):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, *, scale=None, shift=1.0):
        y = self.linear(x) * scale + shift
        return {"y": y.view(-1, 2, 4), "largest": y.argmax(-1), "same": x, "count": 3}


class Spread(nn.Module):
    """Returns a result whose rows are one piece of memory, while its gradient has rows of its own."""

    def __init__(self, number):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x).tanh().sum(0, keepdim=True).expand(x.shape)


class Stack(nn.Module):
    def __init__(self, unit, count=3):
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([unit(i) for i in range(count)])

    def forward(self, x):
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            if isinstance(block, Handing):
                found = block(x, scale=torch.tensor(0.5), shift=2.0 if i else 1.0)
                x = found["y"].add_(found["largest"][:, None, None] * found["count"]).flatten(1) + found["same"]
            else:
                x = block(x)
        return self.head(x)


class Checkpointed(Stack):
    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = ps.checkpoint(block, x)
        return self.head(x)


def loss_fn(net, batch):
    return (net(batch["x"]) - batch["y"]).square().mean()


def batches(count=3, samples=7):
    g = torch.Generator().manual_seed(3)
    for _ in range(count):
        yield {"x": torch.randn(samples, 5, generator=g), "y": torch.randn(samples, 1, generator=g)}


def trained(model, plan=None, *, policy=None, checkpoint=None, microbatches=2, **options):
    """Return the step and the digest of its state after three batches; not compiled without options."""
    state = ps.init(model, TX, seed=1)
    state = state if policy is None else ps.precision.policy(policy).apply(state)
    state = state if plan is None else plan.place(state)
    step = ps.make_step(loss_fn, TX, microbatches=microbatches, plan=plan, policy=policy, checkpoint=checkpoint)
    step = ps.jit(step, **options) if options else step
    metrics = {}
    for batch in batches():
        state, metrics = step(state, batch)
    return step, ps.digest([state if plan is None else plan.gather(state), metrics])


@pytest.fixture
def rounding(monkeypatch):
    """A compiler whose results are a bit larger, so that bits show what was compiled."""
    own = backends._eager

    def other(traced, mode):
        run = own(traced, mode)
        return lambda tensors: [x * (1 + 2**-20) if x.is_floating_point() else x for x in run(tensors)]

    monkeypatch.setitem(backends._BACKENDS, "eager", other)


MODELS = {
    "blocks": lambda: Stack(Block),
    "batch norm": lambda: Stack(Normed),
    "views": lambda: Stack(Handing),
    "expanded": lambda: Stack(Spread),
    "checkpoints": lambda: Checkpointed(Block),
}


@pytest.mark.parametrize("name", slow_but(MODELS, "batch norm", "expanded"))
def test_the_bits_are_those_of_the_step_itself(name):
    _, expected = trained(MODELS[name])
    step, found = trained(MODELS[name], backend="eager", by_unit=True)
    assert found == expected
    assert step.refusals == ()
    assert step.units.compiled == {"blocks": 4, "batch norm": 4, "views": 6, "expanded": 8, "checkpoints": 4}[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", ["bf16-mixed", "16-mixed"])
def test_the_bits_are_those_of_the_step_itself_under_every_policy(name, policy):
    for checkpoint in (None, "blocks.1"):
        options = {"policy": policy, "checkpoint": checkpoint}
        assert trained(MODELS[name], **options)[1] == trained(MODELS[name], backend="eager", by_unit=True, **options)[1]


@pytest.mark.slow
def test_the_bits_do_not_depend_on_the_plan(rounding):
    _, plain = trained(MODELS["blocks"], ddp())
    digests = {
        trained(MODELS["blocks"], plan, backend="eager", by_unit=True, donate=True)[1]
        for plan in (ddp(), fsdp(), fsdp(reshard_after_forward=False))
    }
    assert len(digests) == 1
    assert digests != {plain}


@pytest.mark.slow
def test_identical_units_share_one_forward_and_one_backward_graph():
    counts = [
        trained(lambda n=n: Stack(Block, n), microbatches=1, backend="eager", by_unit=True)[0].units.compiled
        for n in (2, 5)
    ]
    assert counts == [2, 2]
    graph = trained(MODELS["blocks"], backend="eager", by_unit=True)[0].units.graphs
    assert "native_layer_norm.default" in graph[0]
    assert "native_layer_norm_backward" in graph[1]


def test_a_model_without_units_is_compiled_as_a_whole():
    step, found = trained(lambda: nn.Linear(5, 1), backend="eager", by_unit=True)
    assert found == trained(lambda: nn.Linear(5, 1))[1]
    assert step.units.compiled == 0
    assert step.grads._entries


# --- what a unit may not do -------------------------------------------------------------------------------------------

CAPTURED = torch.ones(8)


class Capturing(Block):
    def forward(self, x):
        return super().forward(x) * CAPTURED


class Leaving(Block):
    def forward(self, x):
        y = super().forward(x)
        self.seen = y.mean()
        return y


class Listing(Block):
    def __init__(self, number):
        super().__init__(number)
        self.seen = []

    def forward(self, x):
        y = super().forward(x)
        self.seen.append(y.mean())
        return y


class Reading(Block):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(2 * x)


class Drawing(Block):
    """Draws by hand from the generator of the host."""

    def forward(self, x):
        import random

        return super().forward(x) * (1 + random.random())


class Writing(Block):
    """Writes into what it is given, as layers of transformers write into a cache."""

    def forward(self, x, more):
        y = super().forward(x)
        more.append(y.detach())
        return y


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unit", "said"),
    [
        (Capturing, "uses a tensor that is not among its arguments"),
        (Leaving, "a unit leaves something behind\n  where:   blocks.0: seen"),
        (Listing, "a unit leaves something behind\n  where:   blocks.0: seen"),
        (Reading, "the function asks for the value of a traced tensor"),
        (Drawing, "the function draws from Python's random"),
    ],
)
def test_a_unit_that_cannot_be_cut_out_runs_as_it_is(unit, said, caplog):
    def mixed():
        model = Stack(Block)
        model.blocks[0] = unit(0)
        return model

    step, found = trained(mixed, backend="eager", by_unit=True)
    assert found == trained(mixed)[1]
    assert step.units.compiled == 4  # the other units
    assert said in step.refusals[0]
    assert "the unit blocks.0 of Step runs uncompiled" in caplog.text


class Seen:
    """An object that a unit may write into."""

    def __init__(self):
        self.values = []
        self.append = self.values.append


class Unhashed(Seen):
    __hash__ = None


class Passing(Stack):
    def __init__(self, kind):
        super().__init__(Writing, 2)
        self.kind = kind

    def forward(self, x):
        x, more = self.embed(x), self.kind()
        for block in self.blocks:
            x = block(x, more)
        return self.head(x + sum(more if isinstance(more, list) else more.values))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Seen, "a unit takes an object that it may write into"),
        pytest.param(list, "a list or dict among its arguments", marks=pytest.mark.slow),
        pytest.param(Unhashed, "a unit takes an object that it may write into", marks=pytest.mark.slow),
    ],
)
def test_a_unit_that_writes_into_an_argument_runs_as_it_is(kind, said):
    step, found = trained(lambda: Passing(kind), backend="eager", by_unit=True)
    assert found == trained(lambda: Passing(kind))[1]
    assert step.units.compiled == 0
    assert len(step.refusals) == 2  # of each block once, however often it is called
    assert said in step.refusals[0]


@pytest.mark.slow
def test_the_model_is_left_as_it_was():
    model = Stack(Block)
    before = [dict(vars(m)) for m in model.modules()]
    state = ps.init(model, TX, seed=1)
    step = ps.jit(ps.make_step(loss_fn, TX), backend="eager", by_unit=True)
    inner = state.model.module
    step(state, next(batches()))
    assert step.units.compiled == 2
    assert [set(vars(m)) for m in inner.modules()] == [set(b) for b in before]


def test_a_warm_up_ends_with_units_that_are_compiled(rounding):
    """Before it units run as they are, and then they round as they do without a warm-up."""
    step, plain = (ps.make_step(loss_fn, TX, microbatches=2) for _ in range(2))
    model = functools.partial(Stack, Normed, 1)
    warmed = ps.jit(step, backend="eager", by_unit=True, warmup=1)
    states = [ps.init(model, TX, seed=1) for _ in range(2)]
    for i, batch in enumerate(batches(2)):
        states = [one(state, batch)[0] for one, state in zip((warmed, plain), states, strict=True)]
        assert (ps.digest(states[0]) == ps.digest(states[1])) == (i == 0)
    assert warmed.compiled.units.compiled == 4
    assert "by_unit=True, warmup=1" in repr(warmed)


def test_the_memory_of_a_step_is_that_of_units_or_of_the_whole_model():
    """A microbatch that is one graph has all parameters and gradients whole at once."""
    with torch.device("meta"):
        state = ps.init(lambda: Stack(functools.partial(Block, width=8), 8), TX)
    step = ps.make_step(loss_fn, TX, plan=fsdp())
    batch = {"x": torch.ones(8, 5), "y": torch.ones(8, 1)}
    plain, units, whole = (
        ps.step_memory(made, state, batch, {"fsdp": 4})
        for made in (ps.donate(step), ps.jit(step, donate=True, by_unit=True), ps.jit(step, donate=True))
    )
    assert units.memory == plain.memory
    size = 4 * sum(p.numel() for p in state.params.values())
    assert plain.memory.get("gathered", 0) < 0.5 * size
    assert whole.memory["gathered"] == size - 4  # the bias of the head, one number, is not split
    assert whole.sent["gather"] * 2 == units.sent["gather"] == plain.sent["gather"]


def test_only_a_step_of_make_step_that_one_rank_computes_has_units():
    with pytest.raises(ConfigError, match="only a step of make_step is compiled unit by unit"):
        ps.jit(lambda state, batch: state, by_unit=True)
    plan = ps.sharding.tensor_parallel({"up.weight": ps.sharding.Spec("tensor")}, 2)
    with pytest.raises(ConfigError, match="have no units that could be compiled each by itself"):
        ps.jit(ps.make_step(loss_fn, TX, plan=plan), by_unit=True)


# --- the halves -------------------------------------------------------------------------------------------------------


def test_nothing_computed_from_parameters_alone_is_saved():
    def function(inputs):
        weight, x = inputs
        return [torch.tanh(x @ (weight / weight.norm()).T)]

    weight, x = torch.randn(3, 4), torch.randn(2, 4)
    halves = joint(function, [weight, x], [True, True], 1, paths=lambda: ["weight", "x"], static=[])
    assert halves.saved_inputs == (0, 1)
    assert halves.saved == (0,)  # tanh, which is the result itself
    assert len(halves.forward.nodes()[2]) == 1


def test_a_result_that_is_a_view_of_what_is_saved_is_copied():
    def function(inputs):
        (x,) = inputs
        y = torch.tanh(x)
        return [y.view(-1), x, y.square().view(-1)]

    x = torch.randn(2, 4)
    halves = joint(function, [x], [True], 0, paths=lambda: ["x"], static=[])
    run = backends.compile(halves.forward, "eager", None, donated=0)
    first, same, squared, *_ = run([x])
    saved = run([x])[halves.saved[0]]
    assert torch.equal(same, x)
    assert same.data_ptr() != x.data_ptr()
    assert torch.equal(first, torch.tanh(x).view(-1))
    assert first.data_ptr() != saved.data_ptr()
    assert halves.views == {2}
    assert torch.equal(squared, torch.tanh(x).square().view(-1))
