"""The one place that knows foreach: the same bits leaf by leaf, nothing overwritten that is not ours, dtypes kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purestep import tree
from purestep.optim.kernels import foreach as fx

SHAPES = [(5, 3), (), (17,), (2, 3, 2), (0,)]


def draw(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).abs().add(0.1).to(dtype) for s in SHAPES]


OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {
    "mul": (lambda x, y, **k: fx.mul(x, y, **k), lambda x, y: x * y, 2),
    "mul number": (lambda x, **k: fx.mul(x, 0.3, **k), lambda x: x * 0.3, 1),
    "mul scalar": (lambda x, **k: fx.mul(x, torch.tensor(0.3), **k), lambda x: x * torch.tensor(0.3), 1),
    "div": (lambda x, y, **k: fx.div(x, y, **k), lambda x, y: x / y, 2),
    "div scalar": (lambda x, **k: fx.div(x, torch.tensor(0.3), **k), lambda x: x / torch.tensor(0.3), 1),
    "add": (lambda x, y, **k: fx.add(x, y, alpha=0.3, **k), lambda x, y: torch.add(x, y, alpha=0.3), 2),
    "add number": (lambda x, **k: fx.add(x, 0.3, **k), lambda x: x + 0.3, 1),
    "sub": (lambda x, y, **k: fx.sub(x, y, **k), lambda x, y: x - y, 2),
    "addcmul": (
        lambda x, y, z, **k: fx.addcmul(x, y, z, value=0.3, **k),
        lambda x, y, z: torch.addcmul(x, y, z, value=0.3),
        3,
    ),
    "addcdiv": (
        lambda x, y, z, **k: fx.addcdiv(x, y, z, value=0.3, **k),
        lambda x, y, z: torch.addcdiv(x, y, z, value=0.3),
        3,
    ),
    "maximum": (lambda x, y, **k: fx.maximum(x, y, **k), torch.maximum, 2),
    "minimum number": (lambda x, **k: fx.minimum(x, 0.3, **k), lambda x: x.clamp(max=0.3), 1),
    "sqrt": (fx.sqrt, torch.sqrt, 1),
    "abs": (fx.abs, torch.abs, 1),
    "reciprocal": (fx.reciprocal, torch.reciprocal, 1),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", OPS)
def test_lists_have_the_bits_of_leaves_in_every_mode(name: str, seed: int) -> None:
    ours, plain, arity = OPS[name]
    args = [draw(seed + 10 * i) for i in range(arity)]
    expected = [plain(*xs) for xs in zip(*args, strict=True)]
    before = tree.digest(args)
    assert tree.equal(ours(*args), expected)
    assert tree.digest(args) == before
    own = [x.clone() for x in args[0]]
    reused = ours(own, *args[1:], reuse=True)
    assert tree.equal(reused, expected)
    assert reused[0].data_ptr() == own[0].data_ptr()
    mapped = torch.vmap(lambda *xs: tuple(ours(*[list(x) for x in xs])))(*[tuple(x[None] for x in xs) for xs in args])
    assert tree.equal([m[0] for m in mapped], expected)


@pytest.mark.parametrize("name", OPS)
def test_reuse_is_given_up_under_autograd(name: str) -> None:
    ours, _, arity = OPS[name]
    args = [[x.double().requires_grad_() for x in draw(3 + i)[:3]] for i in range(arity)]

    def total(*leaves: torch.Tensor) -> torch.Tensor:
        lists = [list(leaves[3 * i : 3 * i + 3]) for i in range(arity)]
        doubled = [[2.0 * x for x in xs] for xs in lists]
        return torch.stack([x.sin().sum() for x in ours(doubled[0], *doubled[1:], reuse=True)]).sum()

    assert torch.autograd.gradcheck(total, [x for xs in args for x in xs])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scalars_never_promote(dtype: torch.dtype) -> None:
    for scalar in (torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)):
        xs = draw(4, dtype)
        for result in (fx.mul(xs, scalar), fx.div(xs, scalar), fx.add(xs, scalar), fx.add(xs, xs, alpha=scalar)):
            assert [r.dtype for r in result] == [dtype] * len(xs)
        assert [r.dtype for r in fx.lerp(xs, xs, scalar)] == [dtype] * len(xs)


def test_scalars_are_not_rounded_to_the_leaf() -> None:
    """3e-4 is not a bfloat16 number: a product with it must round once, at the end, for 0-d leaves too."""
    xs = [torch.tensor(3.0, dtype=torch.bfloat16), torch.tensor([3.0], dtype=torch.bfloat16)]
    expected = torch.tensor(3.0 * 3e-4).bfloat16()
    assert all(r.item() == expected.item() for r in fx.mul(xs, torch.tensor(3e-4)))


@given(st.lists(st.integers(0, 40), max_size=5), st.integers(0, 99))
def test_global_norm_is_that_of_the_flat_vector(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(n, generator=generator) for n in sizes]
    flat = torch.cat([*xs, torch.zeros(1)]).double()
    torch.testing.assert_close(fx.global_norm(xs).double(), flat.norm(), rtol=1e-5, atol=1e-7)
    assert bool(fx.all_finite(xs))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_bad_element_anywhere_is_found(bad: float, dtype: torch.dtype) -> None:
    for where in range(4):
        xs = draw(5, dtype)
        xs[where].reshape(-1)[-1] = bad
        assert not fx.all_finite(xs)
        stacked = tuple(torch.stack([x, x]) for x in xs)
        assert not torch.vmap(lambda *x: fx.all_finite(list(x)))(*stacked).any()


def test_finite_values_whose_norm_overflows_are_finite() -> None:
    assert bool(fx.all_finite([torch.full((9,), 3e38), torch.full((2,), 1e300, dtype=torch.float64)]))


def test_sign_does_not_hide_a_nan() -> None:
    result = fx.sign([torch.tensor([math.nan, -2.0, 0.0, 3.0])])[0]
    assert math.isnan(result[0])
    assert result[1:].tolist() == [-1.0, 0.0, 1.0]


def test_empty_lists_give_empty_lists() -> None:
    assert fx.mul([], 2.0) == fx.add([], []) == fx.lerp([], [], 0.1) == fx.sqrt([]) == fx.addcmul([], [], []) == []


@pytest.mark.parametrize("taken", [True, False])
def test_a_choice_against_zeros_keeps_shapes_and_dtypes_and_lets_no_nan_through(taken):
    xs = [*draw(1), *draw(2, torch.float64), torch.tensor([math.nan, -1.0]), torch.tensor([3, 4])]
    chosen = fx.select(torch.tensor(taken), xs, None)
    for x, y in zip(xs, chosen, strict=True):
        torch.testing.assert_close(y, x if taken else torch.zeros_like(x), rtol=0, atol=0, equal_nan=True)
