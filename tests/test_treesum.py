"""The one order of additions, on strings, where it can be read."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from purestep.treesum import TreeSum, forest, merged


def join(a, b):
    return f"({a}{b})"


def total(items):
    acc = TreeSum(join)
    for item in items:
        acc.add(item)
    return acc.result()


@given(st.lists(st.integers(), min_size=1, max_size=70))
def test_a_tree_sum_adds_everything_once_and_holds_little(values):
    acc = TreeSum(lambda a, b: a + b)
    for n, v in enumerate(values, 1):
        acc.add(v)
        assert len(acc.nodes) <= math.log2(n) + 1
    assert acc.result() == sum(values)


@given(st.integers(0, 4), st.integers(0, 4))
def test_aligned_parts_of_a_tree_sum_can_be_added_elsewhere(parts, size):
    n, chunk = 2 ** (parts + size), 2**size
    items = [chr(97 + i % 26) for i in range(n)]
    assert total([total(items[i : i + chunk]) for i in range(0, n, chunk)]) == total(items)


@given(st.integers(1, 24), st.integers(1, 6), st.randoms())
def test_whoever_adds_what_the_order_is_the_same(n, ranks, shuffle: random.Random):
    owner = [shuffle.randrange(ranks) for _ in range(n)]
    partial = []
    for rank in range(ranks):
        acc = TreeSum(join)
        mine = [i for i in range(n) if owner[i] == rank]
        for i in mine:
            acc.add(str(i), i)
        assert list(acc.nodes) == forest(mine)
        partial += acc.nodes.items()
    shuffle.shuffle(partial)
    together = TreeSum(join)
    for node, value in partial:
        together.put(node, value)
    assert together.result() == total(map(str, range(n)))


@given(st.lists(st.integers(0, 40), unique=True, min_size=1), st.randoms())
def test_many_pairs_at_once_have_the_order_of_one_after_the_other(indices, shuffle: random.Random):
    acc = TreeSum(join)
    for i in indices:
        acc.add(f"{i},", i)
    given_nodes = [((0, i), f"{i},") for i in indices]
    shuffle.shuffle(given_nodes)
    calls = []

    def join_all(xs, ys):
        calls.append(len(xs))
        return list(map(join, xs, ys))

    assert merged(dict(given_nodes), join_all) == acc.nodes
    assert len(calls) <= 6
