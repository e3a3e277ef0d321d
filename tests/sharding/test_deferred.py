"""Deferred init: the tape computes what the constructors would have, part by part, under keys of the names."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import purestep as ps
from purestep import optim, random, tree
from purestep.errors import StepError
from purestep.precision.master_params import master_weights
from purestep.sharding.init_tape import recording
from purestep.state import _seeded


class Odd(nn.Module):
    """What constructors do: old-style tensors, constants, views, factorizations, values written into rows."""

    def __init__(self) -> None:
        super().__init__()
        self.old = nn.Parameter(torch.Tensor(3, 4))
        nn.init.kaiming_uniform_(self.old)
        self.constant = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]) * 0.1)
        self.drawn = nn.Parameter(torch.FloatTensor(5).uniform_(-1, 1))
        self.rows = nn.Parameter(torch.randn(6, 6))
        with torch.no_grad():
            self.rows[2].zero_()
            self.rows[:, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        self.rows.data.mul_(0.5)
        self.qr = nn.Parameter(torch.linalg.qr(torch.randn(5, 5))[0])
        self.eye = nn.Parameter(torch.empty(4, 4))
        nn.init.eye_(self.eye)
        self.sparse = nn.Parameter(torch.empty(4, 8))
        nn.init.sparse_(self.sparse, 0.3)
        reused = torch.tensor([1.0, 2.0, 3.0])
        self.first = nn.Parameter(torch.empty(3))
        self.first.data.copy_(reused)
        reused.zero_()
        self.register_buffer("mask", torch.tril(torch.ones(4, 4)))
        self.register_buffer("inverse", 1.0 / (10000 ** (torch.arange(0, 8, 2).float() / 8)))


def initialised(function, *args):
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
    for p in model.parameters():
        function(p, *args) if p.dim() > 1 else nn.init.zeros_(p)
    return model


def tied():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Embedding(7, 3, padding_idx=1)),
    "odd": Odd,
    "orthogonal": lambda: initialised(nn.init.orthogonal_),
    "dirac": lambda: nn.Sequential(nn.Conv1d(4, 4, 3, bias=False)),
    "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose1d(2, 3, 2), nn.GroupNorm(2, 4)),
    "attention": lambda: nn.Sequential(nn.MultiheadAttention(8, 2), nn.Bilinear(2, 3, 4), nn.PReLU(), nn.GRUCell(3, 4)),
    "lstm": lambda: nn.LSTM(3, 4, 2, bidirectional=True),
    "copied": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)),
    "tied": tied,
}
TX = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_whole_tape_replayed_in_order_is_the_plain_init(make, seed):
    """With the one stream of random numbers that a constructor draws from, each operation has to give its bits."""
    seed %= 1000
    plain = ps.init(make, TX, seed=seed)
    key = random.fold_in(random.key(seed), "init")
    with _seeded(key), torch.no_grad():
        with recording(key) as tape:
            model = make()
            tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        held: dict[int, torch.Tensor] = {}
        for op in tape.ops:
            tape.replay(op, held)
        replayed = {n: tape.window(held, tape._ref(t)).clone() for n, t in tensors.items() if t.is_meta}
        replayed |= {n: t.detach() for n, t in tensors.items() if n not in replayed}
    expected = {**plain.params, **plain.buffers}
    assert replayed.keys() == expected.keys()
    assert not ps.diff({n: expected[n] for n in replayed}, replayed)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_deferred_states_have_the_structure_of_plain_ones(make):
    plain, one, two = (ps.init(make, TX, seed=3, deferred=d) for d in (False, True, True))
    assert ps.digest(one) == ps.digest(two)
    # Every parametrized module has a class of its own.
    assert tree.structure(plain.replace(model=None)) == tree.structure(one.replace(model=None))
    for name, a, b in zip(tree.names(plain), tree.leaves(plain), tree.leaves(one), strict=True):
        assert tree.describe(a) == tree.describe(b), name
        assert b.device.type == "cpu"
        assert b.stride() == a.stride()
        assert not b.requires_grad
    # What is not drawn at random has the bits of the plain init.
    exact = [n for n in ("constant", "eye", "first") if n in plain.params]
    assert all(torch.equal(plain.params[n], one.params[n]) for n in exact)
    assert ps.tree.equal(plain.opt_state, one.opt_state)
    assert ps.digest(ps.init(make, TX, seed=4, deferred=True)) != ps.digest(one)


def test_the_bits_of_a_parameter_depend_on_its_name_and_the_seed_alone():
    """Not on layers before it, not on whether it is trained."""
    alone = ps.init(lambda: nn.ModuleDict({"head": nn.Linear(5, 3)}), TX, seed=1, deferred=True)
    model = lambda: nn.ModuleDict({"body": nn.Linear(9, 5), "head": nn.Linear(5, 3)})  # noqa: E731
    more = ps.init(model, TX, seed=1, deferred=True)
    frozen = ps.init(model, TX, seed=1, deferred=True, frozen="head.*")
    for name in ("head.weight", "head.bias"):
        assert torch.equal(alone.params[name], more.params[name])
        assert torch.equal(alone.params[name], frozen.buffers[name])
    assert not torch.equal(more.params["body.weight"].reshape(-1)[:15], more.params["head.weight"].reshape(-1))


def test_random_numbers_shared_by_tensors_stay_shared():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            both = torch.randn(2, 4)
            self.a, self.b = nn.Parameter(both[0].clone()), nn.Parameter(both[1] * 2)
            self.c = nn.Parameter(both.sum(0))

    p = ps.init(Pair, TX, seed=0, deferred=True).params
    assert torch.equal(p["c"], p["a"] + p["b"] / 2)


def test_copies_of_a_layer_start_alike_as_in_torch():
    p = ps.init(MODELS["copied"], TX, seed=0, deferred=True).params
    assert torch.equal(p["layers.0.linear1.weight"], p["layers.1.linear1.weight"])


def test_master_weights_and_averages_are_those_of_the_parameters():
    lifted = optim.lift(torch.optim.SGD, lr=0.1, momentum=0.9)  # it compares two steps, by their values
    for tx in (master_weights(optim.adamw(1e-3)), optim.lookahead(optim.adamw(1e-3), sync_period=2), lifted):
        state = ps.init(MODELS["mlp"], tx, seed=0, deferred=True)
        again = tx.init(state.params)
        assert ps.tree.equal(state.opt_state, again)


@pytest.mark.parametrize("seed_of_run", [0, 1])
def test_initialisers_that_look_at_values_are_right(seed_of_run):
    """torch leaves meta tensors alone in them, which would be seen as uninitialised memory."""
    p = ps.init(lambda: initialised(nn.init.orthogonal_), TX, seed=seed_of_run, deferred=True).params
    w = p["0.weight"]
    assert torch.allclose(w.T @ w, torch.eye(4), atol=1e-5)
    big = lambda: nn.Sequential(nn.Linear(50, 80))  # noqa: E731

    def truncated():
        model = big()
        nn.init.trunc_normal_(model[0].weight, std=0.02, a=-0.03, b=0.03)
        return model

    w = ps.init(truncated, TX, seed=seed_of_run, deferred=True).params["0.weight"]
    assert float(w.abs().max()) <= 0.03
    assert 0.012 < float(w.std()) < 0.017


def test_values_that_are_asked_for_are_computed_then():
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.scale = self.w.detach().norm().item()
            with torch.no_grad():
                self.w.div_(self.scale)
            self.kept = nn.Parameter(self.w.detach()[self.w.detach() > 0])
            self.read = self.w.tolist()
            self.seen = np.asarray(self.w.detach()).copy(), self.w.detach().numpy().copy()

    state = ps.init(Asking, TX, seed=0, deferred=True)
    p, made = state.params, state.model.module
    assert made.read == p["w"].tolist()
    assert all(np.array_equal(x, p["w"].numpy()) for x in made.seen)
    assert math.isclose(float(p["w"].norm()), 1.0, rel_tol=1e-5)
    assert torch.equal(p["kept"], p["w"][p["w"] > 0])


def test_nobody_else_is_moved():
    before = torch.random.get_rng_state()
    original = nn.init._no_grad_trunc_normal_ if hasattr(nn.init, "_no_grad_trunc_normal_") else None
    ps.init(MODELS["mlp"], TX, seed=0, deferred=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert getattr(nn.init, "_no_grad_trunc_normal_", None) is original
    assert not torch.empty(2).is_meta
    with recording(random.key(0)) as tape:
        drawn = torch.randn(3)
    assert not torch.equal(tape.value(drawn), torch.zeros(3))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_cannot_be_deferred_says_so():
    with pytest.raises(StepError, match="deferred init needs a function that makes the model") as caught:
        ps.init(nn.Linear(2, 2), TX, deferred=True)
    assert "lambda: Model(config)" in str(caught.value)

    real = torch.zeros(3)

    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3))
            real.copy_(self.w.detach())

    with pytest.raises(StepError, match=r"torch.ops.aten.copy_") as caught:
        ps.init(Writing, TX, deferred=True)
    assert "a tensor that was made elsewhere" in str(caught.value)
    assert "which makes the whole model on every rank" in str(caught.value)


def test_only_what_leads_to_a_tensor_is_replayed():
    """Of weights that are drawn twice, the first draw is skipped; of others, nothing is computed."""
    key = random.key(0)
    with recording(key) as tape:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        for p in model.parameters():
            nn.init.normal_(p)
    names = [tape.ops[i].function.__name__ for i in tape._leading_to(model[1].weight)]
    assert names == ["empty.memory_format", "normal_.default"]
