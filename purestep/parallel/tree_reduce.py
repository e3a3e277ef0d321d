"""Sums over ranks: partial sums are exchanged and added where the fixed tree adds them, or by the backend.

`Flat` packs many tensors into few, so that a sum is one collective. Which rank holds which part of the tree is
arithmetic (`treesum.forest`), so nothing about it is sent. Sums are begun and ended apart; others go on between.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from purestep.distributed import collectives
from purestep.distributed._torch import foreach_add_
from purestep.treesum import Node, TreeSum, merged

Owners = Sequence[Sequence[Node]]


class Flat:
    """How a list of tensors is packed into flat ones: at least one for each dtype.

    Args:
        like: tensors of those shapes and dtypes; others are not looked at.
        limits: bytes at which a flat tensor is full, of the first one and of the others; by default none ever is.

    Examples:
        >>> flat = Flat([torch.ones(2, 2), torch.tensor(3), torch.zeros(1)])
        >>> packed = flat.pack([torch.ones(2, 2), torch.tensor(3), torch.zeros(1)])
        >>> [p.tolist() for p in packed], [tuple(x.shape) for x in flat.unpack(packed)]
        ([[1.0, 1.0, 1.0, 1.0, 0.0], [3]], [(2, 2), (), (1,)])
        >>> Flat([torch.ones(3), torch.ones(3), torch.ones(1)], (8, 16)).groups
        [[0], [1, 2]]
    """

    def __init__(self, like: Sequence[Tensor], limits: tuple[int, int] | None = None) -> None:
        self.shapes = [x.shape for x in like]
        self.groups: list[list[int]] = []
        self.dtypes: list[torch.dtype] = []  # of each group
        filling: dict[torch.dtype, int] = {}
        sizes: list[int] = []
        for i, x in enumerate(like):
            group = filling.get(x.dtype)
            # The first one is smaller, where a caller says so: its sum begins while gradients are still being computed.
            if group is None or (limits is not None and sizes[group] >= limits[group > 0]):
                group = filling[x.dtype] = len(self.groups)
                self.groups.append([])
                self.dtypes.append(x.dtype)
                sizes.append(0)
            self.groups[group].append(i)
            sizes[group] += x.numel() * x.element_size()
        self.lengths = [[self.shapes[i].numel() for i in members] for members in self.groups]
        self.home = {i: number for number, members in enumerate(self.groups) for i in members}

    def pack(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return a copy of the tensors, packed."""
        return [packed([values[i] for i in members]) for members in self.groups]

    def unpack(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors again, as views of the flat ones."""
        views: dict[int, Tensor] = {}
        for flat, members, lengths in zip(flats, self.groups, self.lengths, strict=True):
            for i, piece in zip(members, flat.split(lengths), strict=True):
                views[i] = piece.view(self.shapes[i])
        return [views[i] for i in range(len(self.shapes))]


def flat_like(values: Sequence[Tensor], limits: tuple[int, int] | None = None) -> Flat:
    """Return the `Flat` of some tensors, made once for each list of shapes and dtypes."""
    return _flat(tuple((x.shape, x.dtype) for x in values), limits)


@functools.lru_cache(maxsize=256)
def _flat(kinds: tuple[tuple[torch.Size, torch.dtype], ...], limits: tuple[int, int] | None) -> Flat:
    return Flat([torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in kinds], limits)


def packed(values: Sequence[Tensor]) -> Tensor:
    """Return a copy of tensors of one dtype as one flat tensor."""
    return torch.cat([x.reshape(-1) for x in values])


def add(a: Tensor, b: Tensor) -> Tensor:
    """Add two flat tensors, the earlier one first, which is overwritten."""
    return a.add_(b)


def _add_all(earlier: list[Tensor], later: list[Tensor]) -> list[Tensor]:
    """Add the flat tensors of two lists, those of the first list being overwritten: a launch for a hundred of them."""
    foreach_add_(earlier, later)
    return earlier


class Summing:
    """Parts of the tree that the members of a group hold, being added as far as they can be; all get all of it.

    Every member begins its sums in the same order, and calls `advance` and `result` in the same order.

    Args:
        nodes: the parts this member holds, flat tensors of one length. They may be overwritten.
        owners: the parts of each member, in the order of their ranks; some may have none.
        group: the group.
        like: a flat tensor of that length, for a member that holds nothing.
    """

    def __init__(
        self, nodes: Mapping[Node, Tensor], owners: Owners, group: dist.ProcessGroup | None, like: Tensor
    ) -> None:
        self._owners, self._group, self._n = owners, group, like.numel()
        self._nodes = dict(nodes)
        self._step = "done"
        if group is None or len(owners) == 1:
            return
        # Two ranks with one partial sum each swap it, in one round of messages instead of two.
        if len(owners) == 2 and len(owners[0]) == len(owners[1]) == 1:
            (self._mine,) = nodes.values()
            self._step, self._pending = "swapped", collectives.swap(self._mine, group)
            return
        count = len(owners)
        # Each member adds one slice of all partial sums, in the order of the tree, and hands its sum around: every rank
        # computes a part of the addition, and each addition happens once, so all have the same bits.
        held = [rows_of(x, count) for x in nodes.values()]
        rows = torch.stack(held, dim=1) if held else like.new_empty(count, 0, -(-self._n // count))
        self._step, self._width, self._pending = "cut", rows.shape[2], send(rows, owners, group)

    def advance(self) -> None:
        """Wait for the slices of this member, and begin to hand their sums around; nothing where there are none."""
        if self._step == "cut":
            slices = arrived(self._pending, self._width, self._owners).nodes
            self._step = "added"
            self._slices = {node: collectives.gather(x, self._group) for node, x in slices.items()}

    def result(self) -> dict[Node, Tensor]:
        """Return the sums, once they are here."""
        self.advance()
        if self._step == "swapped":
            theirs, total = self._pending.wait(), TreeSum(add)
            me = collectives.rank_in(self._group)
            for rank, (node,) in enumerate(self._owners):
                total.put(node, self._mine if rank == me else theirs)
            self._nodes = total.nodes
        if self._step == "added":
            self._nodes = {node: pending.wait().view(-1)[: self._n] for node, pending in self._slices.items()}
        self._step = "done"
        return self._nodes


def whole_sum(summing: Summing) -> Tensor:
    """Return the sum over the whole tree, once its parts are here."""
    total = TreeSum(add)
    for node, flat in summing.result().items():
        total.put(node, flat)
    whole: Tensor = total.result()
    return whole


def send(rows: Tensor, owners: Owners, group: dist.ProcessGroup | None) -> collectives.Pending:
    """Begin to send row r of `[R, k, n]` to member r of a group: for each a slice of the k parts that this one holds.

    `arrived` ends it.
    """
    n = rows.shape[2]
    return collectives.exchange(rows.reshape(-1), group, [len(own) * n for own in owners], rows.shape[1] * n)


def arrived(pending: collectives.Pending, n: int, owners: Owners) -> TreeSum:
    """Add the slices of n elements that came in, in the order of the tree."""
    parts = pending.wait().view(-1, n).unbind()
    total = TreeSum(add)
    nodes = (node for own in owners for node in own)
    total.nodes = merged(dict(zip(nodes, parts, strict=True)), _add_all)
    if len(parts) > len(total.nodes):
        # A sum is a view of all that came in, the slices of every member; it has to outlive them by itself.
        total.nodes = {node: part.clone() for node, part in total.nodes.items()}
    return total


def rows_of(flat: Tensor, count: int) -> Tensor:
    """Cut a flat tensor into rows of the same length, filled up with zeros."""
    short = -flat.numel() % count
    return (torch.cat([flat, flat.new_zeros(short)]) if short else flat).view(count, -1)
