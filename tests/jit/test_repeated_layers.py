"""A graph that was cut at repeated layers computes what the whole graph does, and equal layers are compiled once."""

from __future__ import annotations

import pytest
import torch
from shared_marks import slow_but
from torch import nn
from torch.nn import functional as F

import purestep as ps
from purestep.jit import backends, layers
from purestep.jit._torch import runnable
from purestep.jit.layers import layered


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.norm, self.up, self.down = nn.LayerNorm(5), nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x):
        h = self.up(self.norm(x))
        h = F.dropout(F.gelu(h), 0.3) if self.kind == "d" else F.gelu(h) if self.kind == "g" else F.silu(h)
        return x + self.down(h)


class Tied(nn.Module):
    """The last layer has the weight of the first."""

    def __init__(self, kinds):
        super().__init__()
        self.first, self.blocks = nn.Linear(5, 5), nn.Sequential(*map(Block, kinds))

    def forward(self, x):
        return F.linear(self.blocks(self.first(x)), self.first.weight)


def loss_fn(net, batch):
    return net(batch).square().mean(), {"weight": net.first.weight[1, 2]}


@pytest.fixture
def cut(monkeypatch):
    """Runs the pieces of a graph operator by operator in place of a backend, and keeps how the graph was cut."""
    found = []

    def build(traced, mode):
        pieces = layered(traced)
        found.append(pieces)
        graphs = [runnable(t.graph).forward for t in ([traced] if pieces is None else pieces.kinds)]
        runs = [lambda tensors, forward=forward: forward(*tensors) for forward in graphs]
        return runs[0] if pieces is None else pieces.run(runs)

    monkeypatch.setitem(backends._BACKENDS, "eager", build)
    for name, value in {"_SHORT": 6, "_SPARED": 6, "_WORK": 0, "_LITTLE": 8}.items():
        monkeypatch.setattr(layers, name, value)
    return found


def trained(step, tx, kinds):
    state = ps.init(lambda: Tied(kinds), tx, seed=0)
    metrics = None
    for batch in torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1)):
        state, metrics = step(state, batch)
    return ps.digest((state, metrics))


# Which kinds of blocks follow one another, and the least number of pieces that are spared, forward and backward.
PATTERNS = {"ggggg": 6, "gsgsgs": 2, "ggsgg": 2, "gs": 0, "dddd": 0}


@pytest.mark.parametrize("donate", slow_but([True, False], True))
@pytest.mark.parametrize("kinds", slow_but(PATTERNS, "ggggg"))
def test_the_pieces_compute_what_the_step_does(cut, kinds, donate):
    tx = ps.optim.adamw(1e-2)
    step = ps.make_step(loss_fn, tx)
    assert trained(ps.jit(step, donate=donate, backend="eager"), tx, kinds) == trained(step, tx, kinds)
    (pieces,) = cut
    spared = 0 if pieces is None else len(pieces.uses) - len(pieces.kinds)
    assert spared >= PATTERNS[kinds]
    assert kinds != "gs" or pieces is None


def test_no_cut_separates_what_could_be_fused(cut):
    def chain(state, batch):
        for _ in range(12):
            batch = (batch.exp() + state["w"]).sin()
        return state, batch @ state["w"]

    ps.jit(chain, backend="eager")({"w": torch.randn(3, 3)}, torch.randn(3, 3))
    assert cut == [None]


@pytest.mark.parametrize("strides", [(12, 4, 1), (0, 4, 1), (24, 8, 2)])
def test_a_piece_gets_its_inputs_in_the_layout_that_it_was_compiled_for(strides):
    given = []
    piece = layers._Piece(given.extend, [torch.empty_strided((2, 3, 4), strides)])
    for _ in range(2):
        x = torch.randn(4, 3, 2).permute(2, 1, 0)
        x = x[:1].expand(2, 3, 4) if strides[0] == 0 else x
        piece([x])
        found = given.pop()
        assert found.stride() == strides
        assert torch.equal(found, x)


@pytest.mark.slow
def test_the_bits_of_inductor_are_those_of_the_whole_graph(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for name, value in {"_SHORT": 6, "_SPARED": 6, "_WORK": 0}.items():
        monkeypatch.setattr(layers, name, value)
    tx = ps.optim.adamw(1e-2)
    step = ps.make_step(loss_fn, tx)
    pieces = trained(ps.jit(step, donate=True), tx, "gggg")
    monkeypatch.setattr(backends, "layered", lambda traced: None)
    assert trained(ps.jit(step, donate=True), tx, "gggg") == pieces
