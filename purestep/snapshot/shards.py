"""Which part of a leaf a process holds, and laying parts into one another.

A box is `(start, shape)` in the whole tensor. Plain leaves are whole everywhere and written by rank 0; of a split one
each part is written by the first rank that holds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from purestep.errors import TreeError, explain
from purestep.sharding import place
from purestep.snapshot.codec import Encoded, Leaf, show
from purestep.snapshot.ranks import Ranks

Box = tuple[tuple[int, ...], tuple[int, ...]]
_WORDS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}


@dataclass(frozen=True)
class Owned:
    """A part of a leaf that this rank writes: the leaf's index, the box, and the tensor or array that holds it."""

    index: int
    leaf: Leaf
    box: Box
    value: Any

    @property
    def is_whole(self) -> bool:
        return self.box == whole(self.leaf)


def owned(encoded: Encoded, ranks: Ranks) -> list[Owned]:
    """Return the parts that a rank writes, in order of the leaves.

    Raises:
        TreeError: a leaf is split over processes, and the store knows only one.
    """
    found = []
    value: Any
    for index, (leaf, value) in enumerate(zip(encoded.leaves, encoded.values, strict=True)):
        if value is None:
            continue
        if not place.is_split(value):
            if ranks.rank == 0:
                found.append(Owned(index, leaf, whole(leaf), value))
            continue
        box = place.shard_of(value)
        if ranks.size == 1 and box != whole(leaf):
            raise TreeError(
                explain(
                    "a tensor that is split over processes cannot be saved by one of them",
                    where=f"{show(leaf.path)}: {leaf}, here {list(box[1])} from {list(box[0])}",
                    instead="Store(root, ranks=Ranks(rank, size, exchange)), and save on every rank\n"
                    "or store.save(step, plan.gather(state)) on a store of rank 0",
                )
            )
        if place.is_owner(value) and (count(box) or not count(whole(leaf))):
            found.append(Owned(index, leaf, box, place.part_of(value)))
    return found


def whole(leaf: Leaf) -> Box:
    """Return the box of all of a leaf."""
    return (0,) * len(leaf.shape), tuple(leaf.shape)


def wanted(leaf: Leaf, template: Any) -> Box:
    """Return the box that a template asks for: its own part of a split tensor, all of anything else."""
    return place.shard_of(template) if place.is_split(template) else whole(leaf)


def width(leaf: Leaf) -> int:
    """Return the bytes of an element."""
    return int(getattr(torch, leaf.dtype).itemsize if leaf.kind == "tensor" else np.dtype(leaf.dtype).itemsize)


def count(box: Box) -> int:
    """Return the elements in a box."""
    return math.prod(box[1])


def overlap(a: Box, b: Box) -> Box:
    """Return what two boxes have in common; a box without elements when that is nothing.

    Example:
        >>> overlap(((0, 2), (4, 2)), ((2, 0), (9, 3)))
        ((2, 2), (2, 1))
        >>> count(overlap(((0,), (2,)), ((2,), (2,))))
        0
    """
    start = tuple(max(x, y) for x, y in zip(a[0], b[0], strict=True))
    ends = (min(x + n, y + m) for x, n, y, m in zip(*a, *b, strict=True))
    return start, tuple(max(end - begin, 0) for begin, end in zip(start, ends, strict=True))


def lay(leaf: Leaf, source: np.ndarray, source_box: Box, target: np.ndarray, target_box: Box) -> int:
    """Copy what two boxes of a leaf have in common from one to the other; return the number of elements.

    Args:
        leaf: the leaf.
        source, target: uint8[nbytes] of the boxes, contiguous.
    """
    common = overlap(source_box, target_box)
    if not count(common):
        return 0
    views = []
    for content, box in ((source, source_box), (target, target_box)):
        cut = tuple(slice(c - b, c - b + n) for c, b, n in zip(common[0], box[0], common[1], strict=True))
        views.append((content.view(_WORDS[width(leaf)]).reshape(box[1]), cut))
    (given, there), (taken, here) = views
    taken[here] = given[there]
    return count(common)
