"""How the parts of several parameters lie in one flat tensor; how whole ones are cut into rows and put together.

Row r of `[R, n]` is what member r of a group holds: a part of each parameter, the one after the other. Arithmetic and
copies only; nothing is sent from here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from purestep import tree
from purestep.distributed.mesh import this_rank
from purestep.errors import ConfigError, explain
from purestep.sharding import placement
from purestep.sharding.messages import copy_all, even_dim, slice_of
from purestep.sharding.plan import Plan
from purestep.sharding.spec import Box, Spec, box

_ALIGN = 16  # elements at which a parameter begins in gathered memory


@dataclasses.dataclass(eq=False)
class Row:
    """One parameter of a unit.

    Attributes:
        name: of the parameter.
        shape: whole, or the part of a tensor-parallel rank.
        boxes: `(offset, shape)` of the part of each member of the group.
        dim: of which the members hold equal runs, in their order; None where there is none.
        start: where it begins in gathered memory.
        at: where its part begins in a row.
    """

    name: str
    shape: tuple[int, ...]
    boxes: list[Box]
    dim: int | None
    start: int = 0
    at: int = 0

    def __post_init__(self) -> None:
        self.length = max(math.prod(shape) for _, shape in self.boxes)  # elements of a part in a row: of the largest
        self.strides = torch.empty(self.shape, device="meta").stride()

    @classmethod
    def of(cls, plan: Plan, name: str, leaf: Tensor) -> Row:
        """Describe a split leaf; `plan.model_axes` split what is gathered here once more."""
        spec = placement.spec_of_leaf(leaf)
        _check(plan, name, leaf, spec)
        return cls.under(plan, name, tuple(leaf.shape), spec)

    @classmethod
    def under(cls, plan: Plan, name: str, whole: tuple[int, ...], spec: Spec) -> Row:
        """Describe a tensor of a whole shape under a resolved spec."""
        mesh = plan.mesh
        sizes = dict(zip(mesh.axes, mesh.shape, strict=True))
        inner = Spec(*[tuple(a for a in axes if a in plan.shard_axes) for axes in spec.entries])
        outer = Spec(*[tuple(a for a in axes if a in plan.model_axes) for axes in spec.entries])
        shape = box(outer, sizes, whole, mesh.coordinate())[1]
        members = [mesh.coordinate(rank) for rank in mesh.ranks(*plan.shard_axes)]
        boxes = [box(inner, sizes, shape, coordinate) for coordinate in members]
        return cls.of_boxes(name, shape, boxes)

    @classmethod
    def of_boxes(cls, name: str, shape: tuple[int, ...], boxes: list[Box]) -> Row:
        """Describe a tensor of which the members of a group hold these parts."""
        return cls(name, shape, boxes, even_dim(boxes))

    @property
    def even(self) -> bool:
        """Whether the members hold equal runs of dim 0, in their order: below one another, they are the whole."""
        return self.dim == 0

    def runs(self, full: Tensor) -> Tensor:
        """Return the parts of all members as a view of the whole tensor, `[R, *part]`; `dim` is not None."""
        dim = self.dim or 0
        return full.unflatten(dim, (len(self.boxes), -1)).movedim(dim, 0)


def _check(plan: Plan, name: str, leaf: Tensor, spec: Spec) -> None:
    for axes in spec.entries:
        strange = [a for a in axes if a not in plan.shard_axes and a not in plan.model_axes]
        inner = [a in plan.shard_axes for a in axes]
        if strange or inner != sorted(inner):
            raise ConfigError(
                explain(
                    "a step cannot compute with this placement",
                    where=f"{name}: {tree.describe(leaf)}, {spec!r}",
                    why="it gathers parameters over the batch axes of its plan, and those split a dim last",
                    instead='state = plan.place(state), with the plan of the step; Spec(("tensor", "fsdp"))',
                )
            )


class Rows:
    """The parameters of a unit in rows.

    Args:
        plan: says how many members the group has.
        rows: the parameters, in order.
    """

    def __init__(self, plan: Plan, rows: Sequence[Row]) -> None:
        self.count = plan.mesh.size(*plan.shard_axes)
        self.rows = list(rows)
        self.by_name = {row.name: row for row in rows}
        self.mine = collective_index(plan)
        self.width = self.total = 0
        for row in self.rows:
            row.at, row.start = self.width, self.total
            self.width += row.length
            self.total += math.prod(row.shape)
            self.total += -self.total % _ALIGN
        self.lengths = [row.length for row in self.rows]

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Return this member's row: its parts, filled up."""
        pieces = []
        for row, part in zip(self.rows, parts, strict=True):
            pieces.append(part.reshape(-1))
            if short := row.length - part.numel():
                pieces.append(part.new_zeros(short))
        return torch.cat(pieces)

    def unpack(self, received: Tensor) -> Tensor:
        """Return gathered memory with every parameter whole, from the rows of all members `[R, width]`."""
        flat = received.new_empty(self.total)
        runs, into, come = [], [], []
        for row in self.rows:
            full = flat[row.start : row.start + math.prod(row.shape)]
            # Shards of dim 0 follow one another in memory, so the rows of all members, one below the other, are it.
            if row.even:
                runs.append(full.view(self.count, -1))
                continue
            runs.append(received.new_empty(self.count, row.length))
            shaped = full.view(row.shape)
            if row.dim is not None:
                into.append(row.runs(shaped))
                come.append(runs[-1].unflatten(1, row.boxes[0][1]))
                continue
            for (offset, shape), member in zip(row.boxes, runs[-1], strict=True):
                into.append(slice_of(shaped, (offset, shape)))
                come.append(member[: math.prod(shape)].view(shape))
        # One kernel in place of a copy for each parameter, and few for those whose shards are uneven.
        torch.split_with_sizes_copy(received, self.lengths, dim=1, out=runs)
        copy_all(into, come)
        return flat

    def wholes(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the parameters in gathered memory, as views of it."""
        return {r.name: flat[r.start : r.start + math.prod(r.shape)].view(r.shape) for r in self.rows}

    def cut(self, wholes: Sequence[Tensor], rows: Sequence[Row]) -> Tensor:
        """Return `[R, n]`: for each member its parts of some whole tensors, like those of `rows`."""
        if all(row.even for row in rows):
            return torch.cat([x.reshape(self.count, -1) for x in wholes], dim=1)
        # Zeros behind the shorter shards: they are summed with the others' and never read.
        make = wholes[0].new_zeros if any(row.dim is None for row in rows) else wholes[0].new_empty
        by_member = make(self.count, sum(row.length for row in rows))
        into, come, start = [], [], 0
        for even, run in itertools.groupby(zip(rows, wholes, strict=True), lambda pair: pair[0].even):
            if even:  # one kernel for all of them
                flat = [full.reshape(self.count, -1) for _, full in run]
                width = sum(x.shape[1] for x in flat)
                torch.cat(flat, dim=1, out=by_member[:, start : start + width])
                start += width
                continue
            for row, full in run:
                if row.dim is not None:
                    into.append(by_member[:, start : start + row.length].unflatten(1, row.boxes[0][1]))
                    come.append(row.runs(full))
                else:
                    for member, (offset, shape) in zip(by_member, row.boxes, strict=True):
                        into.append(member[start : start + math.prod(shape)].view(shape))
                        come.append(slice_of(full, (offset, shape)))
                start += row.length
        copy_all(into, come)
        return by_member

    def parts(self, row: Tensor, rows: Sequence[Row]) -> list[Tensor]:
        """Return this member's parts, as views of a row of those parameters."""
        shards, start = [], 0
        for r in rows:
            shape = r.boxes[self.mine][1]
            shards.append(row[start : start + math.prod(shape)].view(shape))
            start += r.length
        return shards


def collective_index(plan: Plan) -> int:
    """Return this process's number in the group that gathers."""
    return plan.mesh.ranks(*plan.shard_axes).index(this_rank())
