"""Activation checkpoints of torch in third-party models: the bits of the model without them, in less memory."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import types
import warnings

import pytest
import torch
import torch.utils.checkpoint
from shared_marks import slow_but
from torch import nn
from torch.nn.functional import dropout, mse_loss, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint as imported_by_name
from torch.utils.checkpoint import checkpoint_sequential

import purestep as ps
from purestep import _torch
from purestep.errors import StepError

TX = ps.optim.adam(1e-2)
BATCH = {"x": torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), "y": torch.zeros(8, 6)}


def default(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the form is not said
        return imported_by_name(function, *args)


FORMS = {
    "reentrant": functools.partial(imported_by_name, use_reentrant=True),
    "not reentrant": functools.partial(imported_by_name, use_reentrant=False),
    "default": default,
    "no generators": functools.partial(imported_by_name, use_reentrant=True, preserve_rng_state=False),
    "by attribute": lambda function, *args: torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True),
    "ours": ps.checkpoint,
}
every_form = pytest.mark.parametrize("form", FORMS)
both_forms = pytest.mark.parametrize("form", ["reentrant", "not reentrant"])


class Layer(nn.Module):
    """As the layers of transformers have it: the call is checkpointed, with keyword arguments bound to it."""

    checkpointing = None

    def __init__(self, p, width=6):
        super().__init__()
        self.first, self.norm, self.last = (
            nn.Linear(width, 4 * width),
            nn.BatchNorm1d(4 * width),
            nn.Linear(4 * width, width),
        )
        self.p = p

    def __call__(self, *args, **kwargs):
        if self.checkpointing is not None and self.training:
            return self.checkpointing(functools.partial(super().__call__, **kwargs), *args)
        return super().__call__(*args, **kwargs)

    def forward(self, x, scale=1.0):
        return x + scale * dropout(self.last(torch.tanh(self.norm(self.first(x)))), self.p, self.training)


class Net(nn.Module):
    def __init__(self, form=None, p=0.3, depth=3, width=6, layer=Layer):
        super().__init__()
        self.embed, self.layers = nn.Linear(width, width), nn.ModuleList(layer(p, width) for _ in range(depth))
        self.drop = nn.Dropout(p)
        for module in self.layers:
            module.checkpointing = FORMS.get(form, form)

    def forward(self, x):
        x = self.drop(self.embed(x))
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return self.drop(x)


def loss_fn(net, batch):
    return mse_loss(net(batch["x"]), batch["y"])


def trained(make, run=lambda step: step, steps=2, policy="32", **options):
    p = ps.precision.policy(policy)
    step = ps.make_step(loss_fn, TX, policy=p, **options)
    state, called, metrics = p.apply(ps.init(make, TX, seed=0)), run(step), None
    for _ in range(steps):
        state, metrics = called(state, BATCH)
    return state.params, state.buffers, state.opt_state, metrics


jit_eager = functools.partial(ps.jit, backend="eager")


@functools.cache
def plain(p=0.3, **options):
    """What the step of the model without checkpoints comes to."""
    return trained(lambda: Net(None, p), **options)


@every_form
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("microbatches", [None, 2])
def test_a_step_has_the_bits_of_the_model_without_checkpoints(form, p, microbatches):
    assert not ps.diff(trained(lambda: Net(form, p), microbatches=microbatches), plain(p, microbatches=microbatches))


@pytest.mark.parametrize(
    ("form", "p"),
    [
        ("ours", 0.3),
        pytest.param("reentrant", 0.0, marks=pytest.mark.slow),
        pytest.param("reentrant", 0.3, marks=pytest.mark.slow),
        pytest.param("not reentrant", 0.3, marks=pytest.mark.slow),
    ],
)
def test_so_has_a_compiled_step(form, p):
    assert not ps.diff(trained(lambda: Net(form, p, depth=1), run=jit_eager), trained(lambda: Net(None, p, depth=1)))


@both_forms
@pytest.mark.parametrize("policy", ["bf16-mixed", "16-mixed", "bf16-true", "bf16-mixed autocast"])
def test_under_a_precision_policy_and_a_loss_scale(form, policy):
    name, _, autocast = policy.partition(" ")
    options = {"policy": ps.precision.policy(name, autocast=bool(autocast)), "microbatches": 2}
    assert not ps.diff(trained(lambda: Net(form), **options), plain(**options))


@pytest.mark.slow
def test_compiled_under_a_precision_policy():
    options = {"policy": "16-mixed", "steps": 1}
    assert not ps.diff(
        trained(lambda: Net("reentrant", depth=1), run=jit_eager, **options), trained(lambda: Net(depth=1), **options)
    )


class Attention(Layer):
    """Its handlers call functions that a policy handles, too."""

    def forward(self, x, scale=1.0):
        weights = torch.softmax(self.first(x), -1) @ self.first.weight
        return (
            x
            + scale
            * scaled_dot_product_attention(x[None], self.last(self.first(x))[None], weights[None], dropout_p=self.p)[0]
        )


@both_forms
@pytest.mark.parametrize("policy", ["32", "bf16-mixed", "16-true"])
def test_attention_with_dropout(form, policy):
    options = {"policy": policy, "steps": 1}
    assert not ps.diff(
        trained(lambda: Net(form, layer=Attention), **options), trained(lambda: Net(layer=Attention), **options)
    )


@pytest.mark.slow
@both_forms
def test_inductor_compiles_it(form):
    fast, straight = (trained(lambda f=f: Net(f, depth=1), run=ps.jit) for f in (form, None))
    assert not ps.diff(fast, straight)


@pytest.mark.parametrize("outer", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("inner", slow_but(["reentrant", "not reentrant", "ours"], "not reentrant", "ours"))
def test_nested(outer, inner):
    class Outer(nn.Module):
        def __init__(self, outer, inner, p, depth=3):
            super().__init__()
            self.net, self.drop, self.outer = Net(inner, p, depth), nn.Dropout(p), FORMS.get(outer)

        def forward(self, x):
            inside = lambda x: self.net(self.drop(x)) * 2  # noqa: E731
            return inside(x) if self.outer is None else self.outer(inside, x)

    straight = trained(lambda: Outer(None, None, 0.3), steps=1)
    assert not ps.diff(trained(lambda: Outer(outer, inner, 0.3), steps=1), straight)
    if inner == outer == "reentrant":
        assert not ps.diff(
            trained(lambda: Outer(outer, inner, 0.3, depth=1), jit_eager, steps=1),
            trained(lambda: Outer(None, None, 0.3, depth=1), steps=1),
        )


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_sequence_in_segments(reentrant):
    class Stack(nn.Sequential):
        segments = 0

        def forward(self, x):
            return (
                checkpoint_sequential(self, self.segments, x, use_reentrant=reentrant)
                if self.segments
                else super().forward(x)
            )

    def make(segments):
        model = Stack(*[m for _ in range(4) for m in (nn.Linear(6, 6), nn.Dropout(0.3), nn.Tanh())])
        model.segments = segments
        return model

    assert not ps.diff(trained(lambda: make(3)), trained(lambda: make(0)))


def test_arguments_that_are_no_tensors_several_results_and_selected_operators():
    """What torch's own takes besides: keywords, nested arguments, contexts of selective checkpoints, no check."""
    from torch.utils.checkpoint import create_selective_checkpoint_contexts as contexts

    def block(x, other, flag, *, scale=1.0):
        return dropout(x @ other["w"], 0.5) * scale, flag, x.sum()

    selective = functools.partial(contexts, [torch.ops.aten.mm.default])
    forms = [
        None,
        functools.partial(imported_by_name, use_reentrant=False, scale=2.0, determinism_check="none"),
        functools.partial(imported_by_name, use_reentrant=False, scale=2.0, context_fn=selective),
        functools.partial(imported_by_name, use_reentrant=False, scale=2.0, early_stop=False),
        lambda f, *args: imported_by_name(functools.partial(f, scale=2.0), *args, use_reentrant=True),
    ]

    class Mixed(nn.Module):
        form = None

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.eye(6))

        def forward(self, x):
            call = functools.partial(block, scale=2.0) if self.form is None else functools.partial(self.form, block)
            out, flag, total = call(x * self.w[0], {"w": self.w}, "text")
            assert flag == "text"
            return out + total

    found = []
    for form in forms:
        model = Mixed()
        model.form = form
        found.append(trained(lambda model=model: model))
    for other in found[1:]:
        assert not ps.diff(other, found[0])


@both_forms
def test_an_input_without_gradient_loses_none(form):
    """The reentrant form of torch gives the parameters no gradient then."""

    class First(nn.Module):
        def __init__(self, form):
            super().__init__()
            self.layer = Layer(0.3)
            self.layer.checkpointing = FORMS.get(form)

        def forward(self, x):
            return self.layer(x)

    assert not ps.diff(trained(lambda: First(form)), trained(lambda: First(None)))


@both_forms
@pytest.mark.parametrize("engine", ["func", "vmap"])
def test_inside_of_a_transform_of_torch_func(form, engine):
    """Its layers have no batch norm, whose buffers vmap would have to count."""

    class Plain(Layer):
        def forward(self, x, scale=1.0):
            return x + scale * dropout(self.last(torch.tanh(self.first(x))), self.p, self.training)

    def mapped(step):
        def call(state, batch):
            stacked = ps.tree.map(lambda x: torch.stack([x, x]), state)
            return torch.func.vmap(step, in_dims=(0, None))(stacked, batch)

        return call

    options = {"engine": "func"} if engine == "func" else {"run": mapped}
    made, straight = (trained(lambda f=f: Net(f, layer=Plain), steps=1, **options) for f in (form, None))
    assert not ps.diff(made, straight)


@both_forms
def test_evaluation_and_a_pure_call_with_a_backward_pass_of_its_own(form):
    state = ps.init(lambda: Net(form), TX, seed=0)
    value = ps.make_eval(loss_fn)(state, BATCH)["loss"].compute()
    assert value == ps.make_eval(loss_fn)(ps.init(Net, TX, seed=0), BATCH)["loss"].compute()
    grads = []
    for f in (form, None):
        model = ps.init(lambda f=f: Net(f), TX, seed=0).model
        params = {n: p.clone().requires_grad_() for n, p in state.params.items()}
        out, _ = ps.apply(model.module, params, state.buffers, BATCH["x"], rng=ps.random.key(1))
        out.square().mean().backward()
        grads.append({n: p.grad for n, p in params.items()})
    assert not ps.diff(*grads)


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_bytes(call):
    """Return the most memory that was allocated during a call, beyond what was before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("run", [lambda step: step, jit_eager], ids=["eager", "jit"])
def test_peak_memory_falls(run):
    # A compiled step takes long to trace.
    forms, depth = (
        ((None, "reentrant", "not reentrant", "ours"), 8) if run is not jit_eager else ((None, "reentrant"), 4)
    )
    batch = {"x": torch.randn(2048, 16), "y": torch.zeros(2048, 16)}
    peaks = {}
    for form in forms:
        state = ps.init(lambda form=form: Net(form, 0.1, depth=depth, width=16), ps.optim.sgd(0.1), seed=0)
        step = run(ps.make_step(loss_fn, ps.optim.sgd(0.1)))
        step(state, batch)
        peaks[form] = peak_bytes(lambda step=step, state=state: step(state, batch))
    assert peaks["reentrant"] < 0.5 * peaks[None]
    assert max(abs(peaks[form] - peaks["reentrant"]) for form in forms[1:]) < 0.05 * peaks[None]


# --- nothing outlives a call ------------------------------------------------------------------------------------------


@pytest.fixture
def own_functions():
    """What torch has in its module, which has to be there again afterwards."""
    from torch.distributed._composable import checkpoint_activation

    def present():
        module = torch.utils.checkpoint
        generator = _torch.CHECKPOINT_GENERATOR
        return module.CheckpointFunction, getattr(module, generator), getattr(checkpoint_activation, generator)

    before = present()
    assert before[0].__module__ == "torch.utils.checkpoint"
    yield present
    assert present() == before


def test_torchs_functions_are_back_after_a_step_and_after_an_error(own_functions):
    before, inside = own_functions(), []

    def failing(net, batch):
        inside.append(own_functions())
        raise ValueError("halt")

    state = ps.init(Net, TX, seed=0)
    with pytest.raises(ValueError, match="halt"):
        ps.make_step(failing, TX)(state, BATCH)
    assert own_functions() == before
    assert all(a is not b for a, b in zip(inside[0], before, strict=True))
    trained(lambda: Net("reentrant"))
    assert own_functions() == before


def test_a_module_that_is_imported_meanwhile_has_torchs_function_afterwards(monkeypatch, own_functions):
    name = "torch.distributed._composable.checkpoint_activation"
    module = sys.modules[name]
    # As `from torch.utils.checkpoint import ...` does for the first time inside of a step.
    late = {_torch.CHECKPOINT_GENERATOR: None}

    def importing(net, batch):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**late))
        vars(sys.modules[name]).update({n: getattr(torch.utils.checkpoint, n) for n in late})
        return loss_fn(net, batch)

    monkeypatch.delitem(sys.modules, name)
    ps.make_step(importing, TX)(ps.init(Net, TX, seed=0), BATCH)
    (generator,) = vars(sys.modules[name]).values()
    assert generator is own_functions()[1] is vars(module)[_torch.CHECKPOINT_GENERATOR]


def test_another_thread_has_torchs_own_checkpoints_meanwhile(own_functions):
    """Two steps that overlap, and beside them a model that is trained by hand, with generators and grad fields."""
    gate, seen, errors = threading.Barrier(3, timeout=60), [], []

    def waiting(net, batch):
        gate.wait()
        out = loss_fn(net, batch)
        gate.wait()
        return out

    # Made before: init seeds the generators of the host, and a step that sees them move is called once more.
    states = [ps.init(lambda: Net("reentrant"), TX, seed=0) for _ in range(2)]

    def steps(state):
        try:
            seen.append(ps.make_step(waiting, TX)(state, BATCH))
        except BaseException as error:
            errors.append(error)
            gate.abort()

    threads = [threading.Thread(target=steps, args=(state,)) for state in states]
    for thread in threads:
        thread.start()
    gate.wait()
    with contextlib.ExitStack() as stack:
        stack.callback(gate.wait)
        layer, x = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)), BATCH["x"].clone().requires_grad_()
        grads = []
        for form in ("reentrant", "not reentrant", None):
            torch.manual_seed(0)
            out = layer(x) if form is None else FORMS[form](layer, x)
            (grad_fn,) = {type(out.grad_fn).__name__}
            assert (grad_fn == "CheckpointFunctionBackward") == (form == "reentrant")
            layer.zero_grad()
            out.sum().backward()
            grads.append(layer[0].weight.grad.clone())
        assert torch.equal(grads[0], grads[2])
        assert torch.equal(grads[1], grads[2])
    for thread in threads:
        thread.join(60)
    assert not errors
    assert len(seen) == 2
    assert not ps.diff(*seen)
    assert not ps.diff(seen[0], ps.make_step(loss_fn, TX)(ps.init(Net, TX, seed=0), BATCH))


def test_the_hooks_that_checkpoint_a_module_work_too(own_functions):
    from torch.distributed._composable.checkpoint_activation import checkpoint as checkpointed

    class Hooked(Net):
        def __init__(self):
            super().__init__()
            for layer in self.layers:
                checkpointed(layer)

    assert not ps.diff(trained(Hooked), trained(Net))


class Copied(torch.autograd.Function):
    """The reentrant form as other libraries copied it."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, grad):
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError("Checkpointing is not compatible with .grad(), please use .backward() if possible")
        raise AssertionError


def test_a_copy_of_the_reentrant_form_is_refused_in_our_words():
    with pytest.raises(StepError, match=r"not torch's own calls backward\(\)(.|\n)*ps\.checkpoint\(block, x\)"):
        trained(lambda: Net(Copied.apply))


def test_what_is_recomputed_otherwise_is_an_error():
    class Counting(Layer):
        calls = 0

        def forward(self, x, scale=1.0):
            self.calls += 1
            return super().forward(x if self.calls == 1 else torch.cat([x, x]), scale)[: len(x)]

    with pytest.raises(StepError, match="recomputed by a checkpoint differ from those of the forward pass"):
        trained(lambda: Net("reentrant", depth=1, layer=Counting))
