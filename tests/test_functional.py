"""Pure calls of modules: nothing of the module changes, and the numbers are those of the module itself."""

from __future__ import annotations

import copy
import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F
from shared_models import Tied
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import purestep as ps
from purestep import random, tree
from purestep.errors import RandomnessError, StepError
from purestep.functional import Definition, apply, bind, checkpoint, slots


def tensors(module):
    return dict(module.named_parameters()), dict(module.named_buffers())


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a
        self.c = nn.Sequential(self.a, nn.Tanh(), self.a)

    def forward(self, x):
        return self.c(self.b(x))


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple


class HuggingFaceStyle(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.body = kind, nn.Linear(4, 3)

    def forward(self, input, scale=1.0):
        logits = self.body(input) * scale
        return Output(logits, (input,)) if self.kind == "dataclass" else {"logits": logits, "hidden": (input,)}


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.rnn = kind(4, 3, num_layers=2, batch_first=True, **options)

    def forward(self, x):
        return self.rnn(x.reshape(-1, 1, 4))[0]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = x.reshape(-1, 1, 4)
        return self.attention(x, x, x)[0]


MODELS = {
    "linear": lambda: nn.Linear(4, 3),
    "batchnorm": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.BatchNorm1d(5, momentum=None)),
    "tied": Tied,
    "shared": Shared,
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh()),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh()),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
    "lstm": Recurrent,
    "gru": lambda: Recurrent(nn.GRU, bidirectional=True),
    "attention": Attention,
    "dict": lambda: HuggingFaceStyle("dict"),
    "dataclass": lambda: HuggingFaceStyle("dataclass"),
}


def fingerprint(module):
    """All that a call must not change: tensors by identity and bits, flags, hooks, attributes."""
    seen = []
    for m in module.modules():
        values = {**m._parameters, **m._buffers}
        seen.append((m.training, list(values), [id(t) for t in values.values()], list(m._modules), sorted(vars(m))))
        seen.append([len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)])
        seen.append([id(w) for w in getattr(m, "_flat_weights", [])])
    return seen, tree.digest(dict(module.state_dict())), [p.requires_grad for p in module.parameters()]


def logits_of(out):
    if isinstance(out, dict):
        return out["logits"]
    return getattr(out, "logits", out)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("train", [True, False])
def test_a_pure_call_gives_what_the_module_gives_and_changes_nothing(name, train, seed):
    model = MODELS[name]()
    twin = copy.deepcopy(model).train(train)
    params, buffers = tree.map(lambda t: t.detach().clone(), tensors(model))
    before, digests = fingerprint(model), (tree.digest(params), tree.digest(buffers))
    for _ in range(2):
        x = torch.randn(6, 4)
        out, new = apply(model, params, buffers, x, train=train)
        assert torch.equal(logits_of(out), logits_of(twin(x)))
        assert not tree.diff(new, dict(twin.named_buffers()))
        assert fingerprint(model) == before
        assert (tree.digest(params), tree.digest(buffers)) == digests
        assert not any(t.requires_grad for t in new.values())
        twin.load_state_dict({**params, **buffers}, strict=False)
        if not train:
            assert all(torch.equal(new[n], buffers[n]) for n in new)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_backward(name, seed):
    model = MODELS[name]()
    params, buffers = tensors(model)
    x = torch.randn(6, 4)
    grads, _ = ps.grad_and_value(lambda p: logits_of(apply(model, p, buffers, x)[0]).square().mean())(params)
    twin = copy.deepcopy(model)
    logits_of(twin(x)).square().mean().backward()
    for key, p in twin.named_parameters():
        torch.testing.assert_close(grads[key], torch.zeros_like(p) if p.grad is None else p.grad)
    assert all(p.grad is None for p in model.parameters())


def test_other_values_than_the_modules_own_are_used():
    model = Tied()
    params, _ = tensors(model)
    assert list(params) == ["embed.weight"]
    doubled = {n: 2 * p for n, p in params.items()}
    x = torch.randn(5)
    out, _ = apply(model, doubled, {}, x)
    torch.testing.assert_close(out, 4 * model(x))
    rnn = Recurrent()
    zeros = {n: torch.zeros_like(p) for n, p in rnn.named_parameters()}
    assert (apply(rnn, zeros, {}, torch.ones(4))[0] == 0).all()


@pytest.mark.parametrize("where", ["forward", "loss"])
def test_after_an_exception_everything_is_back(where):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.rnn, self.dropout = nn.BatchNorm1d(4), nn.LSTM(4, 4), nn.Dropout(0.5)

        def forward(self, x):
            x = self.dropout(self.norm(x))
            if where == "forward":
                raise RuntimeError("mine")
            return x

    model = Fails().eval()
    before = fingerprint(model)

    def call():
        with bind(model, *tensors(model), rng=random.key(0)) as net:
            net(torch.randn(3, 4))
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        call()
    assert fingerprint(model) == before
    generator = torch.get_rng_state()
    torch.rand(1)  # the mode is off again
    assert not torch.equal(torch.get_rng_state(), generator)
    with pytest.raises(RandomnessError, match="no key"):
        apply(model, *tensors(model), torch.randn(3, 4))


class Surroundings:
    """A context that fails where it is told to."""

    def __init__(self, fails):
        self.fails, self.left = fails, None

    def __enter__(self):
        if self.fails == "enter":
            raise RuntimeError("mine")

    def __exit__(self, *error):
        self.left = error
        if self.fails == "exit":
            raise RuntimeError("mine")


@pytest.mark.parametrize("fails", ["make", "enter", "exit", "buffers", "mode in", "mode out", "generators"])
def test_a_binding_that_cannot_be_entered_or_left_leaves_nothing_bound(fails, monkeypatch):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.LSTM(4, 4)).eval()
    before, (params, buffers) = fingerprint(model), tensors(model)
    around = Surroundings(fails)

    def broken(*arguments):
        raise RuntimeError("mine")

    bound = bind(model, params, buffers, rng=random.key(0), around=broken if fails == "make" else lambda: around)
    if fails == "buffers":
        bound.given["0.running_mean"] = type("Bad", (), {"clone": broken})()
    elif fails in ("mode in", "mode out"):
        name = "__enter__" if fails == "mode in" else "__exit__"
        monkeypatch.setattr(ps.random.torch_mode.KeyedRandom, name, broken)
    elif fails == "generators":
        monkeypatch.setattr(ps.random.host_draws.Guard, "enter", broken)
    with pytest.raises(RuntimeError, match="mine"), bound:
        pass
    monkeypatch.undo()
    if fails == "mode out":
        torch.overrides._pop_mode()  # what the broken exit left
    assert fingerprint(model) == before
    assert fails not in ("mode in", "mode out") or around.left is not None
    done = threading.Thread(target=lambda: apply(model, params, buffers, torch.zeros(3, 4), rng=random.key(0)))
    done.start()  # another thread gets the lock
    done.join(20)
    assert not done.is_alive()
    with bind(model, params, buffers):  # and the next binding is the innermost one
        assert len(ps.functional.active.stack()) == 1


def test_flags_of_submodules_are_respected_in_training_mode():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[0].eval()
    params, buffers = tensors(model)
    _, new = apply(model, params, buffers, torch.randn(5, 3))
    assert torch.equal(new["0.running_mean"], buffers["0.running_mean"])
    assert not torch.equal(new["1.running_mean"], buffers["1.running_mean"])
    model.eval()
    _, new = apply(model, params, buffers, torch.randn(5, 3), train=True)
    assert not torch.equal(new["0.running_mean"], buffers["0.running_mean"])
    assert not model.training
    model.train()
    model[1].eval()
    _, new = apply(model, params, buffers, torch.randn(5, 3), train=False)
    assert all(torch.equal(new[n], buffers[n]) for n in buffers)
    assert [m.training for m in model.modules()] == [True, True, False]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: p.pop("0.weight"), r"missing: '0\.weight'"),
        (lambda p: p.update(extra=torch.ones(1)), r"unknown: 'extra'"),
        (lambda p: p.update(w=p.pop("0.weight")), r"missing: '0\.weight'; unknown: 'w'"),
    ],
)
def test_wrong_names_are_refused(change, text):
    model = nn.Sequential(nn.Linear(2, 2))
    params, _ = tensors(model)
    change(params)
    with pytest.raises(StepError, match=rf"do not fit the module Sequential(.|\n)*{text}(.|\n)*ps\.init\(model, tx\)"):
        apply(model, params, {}, torch.ones(1, 2))


def test_changes_of_the_module_after_its_first_use_are_noticed():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.randn(3, 2)

    def check():
        params, buffers = tensors(model)
        doubled = {n: 2 * p for n, p in params.items()}
        wanted = torch.func.functional_call(model, {**doubled, **buffers}, (x,))
        torch.testing.assert_close(apply(model, doubled, buffers, x)[0], wanted)

    check()
    model[1] = nn.Linear(2, 5)
    check()
    model.add_module("2", nn.Linear(5, 2))
    check()
    model[2].weight = nn.Parameter(torch.ones(2, 5))
    check()
    model[2].bias = None
    check()
    model[0].register_buffer("unused", torch.ones(1))
    check()
    del model[1:]
    check()
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    apply(tied, *tensors(tied), x)
    tied[1].weight = tied[0].weight
    torch.testing.assert_close(apply(tied, *tensors(tied), x)[0], tied(x))


def test_bindings_of_one_module_nest():
    model = nn.Linear(2, 2)
    params, _ = tensors(model)
    ones, twos = ({n: torch.full_like(p, v) for n, p in params.items()} for v in (1.0, 2.0))
    x = torch.ones(1, 2)
    with bind(model, ones) as net:
        first = net(x)
        with bind(model, twos) as inner:
            assert torch.equal(inner(x), 2 * first)
        assert torch.equal(net(x), first)
    assert model.weight is params["weight"]


def test_a_binding_entered_twice_starts_afresh():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    bound = bind(model, *tensors(model), rng=random.key(0))
    x = torch.randn(5, 3)
    with bound as net:
        a = net(x)
    first = bound.new_buffers
    bound.new_buffers = {}
    with bound as net:
        b = net(x)
    assert torch.equal(a, b)
    assert tree.equal(first, bound.new_buffers)


def test_threads_bind_one_module_in_turn():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
    params, buffers = tensors(model)
    sets = [{n: p.detach() * (i + 1) for n, p in params.items()} for i in range(4)]
    x = torch.randn(8, 3)

    def call(i):
        return apply(model, sets[i], buffers, x, rng=random.key(i))[0]

    expected, wrong = [call(i) for i in range(4)], []

    def work(i):
        for _ in range(60):
            if not torch.equal(call(i), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# --- definitions ------------------------------------------------------------------------------------------------------


def test_definitions_are_equal_when_the_architecture_is():
    def make(width=3, p=0.5, activation=F.relu, tag=1):
        model = nn.Sequential(nn.Linear(2, width), nn.Dropout(p))
        model.activation, model.tag = activation, tag
        return Definition(model)

    assert make() == make()
    assert hash(make()) == hash(make())
    others = [make(width=4), make(p=0.4), make(activation=F.gelu), make(tag=2)]
    assert all(make() != other for other in others)
    assert make() != 3
    assert repr(make()) == "<Sequential>"
    assert all(t.is_meta for t in make().module.parameters())


def test_a_definition_keeps_no_weights_and_shares_nothing():
    model = Tied()
    found = Definition(model)
    assert found.module.head.weight is found.module.embed.weight
    params, _ = tensors(model)
    model.embed.weight.data.zero_()
    assert slots(found.module).params.keys() == params.keys()


def test_the_older_weight_norm_with_its_computed_attribute():
    with pytest.warns(FutureWarning):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)))
    model(torch.ones(1, 3))
    definition = Definition(model)
    params, _ = tensors(model)
    x = torch.randn(4, 3)
    torch.testing.assert_close(apply(definition.module, params, {}, x)[0], model(x))


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, how, p=0.5, norm=True, depth=2):
        super().__init__()
        self.how = how
        self.first = nn.Dropout(p)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6) if norm else nn.Tanh(), nn.Dropout(p), nn.GELU())
        self.inner = Block(how, p, norm, depth - 1) if depth > 1 else nn.Linear(6, 6)

    def forward(self, x):
        x = self.first(x)

        def inside(x):
            return self.inner(self.body(x))

        return inside(x) if self.how is None else self.how(inside, x)


def run(how, p=0.5, norm=True):
    torch.manual_seed(0)
    model = Block(how, p, norm)
    params, buffers = tensors(model)
    x = torch.randn(7, 6)

    def loss(ps):
        out, new = apply(model, ps, buffers, x, rng=random.key(3))
        return out.square().mean(), new

    before = fingerprint(model)
    grads, (value, new) = ps.grad_and_value(loss, has_aux=True)(params)
    assert fingerprint(model) == before
    return grads, value, new


def plain_checkpoint(function, x):
    return torch_checkpoint(function, x, use_reentrant=False)


def test_a_checkpoint_changes_no_bit_with_dropout_and_batchnorm_also_nested():
    straight, recomputed = run(None), run(checkpoint)
    assert not tree.diff(straight, recomputed)


def test_torchs_checkpoint_works_without_randomness():
    for norm in (False, True):
        assert not tree.diff(run(None, 0.0, norm), run(plain_checkpoint, 0.0, norm))


def test_torchs_checkpoint_draws_what_the_forward_pass_drew():
    assert not tree.diff(run(None), run(plain_checkpoint))


def own_checkpoint(function, x):
    """A checkpoint of another library, as far as it matters: it calls the function again from the backward pass."""
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: (function(x), saved)[1]):
        return function(x)


def test_a_checkpoint_of_another_library_with_dropout_is_refused():
    with pytest.raises(RandomnessError, match=r"drawn in the backward pass(.|\n)*ps\.checkpoint\(block, x\)"):
        run(own_checkpoint)


@pytest.mark.parametrize("how", [checkpoint, plain_checkpoint, None])
def test_two_calls_with_other_tensors_in_one_loss(how):
    torch.manual_seed(1)
    model = Block(how, p=0.0, norm=False)
    params, _ = tensors(model)
    teacher = {n: 0.5 * p.detach() for n, p in params.items()}
    x = torch.randn(5, 6)

    def loss(ps):
        return (apply(model, ps, {}, x)[0] * apply(model, teacher, {}, x)[0]).mean()

    grads, _ = ps.grad_and_value(loss)(params)
    own, other = copy.deepcopy(model), copy.deepcopy(model)
    own.how = own.inner.how = other.how = other.inner.how = None
    other.load_state_dict(teacher)
    (own(x) * other(x)).mean().backward()
    for name, p in own.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)


class Writing(nn.Module):
    """Writes into its weight: by torch's own layers, or by hand."""

    def __init__(self, kind):
        super().__init__()
        layers = {"embedding": nn.Embedding(5, 3, max_norm=0.5), "bag": nn.EmbeddingBag(5, 3, max_norm=0.5)}
        self.layer, self.by_hand = layers.get(kind, nn.Embedding(5, 3)), kind == "by hand"

    def forward(self, x):
        if self.by_hand:
            with torch.no_grad():
                self.layer.weight.clamp_(-0.5, 0.5)
        return self.layer(x)


@pytest.mark.parametrize("kind", ["embedding", "bag", "by hand"])
def test_a_model_that_writes_into_its_parameters_is_refused(kind):
    batch = torch.tensor([[0, 1], [2, 2]])
    tx = ps.optim.sgd(0.1)
    state = ps.init(lambda: Writing(kind), tx, seed=3)
    before = ps.digest(state)
    data = [{"x": batch}] * 3
    with pytest.raises(StepError, match=r"writes into its parameters while it is called\n  where:   'layer.weight'"):
        ps.fit(ps.make_step(lambda net, b: net(b["x"]).square().mean(), tx), state, data, until=ps.steps(2))
    assert ps.digest(state) == before  # the check before the first step has no memory to write into
    with pytest.raises(StepError, match=r"F\.embedding"):
        ps.apply(Writing(kind), state.params, state.buffers, batch, train=False)


def test_a_call_on_fake_tensors_does_not_clear_a_model_that_writes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, batch = Writing("embedding"), torch.tensor([0, 1])
    params = dict(model.named_parameters())
    mode = FakeTensorMode()
    fakes, ids = {name: mode.from_tensor(p.detach()) for name, p in params.items()}, mode.from_tensor(batch)
    apply(model, fakes, {}, ids)
    with pytest.raises(StepError, match="writes into its parameters"):
        apply(model, {name: p.detach().clone() for name, p in params.items()}, {}, batch)
