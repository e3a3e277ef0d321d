"""What a plan does to a state, as a table: where each leaf lives and how many bytes of it a rank holds.

It reads shapes and dtypes only, so the state may be on the meta device and the mesh may be of a machine that is not
here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from purestep import tree
from purestep.distributed.mesh import Mesh
from purestep.sharding.leaf_roles import Kind, follow
from purestep.sharding.spec import OFFLOADED, REPLICATED, Layout, Spec, box
from purestep.views import Block, Note, Printed, Table


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of a state under a plan.

    Attributes:
        path: printed path.
        kind: what it is: "params", "frozen", "buffers", "optimizer" or "other".
        leaf: dtype and whole shape.
        spec: where it lives.
        local: shape of what one rank holds.
        nbytes: bytes of that.
        unit: with which submodule it is gathered; None for what is never gathered in a step.
        updated: where it is updated; elsewhere than where it lives for the parameters of ZeRO 1 and 2.
        on_host: whether it is offloaded to the CPU, where the state is on a card.
        resident: whether it is of experts that tokens are sent to, and so never gathered.
        name: of the parameter that it is, or follows.
    """

    path: str
    kind: Kind
    leaf: str
    spec: Spec
    local: tuple[int, ...]
    nbytes: int
    unit: str | None
    updated: Spec = REPLICATED
    on_host: bool = False
    resident: bool = False
    name: str | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Description(Printed):
    """The rows of a state under a plan, on one rank; prints as a table."""

    mesh: Mesh
    rank: int
    rows: tuple[Row, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the state on the rank."""
        return sum(row.nbytes for row in self.rows)

    def placements(self) -> dict[str, Any]:
        """Return where each leaf lives, as JSON values by path: what to keep in a test, so that no layout changes
        unseen.
        """
        return {
            row.path: {"leaf": row.leaf, "spec": [list(e) for e in row.spec.entries], "local": list(row.local)}
            | ({"at": dict(row.spec.at)} if row.spec.at else {})
            for row in self.rows
        }

    def view(self) -> list[Block]:
        """Return the blocks that show it."""
        rows = [(r.path, r.leaf, str(r.spec), str(list(r.local)), r.nbytes) for r in self.rows]
        head = ("path", "leaf", "spec", "on a rank", "bytes")
        where = Note(f"{self.mesh!r}, rank {self.rank} of {self.mesh.world}")
        return [where, Table(head, rows, foot=("", "", "", "all", self.nbytes), wide=True)]


def describe(plan: Layout, value: object, *, rank: int = 0) -> Description:
    """Return where each leaf of a state lives under a plan; see `Plan.describe`."""
    sizes = dict(zip(plan.mesh.axes, plan.mesh.shape, strict=True))
    coordinate = plan.mesh.coordinate(rank)
    rows = []
    specs = tree.leaves(plan.specs(value))
    for followed, path, leaf, spec in zip(follow(value), tree.paths(value), tree.leaves(value), specs, strict=True):
        own = followed.kind in ("params", "frozen")
        local = box(spec, sizes, followed.shape, coordinate)[1]
        width = (
            leaf.element_size() if isinstance(leaf, Tensor) else getattr(getattr(leaf, "dtype", None), "itemsize", 0)
        )
        nbytes = width * _product(local)
        unit = plan.unit(followed.name) if own and followed.name is not None else None
        updated = spec
        if followed.kind == "params" and followed.name is not None:
            updated = plan.spec(followed.name, followed.shape, "optimizer")
        on_host = followed.kind in OFFLOADED[plan.offload]
        resident = own and plan.is_expert(followed.name or "")
        about = tree.describe(leaf), spec, local, nbytes, unit, updated, on_host, resident, followed.name
        rows.append(Row(path, followed.kind, *about))
    return Description(plan.mesh, rank, tuple(rows))


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total
