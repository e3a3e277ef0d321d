"""Pruned weights: how many, which, and that the others train as without pruning."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as theirs

import purestep as ps
from purestep import optim, tree
from purestep.errors import OptimError


def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator) for n, shape in {"a": (5, 7), "b": (3,), "c": (2, 3, 3)}.items()}


def run(tx, steps, params):
    state, history = tx.init(params), []
    for i in range(steps):
        updates, state = tx.update(draw(100 + i), state, params, step=torch.tensor(i))
        params = tx.apply(params, updates, state)
        history.append(params)
    return history, state


def zeros(params):
    return {name: int((p == 0).sum()) for name, p in params.items()}


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.5, 0.9])
def test_the_smallest_go_as_torch_chooses_them(amount):
    params = draw(1)
    (after,), _ = run(optim.prune(optim.sgd(0.1), amount), 1, params)
    (plain,), _ = run(optim.sgd(0.1), 1, params)
    for name in ("a", "c"):
        module = nn.Module()
        module.w = nn.Parameter(plain[name].clone())
        theirs.l1_unstructured(module, "w", amount)
        assert torch.equal(after[name], module.w.detach())
    assert torch.equal(after["b"], plain["b"])  # one dim
    assert zeros(after) == {"a": round(35 * amount), "b": 0, "c": round(18 * amount)}


def test_a_schedule_raises_the_amount_and_what_is_gone_stays():
    tx = optim.prune(optim.sgd(0.01), optim.linear_schedule(0.0, 0.8, transition_steps=8), every=2)
    history, state = run(tx, 12, draw(1))
    expected = [round(35 * 0.1 * (i - i % 2)) for i in range(8)] + [28] * 4
    assert [zeros(params)["a"] for params in history] == expected
    for one, following in itertools.pairwise(history):
        assert not torch.any((one["a"] == 0) & (following["a"] != 0))
    assert int(state.count) == 12


def test_what_is_kept_trains_as_without_pruning():
    params = draw(1)
    (pruned,), state = run(optim.prune(optim.adam(0.1), 0.4, where="a"), 1, params)
    (plain,), _ = run(optim.adam(0.1), 1, params)
    assert torch.equal(pruned["a"][state.kept["a"]], plain["a"][state.kept["a"]])
    assert torch.equal(pruned["c"], plain["c"])
    assert list(state.kept) == ["a"]


def test_an_update_that_is_refused_prunes_nothing():
    tx = optim.prune(optim.apply_if_finite(optim.sgd(0.1)), 0.5)
    params, state = draw(1), None
    bad = tree.map(lambda p: p * float("nan"), params)
    state = tx.init(params)
    updates, following = tx.update(bad, state, params, step=0)
    assert tree.equal(tx.apply(params, updates, following), params)
    assert tree.equal((following.kept, following.count), (state.kept, state.count))


@pytest.mark.slow
def test_a_run_ends_sparse_and_resumes(tmp_path):
    tx = optim.prune(optim.adamw(1e-2), 0.75, where="*.weight")
    make = lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))  # noqa: E731
    x = torch.randn(24, 4)

    def options():
        step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        return {"step": step, "state": ps.init(make, tx, seed=0), "train": ps.data.batches({"x": x}, 6, seed=1)}

    ps.testing.check_resume(options, batches=4, at=[2])
    result = ps.fit(**options(), until=ps.epochs(1))
    assert {n: int((p == 0).sum()) for n, p in result.state.params.items() if "weight" in n} == {
        "0.weight": 24,
        "2.weight": 12,
    }


def test_a_filter_that_matches_nothing():
    with pytest.raises(OptimError, match="there is nothing to prune"):
        optim.prune(optim.sgd(0.1), 0.5, where="nothing").init(draw(1))
