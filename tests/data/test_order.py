"""The keyed permutation is a uniform, unpredictable bijection, and plans cut it into the same batches from anywhere."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from shared_marks import slow_but

from purestep import random
from purestep.data.sampler import BatchOrder, permutation


def orders(n: int, count: int, start: int = 0) -> np.ndarray:
    return np.stack([permutation(random.key(s), n)(np.arange(n)) for s in range(start, start + count)])


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
def test_it_is_a_bijection(n: int, seed: int) -> None:
    order = permutation(random.key(seed), n)(np.arange(n))
    assert np.array_equal(np.sort(order), np.arange(n))


@pytest.mark.parametrize("n", [65_535, 65_536, 65_537, 300_007])
def test_larger_domains_are_bijections(n: int) -> None:
    order = permutation(random.key(n), n)(np.arange(n))
    assert np.array_equal(np.sort(order), np.arange(n))


@given(n=st.integers(1, 10**12), seed=st.integers(0, 2**32))
def test_any_position_alone_equals_its_place_in_a_block(n: int, seed: int) -> None:
    order = permutation(random.key(seed), n)
    start = (seed * 7919) % n
    block = np.arange(start, min(start + 50, n))
    together = order(block)
    assert np.array_equal(together, [order(np.array([i]))[0] for i in block])
    assert len(set(together.tolist())) == len(block)
    assert ((together >= 0) & (together < n)).all()


@pytest.mark.parametrize("n", slow_but([3, 4, 5], 4))
def test_small_permutations_are_uniform(n: int) -> None:
    index = {p: i for i, p in enumerate(itertools.permutations(range(n)))}
    found = np.bincount([index[tuple(o)] for o in orders(n, 1500).tolist()], minlength=math.factorial(n))
    assert stats.chisquare(found).pvalue > 1e-4


@pytest.mark.parametrize("n", slow_but([7, 100, 300], 7))
def test_every_sample_is_equally_likely_at_every_position(n: int) -> None:
    found = orders(n, 1500, start=10**6)
    for position in (0, 1, n // 2, n - 1):
        counts = np.bincount(found[:, position], minlength=n)
        assert stats.chisquare(counts).pvalue > 1e-5
    # The samples at two neighbouring positions are independent, but for never being the same.
    difference = np.bincount((found[:, 1] - found[:, 0]) % n, minlength=n)
    assert difference[0] == 0
    assert stats.chisquare(difference[1:]).pvalue > 1e-5


def test_neighbours_do_not_stay_neighbours() -> None:
    n = 50_000
    order = permutation(random.key(3), n)(np.arange(n))
    assert abs(stats.spearmanr(np.arange(n), order).statistic) < 4 / math.sqrt(n)
    assert abs(stats.spearmanr(order[:-1], order[1:]).statistic) < 4 / math.sqrt(n)
    assert (np.abs(np.diff(order)) == 1).sum() < 20  # 2 expected


def test_epochs_and_seeds_are_uncorrelated() -> None:
    n = 20_000
    order = BatchOrder(n, 1, 0, True, True)
    found = [order.indices(e, 0, n) for e in range(4)] + [BatchOrder(n, 1, 1, True, True).indices(0, 0, n)]
    for a, b in itertools.combinations(found, 2):
        assert abs(stats.spearmanr(a, b).statistic) < 4.5 / math.sqrt(n)
        assert (a == b).sum() < 10  # 1 expected


@given(
    samples=st.integers(1, 400),
    size=st.integers(1, 50),
    seed=st.integers(0, 99),
    shuffle=st.booleans(),
    drop=st.booleans(),
    limit=st.none() | st.integers(0, 20),
    epoch=st.integers(0, 5),
)
def test_requests_from_any_batch_are_the_tail_of_the_epoch(
    samples: int, size: int, seed: int, shuffle: bool, drop: bool, limit: int | None, epoch: int
) -> None:
    order = BatchOrder(samples, size, seed, shuffle, drop, limit)
    whole = list(order.requests(epoch))
    assert len(whole) == order.length()
    assert [r.batch for r in whole] == list(range(order.length()))
    for batch in range(0, order.length() + 1, 3):
        tail = list(order.requests(epoch, batch))
        assert [r.indices.tolist() for r in tail] == [r.indices.tolist() for r in whole[batch:]]
    seen = [i for r in whole for i in r.indices.tolist()]
    assert len(set(seen)) == len(seen)
    if limit is None and not drop:
        assert sorted(seen) == list(range(samples))
    if not shuffle:
        assert seen == list(range(len(seen)))


def test_batches_larger_than_a_chunk_of_indices() -> None:
    order = BatchOrder(20_000, 9_000, 0, True, False)
    assert [len(r.indices) for r in order.requests(0)] == [9_000, 9_000, 2_000]


def test_epochs_of_many_chunks_from_anywhere() -> None:
    order = BatchOrder(20_011, 7, 1, True, False)
    whole = [r.indices.tolist() for r in order.requests(2)]
    assert sorted(i for batch in whole for i in batch) == list(range(20_011))
    for batch in (1, 584, 585, 586, 1171, len(whole) - 1):
        assert [r.indices.tolist() for r in order.requests(2, batch)] == whole[batch:]
        start = batch * 7
        assert order.indices(2, start, min(start + 7, 20_011)).tolist() == whole[batch]


def test_the_last_batch_of_a_huge_epoch_costs_what_the_first_does() -> None:
    order = BatchOrder(10**9, 128, 0, True, True)
    next(order.requests(0))
    start = time.perf_counter()
    request = next(order.requests(5, order.length() - 1))
    assert time.perf_counter() - start < 0.5
    assert len(request.indices) == 128
