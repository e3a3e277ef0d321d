"""Sums over ranks of which each rank needs its own parts: the gradients of ZeRO 1.

Gradients are added up whole on each rank, over its microbatches; then each rank is sent its parts of them, and adds
those in the order of the tree. Half as much is sent as for whole sums, and nothing whole is left.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from purestep.distributed import collectives
from purestep.parallel.assignment import Shares
from purestep.parallel.compressed import scatter_sum, sum_into
from purestep.parallel.fsdp_layout import Row, Rows
from purestep.parallel.tree_reduce import Flat, Slices, Summing, whole_sum
from purestep.sharding.plan import Plan
from purestep.sharding.spec import Spec
from purestep.treesum import TreeSum, forest


class RowsOf:
    """How the flat tensors of a layout are cut into the parts of each rank.

    Args:
        plan: of the step.
        names: of the parameters, in the order of the layout; empty where all sums stay whole.
        layout: of whole gradients.
        specs: by name, where the parameters are updated of which each rank gets its part.
    """

    def __init__(self, plan: Plan, names: Sequence[str], layout: Flat, specs: Mapping[str, Spec]) -> None:
        self.layout = layout
        chosen = tuple((i, name, tuple(layout.shapes[i]), specs[name]) for i, name in enumerate(names) if name in specs)
        self.rows = _rows(plan, plan.mesh.shape, layout, chosen) if chosen else {}

    def of(self, bucket: int) -> Rows | None:
        """Return how a flat tensor is cut; None for one that stays whole."""
        return self.rows.get(bucket)

    def unpack(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of the layout as views of the flat ones: this rank's parts, or whole tensors."""
        found: dict[int, Tensor] = {}
        for bucket, (flat, members, lengths) in enumerate(
            zip(flats, self.layout.groups, self.layout.lengths, strict=True)
        ):
            rows = self.rows.get(bucket)
            if rows is not None:
                found.update(zip(members, rows.parts(flat, rows.rows), strict=True))
            else:
                pieces = zip(members, flat.split(lengths), strict=True)
                found.update((i, piece.view(self.layout.shapes[i])) for i, piece in pieces)
        return [found[i] for i in range(len(self.layout.shapes))]


Chosen = tuple[tuple[int, str, tuple[int, ...], Spec], ...]


@functools.lru_cache(maxsize=64)
def _rows(plan: Plan, sizes: tuple[int, ...], layout: Flat, chosen: Chosen) -> dict[int, Rows]:
    row = {i: Row.under(plan, name, shape, spec) for i, name, shape, spec in chosen}
    # A flat tensor is of tensors that are split, or of others: the layout keeps them apart.
    split = [k for k, members in enumerate(layout.groups) if members[0] in row]
    return {k: Rows(plan, [row[i] for i in layout.groups[k]]) for k in split}


class PartSum:
    """The sum over all ranks of this rank's parts of a flat tensor, under way.

    Args:
        trees: what this rank has added up; it is consumed.
        shares: who computes what.
        rows: how the flat tensor is cut.
        like: a flat tensor of that length, for a rank that has added up nothing.
        fast: whether ranks may add in any order.
        sent: the dtype in which ranks then exchange them; None for their own.
    """

    def __init__(
        self,
        trees: TreeSum[Tensor],
        shares: Shares,
        rows: Rows,
        like: Tensor,
        *,
        fast: bool,
        sent: torch.dtype | None,
    ) -> None:
        self._shares, self._sent = shares, sent
        self._width = sum(rows.lengths)
        self._like = like.new_empty(()).expand(self._width)  # of its length and dtype, without memory
        plan = shares.plan
        group = plan.mesh.group(*plan.shard_axes)
        self._coming: Slices | collectives.Pending
        if fast:
            flat = trees.result() if trees.nodes else torch.zeros_like(like)
            self._coming = scatter_sum(_cut(rows, flat), group, sent)
            return
        # One copy after the other: where the nodes are several, no more than one is there twice.
        held = [_cut(rows, trees.nodes.pop(node)) for node in list(trees.nodes)]
        cut = torch.stack(held, dim=1) if len(held) > 1 else held[0].unsqueeze(1) if held else None
        if cut is None:
            cut = like.new_empty(rows.count, 0, self._width)
        owners = [forest(shares.held(rank)) for rank in plan.mesh.ranks(*plan.shard_axes)]
        self._coming = Slices(cut, owners, group)

    def advance(self) -> None:
        """Launch the exchange between machines, where there are several."""
        if isinstance(self._coming, Slices):
            self._coming.further()

    def result(self) -> Tensor:
        """Return the flat tensor of this rank's parts, one after the other."""
        copies = self._shares.copies
        if isinstance(self._coming, Slices):
            return whole_sum(Summing(self._coming.result().nodes, self._shares.groups, copies, self._like))
        return sum_into(self._coming.wait(), copies, self._sent).wait()


def _cut(rows: Rows, flat: Tensor) -> Tensor:
    """Return `[R, n]`, the parts of each rank, of a flat tensor of whole ones."""
    pieces = flat.split([math.prod(row.shape) for row in rows.rows])
    return rows.cut([x.view(row.shape) for x, row in zip(pieces, rows.rows, strict=True)], rows.rows)
