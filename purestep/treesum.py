"""`TreeSum`: the one order in which the contributions of microbatches are added, whoever holds them.

Accumulation on one process feeds it one after the other; ranks feed it what they have and exchange the rest. It knows
nothing of tensors: how two values merge is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def merged(nodes: Mapping[Node, T], merge_all: Callable[[list[T], list[T]], Sequence[T]]) -> dict[Node, T]:
    """Add the sums of aligned parts as far as they can be: what `TreeSum.put` does one by one, level by level.

    Args:
        nodes: the sums of parts of the tree.
        merge_all: adds the values of two lists, place by place, those of the first list being the earlier ones.

    Examples:
        >>> merged({(0, i): x for i, x in enumerate("abcdef")}, lambda xs, ys: [f"({x}+{y})" for x, y in zip(xs, ys)])
        {(1, 2): '(e+f)', (2, 0): '((a+b)+(c+d))'}
    """
    left = dict(nodes)
    while pairs := [(level, place) for level, place in left if place % 2 == 0 and (level, place + 1) in left]:
        earlier = [left.pop(node) for node in pairs]
        later = [left.pop((level, place + 1)) for level, place in pairs]
        sums = merge_all(earlier, later)
        left |= {(level + 1, place // 2): value for (level, place), value in zip(pairs, sums, strict=True)}
    return left


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
