"""The one order of additions, on strings, where it can be read."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from purestep.treesum import TreeSum, forest, rounds


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


@pytest.mark.parametrize("trial", range(20))
def test_a_level_at_once_adds_what_is_added_one_by_one(trial, seed):
    """Of any parts of a tree in any order, as ranks with uneven numbers of microbatches hold them."""
    generator = random.Random(seed * 100 + trial)
    indices = sorted(generator.sample(range(40), generator.randint(1, 40)))
    cuts = sorted(generator.sample(range(len(indices)), min(3, len(indices) - 1)))
    owners = [forest(indices[a:b]) for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
    nodes = [node for own in owners for node in own]
    generator.shuffle(nodes)
    one_by_one = TreeSum(lambda a, b: f"({a}+{b})")
    for row, node in enumerate(nodes):
        one_by_one.put(node, str(row))
    rows = np.array([str(row) for row in range(len(nodes))], dtype=object)
    found = rounds(tuple(nodes))
    for kept, added in found.additions:
        rows[kept] = [f"({a}+{b})" for a, b in zip(rows[kept], rows[added], strict=True)]
    assert {node: rows[row] for node, row in found.nodes.items()} == one_by_one.nodes


def test_a_thousand_rows_are_ten_rounds():
    assert len(rounds(tuple((3, place) for place in range(1024))).additions) == 10
    assert len(rounds(tuple((0, place) for place in range(1000))).additions) == 9
