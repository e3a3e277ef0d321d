"""Which shard of a leaf each rank writes and reads, and copying between overlapping shards.

A box is `(start, shape)` in the full leaf. Unsharded leaves are the same on every rank, and rank 0 writes them; each
shard of a sharded one is written by the first rank that holds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from purestep.errors import TreeError, explain
from purestep.sharding import placement
from purestep.snapshot.codec import Encoded, Leaf, Stored, show
from purestep.snapshot.processes import Ranks

Box = tuple[tuple[int, ...], tuple[int, ...]]
# An element is copied as one word of its width, because numpy has no dtype for every torch dtype.
_WORDS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}


@dataclass(frozen=True)
class OwnedShard:
    """A shard that this rank writes: the leaf and its index, the box, and the tensor or array with the values."""

    index: int
    leaf: Leaf
    box: Box
    value: Stored

    @property
    def is_full(self) -> bool:
        """Whether it is the full leaf."""
        return self.box == full_box(self.leaf)


def owned(encoded: Encoded, ranks: Ranks) -> list[OwnedShard]:
    """Return the shards that a rank writes, in order of the leaves.

    Raises:
        TreeError: a leaf is sharded over processes, and the store is written by one process only.
    """
    shards = []
    value: Any
    for index, (leaf, value) in enumerate(zip(encoded.leaves, encoded.values, strict=True)):
        if value is None:
            continue
        if not placement.is_split(value):
            if ranks.rank == 0:
                shards.append(OwnedShard(index, leaf, full_box(leaf), value))
            continue
        box = placement.shard_of(value)
        if ranks.size == 1 and box != full_box(leaf):
            raise TreeError(
                explain(
                    "a tensor that is sharded over processes cannot be saved by one of them",
                    where=f"{show(leaf.path)}: {leaf}, this rank holds {list(box[1])} from {list(box[0])}",
                    instead="Store(root, ranks=Ranks(rank, size, exchange)), and save on every rank\n"
                    "or store.save(step, plan.gather(state)) on a store of rank 0",
                )
            )
        # Of an empty leaf every shard is empty; one is written all the same, so that the leaf has a piece.
        if placement.is_owner(value) and (count(box) or not count(full_box(leaf))):
            shards.append(OwnedShard(index, leaf, box, placement.part_of(value)))
    return shards


def full_box(leaf: Leaf) -> Box:
    """Return the box of the full leaf."""
    return (0,) * len(leaf.shape), tuple(leaf.shape)


def box_for(leaf: Leaf, template: Any) -> Box:
    """Return the box that a template needs: this rank's shard of a sharded tensor, else the full leaf."""
    return placement.shard_of(template) if placement.is_split(template) else full_box(leaf)


def width(leaf: Leaf) -> int:
    """Return the bytes of an element."""
    return int(getattr(torch, leaf.dtype).itemsize if leaf.kind == "tensor" else np.dtype(leaf.dtype).itemsize)


def count(box: Box) -> int:
    """Return the elements in a box."""
    return math.prod(box[1])


def overlap(a: Box, b: Box) -> Box:
    """Return the intersection of two boxes; a box without elements if they are disjoint.

    Examples:
        >>> overlap(((0, 2), (4, 2)), ((2, 0), (9, 3)))
        ((2, 2), (2, 1))
        >>> count(overlap(((0,), (2,)), ((2,), (2,))))
        0
    """
    start = tuple(max(x, y) for x, y in zip(a[0], b[0], strict=True))
    ends = (min(x + n, y + m) for x, n, y, m in zip(*a, *b, strict=True))
    return start, tuple(max(end - begin, 0) for begin, end in zip(start, ends, strict=True))


def copy_overlap(leaf: Leaf, source: np.ndarray, source_box: Box, target: np.ndarray, target_box: Box) -> int:
    """Copy the intersection of two boxes of a leaf from source to target; return its number of elements.

    Args:
        leaf: the leaf.
        source, target: uint8[nbytes] of the boxes, contiguous.
        source_box, target_box: the boxes.
    """
    common = overlap(source_box, target_box)
    if not count(common):
        return 0

    def elements(content: np.ndarray, box: Box) -> np.ndarray:
        return content.view(_WORDS[width(leaf)]).reshape(box[1])

    def within(box: Box) -> tuple[slice, ...]:
        """The intersection as slices of a box: boxes count from the full leaf, slices from the start of the box."""
        return tuple(slice(c - b, c - b + n) for c, b, n in zip(common[0], box[0], common[1], strict=True))

    elements(target, target_box)[within(target_box)] = elements(source, source_box)[within(source_box)]
    return count(common)
