"""Small tensors computed as one flat tensor: the bits of a tensor by itself, memory of their own, and few kernels."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from purestep import optim, tree
from purestep.optim.kernels import flat
from purestep.optim.kernels import foreach as fx

ROWS = {row.name: row.make for row in importlib.import_module("tests.optim.test_conformance").ROWS}


@pytest.fixture
def packed(monkeypatch: Any) -> list[int]:
    """As on a card: small tensors go into flat ones. Gives the number of kernels that were saved, by call."""
    saved: list[int] = []
    groups = flat._groups

    def counted(*args: Any) -> Any:
        found = groups(*args)
        saved.extend(map(len, found))
        return found

    monkeypatch.setattr(flat, "_groups", counted)
    monkeypatch.setattr(flat, "_gains", lambda x: 0 < x.numel() <= 40 and x.is_contiguous())
    monkeypatch.setattr(flat, "_FEW", 1)
    return saved


def tensors(seed: int) -> list[torch.Tensor]:
    """Of several dtypes and shapes: two are too large to be packed, one is empty, one is not contiguous."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (), (7,), (0,), (50,), (2, 3, 2), (1, 41), (4,)]
    found = [torch.randn(shape, generator=g).to(d) for d in (torch.float32, torch.bfloat16) for shape in shapes]
    return [*found, torch.randn(6, 4, generator=g).T]


def test_packed_tensors_have_the_bits_of_single_ones(packed: Any) -> None:
    xs, ys = tensors(0), tensors(1)
    xs[2][1], ys[0][0, 0] = float("nan"), float("inf")
    numbers = [torch.randn((), dtype=x.dtype) for x in xs]
    yes = torch.tensor(True)
    for condition in (yes, ~yes):
        assert tree.equal(fx.select(condition, xs, ys), xs if condition else ys)
        zeros = [torch.zeros_like(x) for x in xs]
        assert tree.equal(fx.select(condition, xs, None), xs if condition else zeros)
    assert tree.equal(fx.each(torch.mul, xs, numbers), [x * n for x, n in zip(xs, numbers, strict=True)])
    assert tree.equal(fx.elements(torch.lt, xs, ys), [x < y for x, y in zip(xs, ys, strict=True)])
    assert tree.equal(fx.select_tree(yes, {"a": xs, "b": ys[0]}, {"a": ys, "b": ys[0]}), {"a": xs, "b": ys[0]})
    assert packed == [5, 5] * 7


def test_results_are_tensors_of_their_own(packed: Any) -> None:
    xs = [x for x in tensors(2) if x.dtype == torch.float32]
    weight = torch.tensor(0.3)
    moved = fx.lerp(xs, [x + 1 for x in xs], weight)
    assert packed
    for x, y in zip(xs, moved, strict=True):
        assert torch.allclose(y, x + 0.3)
        assert y.untyped_storage().nbytes() == x.numel() * 4
    before = [x.data_ptr() for x in xs]
    again = fx.lerp(xs, [x + 1 for x in xs], weight, reuse=True)
    assert [x.data_ptr() for x in again] == before
    assert tree.equal(again, moved)


@pytest.mark.parametrize(
    "name", ["lamb", "adafactor", "rprop", "prune", "radam", "apply_if_finite", "average_params", "accumulate"]
)
def test_optimizers_update_packed_tensors_as_single_ones(name: str, request: Any) -> None:
    more = {
        "apply_if_finite": lambda: optim.apply_if_finite(optim.adamw(1e-2)),
        "average_params": lambda: optim.average_params(optim.sgd(0.1), decay=None, every=2),
        "accumulate": lambda: optim.accumulate(optim.sgd(0.1), every=2),
    }
    tx = (ROWS | more)[name]()
    params = {str(i): x for i, x in enumerate(tensors(3)) if x.numel()}

    def trained() -> Any:
        new, state = params, tx.init(params)
        for seed in range(3):
            grads = dict(zip(params, [x for x in tensors(10 + seed) if x.numel()], strict=True))
            updates, state = tx.update(grads, state, new, step=torch.tensor(seed))
            new = tx.apply(new, updates, state)
        return new, state

    single = trained()
    saved = request.getfixturevalue("packed")
    together = trained()
    assert sum(saved) > 20
    leaves = zip(tree.leaves(single), tree.leaves(together), strict=True)
    # The vector and the scalar loop of the CPU's lerp may round differently; a card has one loop.
    assert all(torch.allclose(a, b, rtol=1e-6 if a.dtype == torch.float32 else 1e-2) for a, b in leaves)
