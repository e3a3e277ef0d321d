"""`TreeSum`: the one order in which the contributions of microbatches are added, whoever holds them.

Accumulation on one process feeds it one after the other; ranks feed it what they have and exchange the rest. It knows
nothing of tensors: how two values merge is the caller's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")
Node = tuple[int, int]


class TreeSum(Generic[T]):
    """Sum values in a fixed balanced binary tree, holding at most log2(n) + 1 of them at a time.

    The order of additions depends on the number of values only: 4 values give (a + b) + (c + d), and where the number
    is no power of two, what is missing on the right is left out. Aligned parts of the tree can be summed elsewhere,
    which is what makes the sum independent of who computes which microbatch.

    Args:
        merge: adds two values, the earlier one first.

    Examples:
        >>> total = TreeSum(lambda a, b: f"({a}+{b})")
        >>> for x in "abcdef":
        ...     total.add(x)
        >>> total.result()
        '(((a+b)+(c+d))+(e+f))'
        >>> right = TreeSum(lambda a, b: f"({a}+{b})")
        >>> for index, x in enumerate("def", start=3):
        ...     right.add(x, index)
        >>> right.nodes
        {(0, 3): 'd', (1, 2): '(e+f)'}
    """

    def __init__(self, merge: Callable[[T, T], T]) -> None:
        self._merge = merge
        self._count = 0
        self.nodes: dict[Node, T] = {}

    def add(self, value: T, index: int | None = None) -> None:
        """Add the value of a number; by default they come in order."""
        self.put((0, self._count if index is None else index), value)
        self._count += 1

    def put(self, node: Node, value: T) -> None:
        """Add the sum of an aligned part: `(level, n)` is that of the values `n * 2**level` and following."""
        level, place = node
        while (sibling := (level, place ^ 1)) in self.nodes:
            other = self.nodes.pop(sibling)
            value = self._merge(other, value) if place % 2 else self._merge(value, other)
            level, place = level + 1, place // 2
        self.nodes[level, place] = value

    def result(self) -> T:
        """Return the sum of all values, once the last is in."""
        parts = [self.nodes[node] for node in sorted(self.nodes, key=lambda n: n[1] << n[0])]
        total = parts.pop()
        while parts:
            total = self._merge(parts.pop(), total)
        return total


def forest(indices: list[int]) -> list[Node]:
    """Return the parts that remain when the values of these numbers are added as far as they can be.

    Examples:
        >>> forest([0, 1, 2]), forest([4, 5, 6, 7])
        ([(1, 0), (0, 2)], [(2, 1)])
    """
    total: TreeSum[None] = TreeSum(lambda a, b: None)
    for index in indices:
        total.add(None, index)
    return list(total.nodes)


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The additions of a tree over the rows of a tensor, as many at once as there are on a level.

    Attributes:
        additions: for each round, slices of the rows that are added to, and of those that are added to them.
        nodes: by part of the tree, the row that its sum is in after all rounds.
    """

    additions: tuple[tuple[slice, slice], ...]
    nodes: Mapping[Node, int]


@functools.lru_cache(maxsize=256)
def rounds(nodes: tuple[Node, ...]) -> Rounds:
    """Return how the rows that hold these parts of the tree are added as far as they can be: as by `put`, one by one.

    Examples:
        >>> found = rounds(((0, 0), (0, 1), (0, 2), (0, 3), (0, 4)))
        >>> found.additions
        ((slice(0, 3, 2), slice(1, 4, 2)), (slice(0, 1, 2), slice(2, 3, 2)))
        >>> found.nodes
        {(0, 4): 4, (2, 0): 0}
    """
    levels: dict[int, dict[int, int]] = {}
    for row, (level, place) in enumerate(nodes):
        levels.setdefault(level, {})[place] = row
    additions: list[tuple[slice, slice]] = []
    left: dict[Node, int] = {}
    while levels:
        level = min(levels)
        rows = levels.pop(level)
        pairs = [(row, rows[place + 1]) for place, row in sorted(rows.items()) if not place % 2 and place + 1 in rows]
        additions += _slices(pairs)
        left |= {(level, place): row for place, row in rows.items() if place ^ 1 not in rows}
        if pairs:
            above = levels.setdefault(level + 1, {})
            above |= {place // 2: row for place, row in rows.items() if not place % 2 and place + 1 in rows}
    return Rounds(tuple(additions), left)


def _slices(pairs: list[tuple[int, int]]) -> list[tuple[slice, slice]]:
    """The pairs of rows, those at equal distances as one pair of slices."""
    found = []
    start = 0
    while start < len(pairs):
        (a, b), stop = pairs[start], start + 1
        step = pairs[stop][0] - a if stop < len(pairs) else 2
        while stop < len(pairs) and step > 0 and pairs[stop] == (a + step * (stop - start), b + step * (stop - start)):
            stop += 1
        span = step * (stop - start - 1) + 1
        found.append((slice(a, a + span, max(step, 1)), slice(b, b + span, max(step, 1))))
        start = stop
    return found
