"""Sums over ranks: partial sums are exchanged and added where the fixed tree adds them, or by the backend.

`Flat` packs many tensors into one of each dtype, so that a sum is one collective. Which rank holds which part of the
tree is arithmetic (`treesum.forest`), so nothing about it is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from purestep.sharding import collectives
from purestep.treesum import Node, TreeSum

Flats = list[Tensor]


class Flat:
    """How a list of tensors is packed into one flat tensor of each dtype.

    Example:
        >>> flat = Flat([torch.ones(2, 2), torch.tensor(3), torch.zeros(1)])
        >>> packed = flat.pack([torch.ones(2, 2), torch.tensor(3), torch.zeros(1)])
        >>> [p.tolist() for p in packed], [tuple(x.shape) for x in flat.unpack(packed)]
        ([[1.0, 1.0, 1.0, 1.0, 0.0], [3]], [(2, 2), (), (1,)])
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.shapes = [x.shape for x in like]
        self.groups: dict[torch.dtype, list[int]] = {}
        for i, x in enumerate(like):
            self.groups.setdefault(x.dtype, []).append(i)
        self.lengths = [[self.shapes[i].numel() for i in at] for at in self.groups.values()]

    def pack(self, values: Sequence[Tensor]) -> Flats:
        """Return a copy of the tensors, one flat tensor a dtype."""
        return [torch.cat([values[i].reshape(-1) for i in at]) for at in self.groups.values()]

    def unpack(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors again, as views of the flat ones."""
        found: list[Any] = [None] * len(self.shapes)
        for flat, at, lengths in zip(flats, self.groups.values(), self.lengths, strict=True):
            for i, piece in zip(at, flat.split(lengths), strict=True):
                found[i] = piece.view(self.shapes[i])
        return found


def add(a: Flats, b: Flats) -> Flats:
    """Add two lists of flat tensors, the earlier one first."""
    return [torch.add(x, y) for x, y in zip(a, b, strict=True)]


def tree_sum(nodes: dict[Node, Flats], owners: Sequence[Sequence[Node]], group: Any, like: Flats) -> dict[Node, Flats]:
    """Add parts of the tree that the members of a group hold, as far as they can be added; all get all of the result.

    Args:
        nodes: the parts this member holds, each a list of flat tensors of the same lengths.
        owners: the parts of each member, in the order of their ranks; some may have none.
        group: the group.
        like: flat tensors of those lengths.
    """
    if group is None or len(owners) == 1:
        return nodes
    if len(owners) == 2 and len(owners[0]) == len(owners[1]) == 1:
        (mine,) = nodes.values()
        theirs = [p.wait() for p in [collectives.swap(x, group) for x in mine]]
        total = TreeSum(add)
        for rank, (node,) in enumerate(owners):
            total.put(node, mine if rank == collectives.rank_in(group) else theirs)
        return total.nodes
    lengths = [x.numel() for x in like]
    pieces = slices(nodes, owners, group, like)
    pending = {node: [collectives.gather(x, group) for x in flats] for node, flats in pieces.items()}
    return {
        node: [p.wait().view(-1)[:n] for p, n in zip(parts, lengths, strict=True)] for node, parts in pending.items()
    }


def slices(nodes: dict[Node, Flats], owners: Sequence[Sequence[Node]], group: Any, like: Flats) -> dict[Node, Flats]:
    """Like `tree_sum`, but each member gets its slice of the result: `[ceil(n / R)]`, the last ones filled up."""
    count = len(owners)
    sums: list[TreeSum] = []
    for k, pattern in enumerate(like):
        held = [rows_of(flats[k], count) for flats in nodes.values()]
        rows = torch.stack(held, dim=1) if held else pattern.new_empty(count, 0, -(-pattern.numel() // count))
        sums.append(received(rows, owners, group))
    return {node: [total.nodes[node][0] for total in sums] for node in sums[0].nodes}


def received(rows: Tensor, owners: Sequence[Sequence[Node]], group: Any) -> TreeSum:
    """Send row r to member r of a group, and add what comes in.

    Args:
        rows: `[R, k, n]`, for each member a slice of the k parts that this one holds.
        owners: the parts of each member.
        group: the group.
    """
    return arrived(send(rows, owners, group), rows.shape[2], owners)


def send(rows: Tensor, owners: Sequence[Sequence[Node]], group: Any) -> collectives.Pending:
    """Begin what `received` does; `arrived` ends it."""
    n = rows.shape[2]
    return collectives.exchange(rows.reshape(-1), group, [len(own) * n for own in owners], rows.shape[1] * n)


def arrived(pending: collectives.Pending, n: int, owners: Sequence[Sequence[Node]]) -> TreeSum:
    """Add the slices that came in, in the order of the tree."""
    parts = pending.wait().view(-1, n).unbind()
    total = TreeSum(add)
    for node, part in zip((node for own in owners for node in own), parts, strict=True):
        total.put(node, [part])
    return total


def rows_of(flat: Tensor, count: int) -> Tensor:
    """Cut a flat tensor into rows of the same length, filled up with zeros."""
    short = -flat.numel() % count
    return (torch.cat([flat, flat.new_zeros(short)]) if short else flat).view(count, -1)
