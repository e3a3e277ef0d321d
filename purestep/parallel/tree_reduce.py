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

from purestep.distributed import collectives, machines
from purestep.treesum import Node, TreeSum, rounds

Owners = Sequence[Sequence[Node]]


class Flat:
    """How a list of tensors is packed into flat ones: at least one for each dtype.

    Args:
        like: tensors of those shapes and dtypes; others are not looked at.
        limits: bytes at which a flat tensor is full, of the first one and of the others; by default none ever is.
        apart: numbers of tensors that share a flat one with one another only.

    Examples:
        >>> flat = Flat([torch.ones(2, 2), torch.tensor(3), torch.zeros(1)])
        >>> packed = flat.pack([torch.ones(2, 2), torch.tensor(3), torch.zeros(1)])
        >>> [p.tolist() for p in packed], [tuple(x.shape) for x in flat.unpack(packed)]
        ([[1.0, 1.0, 1.0, 1.0, 0.0], [3]], [(2, 2), (), (1,)])
        >>> Flat([torch.ones(3), torch.ones(3), torch.ones(1)], (8, 16)).groups
        [[0], [1, 2]]
    """

    def __init__(
        self, like: Sequence[Tensor], limits: tuple[int, int] | None = None, apart: frozenset[int] = frozenset()
    ) -> None:
        self.shapes = [x.shape for x in like]
        self.groups: list[list[int]] = []
        self.dtypes: list[torch.dtype] = []  # of each group
        filling: dict[tuple[torch.dtype, bool], int] = {}
        sizes: list[int] = []
        for i, x in enumerate(like):
            kind = x.dtype, i in apart
            group = filling.get(kind)
            # The first one is smaller, where a caller says so: its sum begins while gradients are still being computed.
            if group is None or (limits is not None and sizes[group] >= limits[group > 0]):
                group = filling[kind] = len(self.groups)
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

    def likes(self, device: torch.device) -> list[Tensor]:
        """Return flat tensors of these lengths and dtypes, with the memory of one element each."""
        kinds = zip(self.lengths, self.dtypes, strict=True)
        return [torch.empty(1, dtype=dtype, device=device).expand(sum(n)) for n, dtype in kinds]

    def unpack(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors again, as views of the flat ones."""
        return self._cut(flats, ())

    def unpack_rows(self, flats: Sequence[Tensor], count: int) -> list[Tensor]:
        """Return the tensors of `count` such packs, `[count, n]`, with the packs as first dim."""
        return self._cut(flats, (count,))

    def _cut(self, flats: Sequence[Tensor], rows: tuple[int, ...]) -> list[Tensor]:
        views: dict[int, Tensor] = {}
        for flat, members, lengths in zip(flats, self.groups, self.lengths, strict=True):
            for i, piece in zip(members, flat.split(lengths, dim=-1), strict=True):
                views[i] = piece.reshape((*rows, *self.shapes[i]))
        return [views[i] for i in range(len(self.shapes))]


def flat_like(
    values: Sequence[Tensor], limits: tuple[int, int] | None = None, apart: frozenset[int] = frozenset()
) -> Flat:
    """Return the `Flat` of some tensors, made once for each list of shapes and dtypes."""
    return _flat(tuple((x.shape, x.dtype) for x in values), limits, apart)


@functools.lru_cache(maxsize=256)
def _flat(
    kinds: tuple[tuple[torch.Size, torch.dtype], ...], limits: tuple[int, int] | None, apart: frozenset[int]
) -> Flat:
    return Flat([torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in kinds], limits, apart)


def packed(values: Sequence[Tensor]) -> Tensor:
    """Return a copy of tensors of one dtype as one flat tensor."""
    return torch.cat([x.reshape(-1) for x in values])


def add(a: Tensor, b: Tensor) -> Tensor:
    """Add two flat tensors, the earlier one first, which is overwritten."""
    return a.add_(b)


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
        self._nodes = {}  # their slices are sent, and their sums come back
        self._step, self._cut = "cut", Slices(rows, owners, group)

    def advance(self) -> None:
        """Wait for what is on its way, and begin what follows: to hand sums around, once they are added."""
        if self._step == "cut" and self._cut.further():
            slices = self._cut.result().nodes
            del self._cut
            self._step = "added"
            self._slices = {node: collectives.gather(x, self._group) for node, x in slices.items()}

    def result(self) -> dict[Node, Tensor]:
        """Return the sums, once they are here."""
        while self._step == "cut":
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


class WholeSum:
    """The sum of a flat tensor over all ranks, under way: in the fixed tree, or as the backend adds.

    Args:
        coming: what was launched.
    """

    def __init__(self, coming: Summing | collectives.Pending) -> None:
        self._coming = coming

    def advance(self) -> None:
        """Launch the second exchange of a sum in the tree."""
        if isinstance(self._coming, Summing):
            self._coming.advance()

    def result(self) -> Tensor:
        """Return the sum once it is here."""
        return whole_sum(self._coming) if isinstance(self._coming, Summing) else self._coming.wait()


def whole_sum(summing: Summing) -> Tensor:
    """Return the sum over the whole tree, once its parts are here."""
    total = TreeSum(add)
    for node, flat in summing.result().items():
        total.put(node, flat)
    whole: Tensor = total.result()
    return whole


class Slices:
    """Slices of partial sums on their way: row r of each member's goes to member r, which adds those it gets.

    Where the members are on several machines, those of a machine add theirs first, as far as the tree does, and one of
    them sends the sums to the other machines. Each addition is one of the tree's: the bits are those of one exchange.

    Args:
        rows: `[R, k, n]`, the slices of the k parts that this member holds, for each member.
        owners: the parts of each member, in the order of their ranks.
        group: the group.
    """

    def __init__(self, rows: Tensor, owners: Owners, group: dist.ProcessGroup | None) -> None:
        held, self._n = rows.shape[1:]
        grid = machines.grid(group)
        self._rest: Owners | None = None  # the parts of each machine, while they are not sent
        if grid is not None:
            sums = _sums_by(tuple(map(tuple, owners)), grid.places)
            # Where a machine adds nothing up by itself, as much would be sent twice.
            if sum(map(len, sums)) < sum(map(len, owners)):
                first = grid.places * (collectives.rank_in(group) // grid.places)
                self._rest, self._across = sums, grid.across
                owners, group = owners[first : first + grid.places], grid.inside
                # For the member of one's own machine that has the place of r, so for all machines at once.
                rows = rows.view(grid.machines, grid.places, held, self._n).permute(1, 2, 0, 3)
                rows = rows.reshape(grid.places, held, grid.machines * self._n)
        self._begin(rows, owners, group)

    def further(self) -> bool:
        """Wait for the sums of this machine and begin to send them to the others; tell whether that was done before."""
        if self._rest is None:
            return True
        sums, rest = self._added().nodes, self._rest
        rows = [x.view(len(rest), 1, self._n) for x in sums.values()] or [self._empty(len(rest))]
        self._rest = None
        self._begin(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1), rest, self._across)
        return False

    def result(self) -> TreeSum[Tensor]:
        """Return the sums of this member's slices, once they are here."""
        self.further()
        return self._added()

    def _empty(self, count: int) -> Tensor:
        return self._pending.result.new_empty(count, 0, self._n)

    def _begin(self, rows: Tensor, owners: Owners, group: dist.ProcessGroup | None) -> None:
        self._owners, self._width = owners, rows.shape[2]
        lengths = [len(own) * self._width for own in owners]
        self._pending = collectives.exchange(rows.reshape(-1), group, lengths, rows.shape[1] * self._width)

    def _added(self) -> TreeSum[Tensor]:
        return added(self._pending.wait().view(-1, self._width), self._owners)


@functools.lru_cache(maxsize=256)
def _sums_by(owners: tuple[tuple[Node, ...], ...], places: int) -> Owners:
    """Return the parts that remain of each so many members when they have added theirs, in the order of `added`."""
    each = [owners[first : first + places] for first in range(0, len(owners), places)]
    return [list(rounds(tuple(node for own in members for node in own)).nodes) for members in each]


def added(parts: Tensor, owners: Owners) -> TreeSum[Tensor]:
    """Add slices that came in, `[m, n]`, in the order of the tree as far as it goes; they may be overwritten."""
    # A level of the tree at once: one by one, a thousand ranks would be a thousand launches for each bucket.
    steps = rounds(tuple(node for own in owners for node in own))
    for kept, moved in steps.additions:
        parts[kept].add_(parts[moved])
    total = TreeSum(add)
    # A sum is a view of all that came in, the slices of every member; it has to outlive them by itself.
    total.nodes = {node: parts[row].clone() if steps.additions else parts[row] for node, row in steps.nodes.items()}
    return total


def rows_of(flat: Tensor, count: int) -> Tensor:
    """Cut a flat tensor into rows of the same length, filled up with zeros."""
    short = -flat.numel() % count
    return (torch.cat([flat, flat.new_zeros(short)]) if short else flat).view(count, -1)
