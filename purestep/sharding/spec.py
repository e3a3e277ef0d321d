"""Specs: which mesh axes split which dim of a tensor, and which part of it a process then holds.

Everything here is arithmetic on shapes and names. `placements` and `spec_of` translate to and from torch's DTensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from purestep import tree
from purestep.arguments import checked
from purestep.distributed.mesh import Mesh
from purestep.errors import ConfigError, explain
from purestep.sharding.leaf_roles import Kind

if TYPE_CHECKING:
    from purestep.sharding._dtensor import Placement

Axes = str | Sequence[str] | None
Fallback = Literal["replicate", "error", "pad"]
Offload = Literal["optimizer", "params"]
# Kinds of leaves that live on the CPU.
OFFLOADED: dict[Offload | None, tuple[Kind, ...]] = {
    None: (),
    "optimizer": ("optimizer",),
    "params": ("optimizer", "params", "frozen"),
}
Box = tuple[tuple[int, ...], tuple[int, ...]]


def _as_axes(entry: object) -> tuple[str, ...]:
    axes = (
        (entry,) if isinstance(entry, str) or not isinstance(entry, (tuple, list, type(None))) else tuple(entry or ())
    )
    if not all(isinstance(a, str) for a in axes):
        raise ConfigError(
            explain(
                "an entry of a spec is a mesh axis, a tuple of axes, or None",
                where=f"Spec(..., {entry!r}, ...)",
                instead='Spec("fsdp", None)',
            )
        )
    return axes


def _shown(axes: tuple[str, ...]) -> Axes:
    return None if not axes else axes[0] if len(axes) == 1 else axes


@checked(ConfigError)
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Spec:
    """Which mesh axes split each dim of a tensor: `Spec("fsdp", None)` splits dim 0 over the axis `fsdp`.

    Dims that are not named are whole. Of several axes for one dim the first splits it into the largest parts:
    `Spec(("tensor", "fsdp"))` gives each `tensor` coordinate one contiguous part, split again over `fsdp`.

    Args:
        *entries: for each dim an axis, a tuple of axes, or None.
        auto: axes that split whichever dim they divide: the first one that does.
        fused: how many matrices lie side by side along the dim that a tensor axis splits, or their relative lengths:
            3 for query, key and value in one, `(8, 2, 2)` with fewer heads of key and value. Each rank then computes
            with its share of each of them.
        at: by axis the one coordinate that has the tensor: the other ranks along that axis have nothing of it.

    Raises:
        ConfigError: an axis is used twice, or `fused` is no positive number or several.

    Examples:
        >>> Spec("fsdp", None), Spec(None, ("tensor", "fsdp")), Spec()
        (Spec('fsdp'), Spec(None, ('tensor', 'fsdp')), Spec())
        >>> Spec("tensor", auto="fsdp")
        Spec('tensor', auto='fsdp')
        >>> Spec("tensor", fused=3)
        Spec('tensor', fused=3)
    """

    entries: tuple[tuple[str, ...], ...]
    auto: tuple[str, ...]
    fused: tuple[int, ...]
    at: tuple[tuple[str, int], ...]

    def __init__(
        self,
        *entries: Axes,
        auto: Axes = None,
        fused: int | Sequence[int] = 1,
        at: Mapping[str, int] | None = None,
    ) -> None:
        dims = [_as_axes(e) for e in entries]
        while dims and not dims[-1]:
            dims.pop()
        object.__setattr__(self, "entries", tuple(dims))
        object.__setattr__(self, "auto", _as_axes(auto))
        object.__setattr__(self, "fused", (1,) * fused if isinstance(fused, int) else tuple(fused))
        object.__setattr__(self, "at", tuple((at or {}).items()))
        if not self.fused or not all(isinstance(n, int) and n > 0 for n in self.fused):
            raise ConfigError(
                explain(
                    "fused= is a positive number of matrices, or their relative lengths",
                    where=f"Spec(..., fused={fused!r})",
                    instead='Spec("tensor", fused=3)   # query, key and value in one matrix',
                )
            )
        twice = sorted({a for a in self.axes if self.axes.count(a) > 1})
        if twice:
            raise ConfigError(
                explain(
                    f"the mesh axis {twice[0]!r} is used twice in a spec",
                    where=repr(self),
                    why="an axis splits a tensor once",
                    instead='Spec("fsdp", "tensor"), or Spec(("tensor", "fsdp")) for two axes on one dim',
                )
            )

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes that are named, in order of dims."""
        return tuple(a for entry in self.entries for a in entry) + self.auto + tuple(axis for axis, _ in self.at)

    def __repr__(self) -> str:
        shown = [repr(_shown(e)) for e in self.entries] + ([f"auto={_shown(self.auto)!r}"] if self.auto else [])
        if len(self.fused) > 1:
            shown.append(f"fused={len(self.fused) if set(self.fused) == {1} else self.fused}")
        if self.at:
            shown.append(f"at={dict(self.at)}")
        return f"Spec({', '.join(shown)})"


def blocks_of(length: int, fused: Sequence[int], parts: int) -> tuple[int, ...] | None:
    """Return the lengths of the matrices that lie side by side along a dim, None if parts do not divide them all.

    Examples:
        >>> blocks_of(12, (1, 1, 1), 2), blocks_of(12, (4, 1, 1), 2), blocks_of(12, (1,), 5)
        ((4, 4, 4), (8, 2, 2), None)
    """
    unit, rest = divmod(length, sum(fused))
    blocks = tuple(unit * n for n in fused)
    return None if rest or not length or any(n % parts for n in blocks) else blocks


REPLICATED = Spec()
Rules = Sequence[tuple[tree.Filter, Spec]]


@dataclasses.dataclass(frozen=True)
class Both:
    """A filter of names that two filters let through; products of plans make it."""

    first: tree.Filter
    second: tree.Filter

    def __call__(self, name: str) -> bool:
        return tree.matches(self.first, name) and tree.matches(self.second, name)


class Layout(Protocol):
    """What those who place, describe or check tensors ask of a plan: where each tensor lives.

    `Plan` is the one class that has it. Files that a plan itself calls take a `Layout`, so that none imports the plan.
    """

    def __hash__(self) -> int: ...

    @property
    def mesh(self) -> Mesh:
        """The processes."""

    @property
    def rules(self) -> Rules:
        """Ordered `(filter, Spec)` pairs over dotted names of parameters."""

    @property
    def units(self) -> str | tuple[str, ...] | None:
        """Globs of submodules whose parameters are gathered together."""

    @property
    def offload(self) -> Offload | None:
        """What lives on the CPU between the updates of a state on a card."""

    def spec(self, name: str, shape: Sequence[int], kind: Kind = "params") -> Spec:
        """Return where a parameter of a shape lives, or what follows it."""

    def specs(self, value: object) -> Any:
        """Return a tree like `value` with the Spec of each leaf."""

    def unit(self, name: str) -> str:
        """Return the submodule with which a parameter is gathered; "" is the root."""

    def is_expert(self, name: str) -> bool:
        """Tell whether a parameter is of experts that are split: tokens come to it, and it is not gathered."""


def resolve(
    spec: Spec,
    sizes: Mapping[str, int],
    shape: Sequence[int],
    *,
    fallback: Fallback,
    min_size: int = 0,
    where: str = "tensor",
) -> Spec:
    """Return a spec for one shape on one mesh: automatic axes have a dim, axes of size 1 and what cannot be are gone.

    Args:
        spec: the wish.
        sizes: size of each mesh axis.
        shape: of the tensor.
        fallback: what happens to an axis that the mesh does not have, or whose size does not divide the dim:
            "replicate" leaves it out, "error" raises, "pad" splits the dim unevenly, as `torch.chunk` does.
        min_size: automatic axes leave tensors of fewer elements whole.
        where: name of the tensor, for errors.

    Raises:
        ConfigError: more entries than dims, or what `fallback="error"` refuses.

    Examples:
        >>> resolve(Spec(auto="fsdp"), {"fsdp": 4}, (6, 8), fallback="replicate")
        Spec(None, 'fsdp')
        >>> resolve(Spec("fsdp"), {"fsdp": 4}, (6, 8), fallback="replicate")
        Spec()
    """
    where = f"{where}: {list(shape)} under {spec!r}"
    if len(spec.entries) > len(shape):
        raise ConfigError(
            explain(
                f"a spec names {len(spec.entries)} dims of a tensor that has {len(shape)}",
                where=where,
                instead="one entry a dim; a rule whose glob matches these tensors only",
            )
        )
    unknown = [a for a in spec.axes if a not in sizes]
    if unknown and fallback == "error":
        raise ConfigError(
            explain(
                f"the mesh has no axis {unknown[0]!r}",
                where=where,
                why=f"its axes are {', '.join(sizes)}",
                instead="name an axis of the mesh, or fallback='replicate' to leave out those it does not have",
            )
        )
    dims = [
        _fitting(spec.entries[d] if d < len(spec.entries) else (), sizes, n, fallback, where)
        for d, n in enumerate(shape)
    ]
    auto = tuple(a for a in spec.auto if sizes.get(a, 1) > 1)
    if auto and math.prod(shape) >= max(1, min_size) and shape:
        _place_auto(dims, auto, sizes, shape, fallback, where)
    return Spec(*dims)


def _fitting(axes: tuple[str, ...], sizes: Mapping[str, int], n: int, fallback: Fallback, where: str) -> Axes:
    kept: list[str] = []
    for axis in axes:
        size = sizes.get(axis, 1)
        if size == 1:
            continue
        if n % size == 0 and n > 0:
            kept.append(axis)
            n //= size
        elif fallback == "error":
            raise ConfigError(_indivisible(f"{n} elements along a dim", {axis: size}, where))
        elif fallback == "pad" and n > 0:
            # An uneven split has to be the finest one: parts of different sizes cannot be split alike.
            return (*kept, axis)
    return tuple(kept)


def _place_auto(
    dims: list[Any],
    auto: tuple[str, ...],
    sizes: Mapping[str, int],
    shape: Sequence[int],
    fallback: Fallback,
    where: str,
) -> None:
    need = math.prod(sizes[a] for a in auto)
    left = [n // math.prod(sizes[a] for a in dims[d]) for d, n in enumerate(shape)]
    even = [d for d, n in enumerate(shape) if n % math.prod(sizes[a] for a in dims[d]) == 0]
    for d in even:
        if left[d] % need == 0:
            dims[d] = (*dims[d], *auto)
            return
    if fallback == "error":
        raise ConfigError(_indivisible("no dim", {a: sizes[a] for a in auto}, where))
    if fallback == "pad" and even and len(auto) == 1:
        widest = max(even, key=lambda d: left[d])
        dims[widest] = (*dims[widest], *auto)


def _indivisible(what: str, sizes: Mapping[str, int], where: str) -> str:
    named = " x ".join(f"{a} ({n})" for a, n in sizes.items())
    verb = "is divisible" if what == "no dim" else "are not divisible"
    return explain(
        f"{what} {verb} by {named}",
        where=where,
        instead="fallback='replicate' keeps such tensors whole on every rank; fallback='pad' splits them unevenly",
    )


def box(spec: Spec, sizes: Mapping[str, int], shape: Sequence[int], coordinate: Mapping[str, int]) -> Box:
    """Return `(offset, shape)` of the part of a tensor that a coordinate of the mesh holds, with `torch.chunk`'s cuts.

    Examples:
        >>> [box(Spec("fsdp"), {"fsdp": 4}, (6, 2), {"fsdp": i}) for i in (0, 2, 3)]
        [((0, 0), (2, 2)), ((4, 0), (2, 2)), ((6, 0), (0, 2))]
    """
    offset, extent = [0] * len(shape), list(shape)
    for dim, axes in enumerate(spec.entries):
        for axis in axes:
            size = sizes.get(axis, 1)
            part = -(-extent[dim] // size)
            start = min(coordinate.get(axis, 0) * part, extent[dim])
            offset[dim] += start
            extent[dim] = min(part, extent[dim] - start)
    if any(coordinate.get(axis, 0) != home for axis, home in spec.at):
        return tuple(offset), (0,) * len(extent)
    return tuple(offset), tuple(extent)


# --- torch's placements -----------------------------------------------------------------------------------------------


def placements(spec: Spec, sizes: Mapping[str, int]) -> tuple[Placement, ...]:
    """Return torch's placement on each mesh axis, in the order of the mesh, of a resolved spec."""
    from purestep.sharding._dtensor import Home, Replicate, Shard, StridedShard

    order = list(sizes)
    found: dict[str, Any] = {axis: Home(home) for axis, home in spec.at}
    for dim, axes in enumerate(spec.entries):
        for i, axis in enumerate(axes):
            # torch splits in the order of the mesh; it calls an axis strided when later ones split before it.
            before = math.prod(sizes[a] for a in axes[:i] if order.index(a) > order.index(axis))
            found[axis] = Shard(dim) if before == 1 else StridedShard(dim, split_factor=before)
    return tuple(found.get(axis, Replicate()) for axis in order)


def spec_of(placements: Sequence[Placement], sizes: Mapping[str, int]) -> Spec:
    """Return the spec of torch's placements; what `placements` made.

    Raises:
        ConfigError: a placement that no spec stands for, as `Partial`.
    """
    from purestep.sharding._dtensor import Home

    dims: dict[int, list[str]] = {}
    at: dict[str, int] = {}
    for axis, placement in reversed(list(zip(sizes, placements, strict=True))):
        if placement.is_replicate():
            continue
        if isinstance(placement, Home):
            at[axis] = placement.coordinate
            continue
        if not hasattr(placement, "dim"):
            raise ConfigError(explain(f"a tensor of a state is whole or split, not {placement}", where=f"axis {axis}"))
        later = dims.setdefault(placement.dim, [])
        factor, position = getattr(placement, "split_factor", 1), 0
        while factor > 1 and position < len(later):
            factor //= sizes[later[position]]
            position += 1
        later.insert(position, axis)
    return Spec(*[dims.get(d, ()) for d in range(max(dims, default=-1) + 1)], at=at)
