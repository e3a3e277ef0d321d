"""Sums of squares that no cut and no order changes, against sums in float64."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import purestep as ps
from purestep.sharding import ddp, exact_norm, full_tensors
from purestep.sharding.exact_norm import squares


def alone(values, op):
    return values


def over(parts):
    """Run `squares` for several ranks in turn, exchanging by hand: first the maxima, then the sums."""
    seen = {"max": [], "sum": []}

    def listen(values, op):
        seen[op].append(values)
        return values

    def run(reduce):
        count = sum(p.numel() for p in parts)
        return [squares([p], [count], [True], reduce) for p in parts]

    run(listen)
    most = torch.stack(seen["max"]).amax(0)
    sums = run(lambda v, op: most if op == "max" else v)
    return torch.stack(sums).sum(0)


@given(st.integers(0, 2**31), st.integers(1, 60_000), st.integers(1, 5), st.sampled_from([1e-30, 1.0, 1e15]))
def test_no_cut_and_no_order_changes_a_bit(seed, n, cuts, size):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g) * torch.exp(4 * torch.randn(n, generator=g)) * size
    expected = squares([x], [n], [True], alone)
    order = torch.randperm(n, generator=g)
    at = sorted(random.Random(seed).randrange(n + 1) for _ in range(cuts))
    assert torch.equal(over(list(x[order].tensor_split(at))), expected)
    assert float(expected) == pytest.approx(float(x.double().square().sum()), rel=1e-7)


def test_a_sum_in_float64_alone_would_depend_on_the_order():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40_000, generator=g).double()
    assert len({float(x[torch.randperm(len(x), generator=g)].square().cumsum(0)[-1]) for _ in range(20)}) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_dtypes_and_what_is_not_finite(dtype):
    x = torch.tensor([3.0, 4.0]).to(dtype)
    inf, nan, empty, zero = (
        torch.tensor(v, dtype=torch.float32) for v in ([1, math.inf], [math.inf, math.nan], [], [0.0])
    )
    found = squares([x, inf, nan, empty, zero], [2, 2, 2, 0, 1], [True] * 5, alone)
    assert found.tolist()[:2] == [25.0, math.inf]
    assert math.isnan(found[2])
    assert found.tolist()[3:] == [0.0, 0.0]


def test_ranks_agree_on_a_nan_that_a_maximum_swallows():
    parts = [torch.tensor([1.0, math.nan]), torch.tensor([2.0, 3.0])]
    assert math.isnan(over(parts))


def test_an_update_under_a_plan_takes_the_exact_norm():
    g = torch.Generator().manual_seed(3)
    grads = {"b": torch.randn(300, 7, generator=g), "a": torch.randn(5, generator=g)}
    with full_tensors.updating(full_tensors.Whole(ddp(), grads)):
        inside = ps.optim.global_norm(grads)
    exact = math.sqrt(sum(x.double().square().sum() for x in grads.values()))
    assert float(inside) == pytest.approx(exact, rel=1e-7)
    assert inside.dtype == torch.float32
    assert full_tensors.current() is None


@pytest.mark.slow
def test_compiled_sums_have_the_same_bits():
    """With eight tensors and more, what is done for each of them is done in vectors."""

    def of_all(tensors):
        return squares(tensors, [x.numel() for x in tensors], [True] * len(tensors), alone)

    generator = torch.Generator().manual_seed(4)
    tensors = [torch.randn(7, 5 + i, generator=generator) * 10.0 ** (i - 20) for i in range(33)]
    tensors += [torch.zeros(3), torch.full((3,), 1e-42), torch.randn(20_000, generator=generator)]
    assert torch.equal(ps.jit(of_all)(tensors), of_all(tensors))


def test_what_a_card_computes_at_once_has_the_same_bits(monkeypatch):
    """The vectors of a card, here on the CPU: tensors of all sizes and dtypes, cut, empty, of other ranks."""
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=g) * 10.0 ** (i % 7 - 3) for i, n in enumerate((1, 70_001, 0, 300, 5, 64))]
    tensors += [torch.randn(33, 3, generator=g).bfloat16(), torch.randn(9, generator=g).to(torch.complex64)]
    tensors += [torch.randn(4, 5, generator=g).t(), torch.tensor([math.inf, 1.0]), torch.tensor([math.nan, math.inf])]
    counts, mine = [3 * x.numel() for x in tensors], [i != 3 for i in range(len(tensors))]
    expected = squares(tensors, counts, mine, alone)
    monkeypatch.setattr(exact_norm, "_on_card", lambda tensors: True)
    for most in (1 << 25, 1000, 64):
        monkeypatch.setattr(exact_norm, "_AT_ONCE", most)
        assert squares(tensors, counts, mine, alone).nan_to_num(7.0).tolist() == expected.nan_to_num(7.0).tolist()
