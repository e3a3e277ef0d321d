"""A graph whose repeated updates were cut out computes what the whole graph does."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.jit import backends, outline
from purestep.jit._torch import runnable
from purestep.jit.outline import outlined

WIDTHS = [3, 6, 6, 6, 6, 6, 2]  # five square weights but one, five biases of one size


def model():
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())], nn.BatchNorm1d(2))


def loss_fn(net, batch):
    return net(batch).square().mean()


@pytest.fixture
def cut(monkeypatch):
    """Runs the pieces of a graph operator by operator in place of a backend, and keeps how the graph was cut."""
    found = []

    def build(traced, mode):
        pieces = outlined(traced)
        found.append(pieces)
        forward = {
            id(t): runnable(t.graph).forward for t in (traced, *((pieces.rest, *pieces.kinds) if pieces else ()))
        }

        def called(traced):
            return lambda tensors: forward[id(traced)](*tensors)

        return called(traced) if pieces is None else pieces.run(called(pieces.rest), [*map(called, pieces.kinds)])

    monkeypatch.setitem(backends._BACKENDS, "eager", build)
    return found


OPTIMIZERS = {
    "adamw": ps.optim.adamw(1e-2),
    "clipped": ps.optim.chain(ps.optim.clip_by_global_norm(0.1), ps.optim.sgd(0.1, momentum=0.9, nesterov=True)),
    "averaged": ps.optim.chain(ps.optim.lion(1e-2, weight_decay=0.1), ps.optim.add_decayed_weights(0.1)),
    "scheduled": ps.optim.adam(ps.optim.cosine_decay_schedule(0.1, 10)),
}


def trained(step, tx):
    state = ps.init(model, tx, seed=0)
    metrics = None
    for batch in torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(2)):
        state, metrics = step(state, batch)
    return ps.digest((state, metrics))


@pytest.mark.parametrize(
    ("name", "donate"), [(name, True) for name in OPTIMIZERS] + [("adamw", False), ("clipped", False)]
)
def test_the_pieces_compute_what_the_step_does(cut, name, donate):
    tx = OPTIMIZERS[name]
    step = ps.make_step(loss_fn, tx)
    assert trained(ps.jit(step, donate=donate, backend="eager"), tx) == trained(step, tx)
    (pieces,) = cut
    assert len(pieces.uses) >= 8
    assert len(pieces.kinds) < len(pieces.uses) / 2
    assert {position for use in pieces.uses for position in use.last}.isdisjoint(pieces.returns)


def double(state, batch):
    """Each leaf is read by the next one's update, and the counter by all; nothing of it may be read too late."""
    names = sorted(state["params"])
    count = state["count"] + 1
    new = {
        name: state["params"][name] * batch + state["params"][names[i - 1]] * state["count"]
        for i, name in enumerate(names)
    }
    return {"params": new, "count": count}, {"sum": sum(new.values()).sum(), "old": state["params"]["0"] * 1.0}


@pytest.mark.parametrize("donate", [False, True])
def test_an_update_reads_no_leaf_that_another_has_written(cut, donate):
    state = {"params": {str(i): torch.arange(4.0) + i for i in range(6)}, "count": torch.tensor(2.0)}
    expected = double(state, torch.tensor(3.0))
    found = ps.jit(double, donate=donate, backend="eager")(ps.tree.map(torch.clone, state), torch.tensor(3.0))
    assert ps.digest(found) == ps.digest(expected)


def averaged(state, batch):
    """The average reads the old leaf, which the step overwrites; all leaves read one mask."""
    names = state["params"]
    average = {name: state["average"][name] * 0.9 + state["params"][name] * 0.1 for name in names}
    return {"params": {name: state["params"][name] - batch for name in names}, "average": average}, {}


@pytest.mark.parametrize("donate", [False, True])
def test_what_reads_an_old_leaf_belongs_to_what_writes_it(cut, donate):
    leaves = {str(i): torch.arange(4.0) + i for i in range(6)}
    state = {"params": leaves, "average": {name: leaf + 1 for name, leaf in leaves.items()}}
    batch = torch.tensor([1.0, 2.0, 0.5, 4.0])
    expected = averaged(state, batch)
    found = ps.jit(averaged, donate=donate, backend="eager")(ps.tree.map(torch.clone, state), batch)
    assert ps.digest(found) == ps.digest(expected)
    assert len(cut[0].uses) == (6 if donate else 12)


def scaled_by_counter(state, batch):
    new = {name: leaf * state["count"] for name, leaf in state["params"].items()}
    return {"params": new, "count": state["count"] + batch}, {}


def test_a_counter_that_the_rest_overwrites_keeps_its_readers_there(cut):
    state = {"params": {str(i): torch.arange(4.0) + i for i in range(6)}, "count": torch.tensor(2.0)}
    expected = scaled_by_counter(state, torch.tensor(3.0))
    found = ps.jit(scaled_by_counter, donate=True, backend="eager")(ps.tree.map(torch.clone, state), torch.tensor(3.0))
    assert ps.digest(found) == ps.digest(expected)
    assert cut == [None]


def test_large_leaves_stay_in_the_graph(cut, monkeypatch):
    monkeypatch.setattr(outline, "_SMALL", 10)
    tx = ps.optim.sgd(0.1)
    step = ps.make_step(loss_fn, tx)
    assert trained(ps.jit(step, backend="eager"), tx) == trained(step, tx)
    assert all(fake.numel() <= 10 for kind in cut[0].kinds for fake in kind.fakes)


def test_what_is_not_repeated_stays_whole(cut):
    tx = OPTIMIZERS["adamw"]
    state = ps.init(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), tx)
    ps.jit(ps.make_step(loss_fn, tx), backend="eager")(state, torch.randn(5, 3))
    assert cut == [None]


@pytest.mark.slow
def test_the_bits_of_inductor_are_those_of_the_whole_graph(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tx = OPTIMIZERS["adamw"]
    step = ps.make_step(loss_fn, tx)
    pieces = trained(ps.jit(step, donate=True), tx)
    monkeypatch.setattr(backends, "outlined", lambda traced: None)
    assert trained(ps.jit(step, donate=True), tx) == pieces
