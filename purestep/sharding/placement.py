"""Placing a state: whole tensors to DTensors of local shards and back, and what part of a tensor is here.

At rest a split leaf is a DTensor; a leaf that is whole on every rank stays a plain tensor. Inside of a step there are
only the local tensors, which `local` takes out and `rewrap` puts back.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from purestep import _torch, bits, tree
from purestep.distributed import collectives
from purestep.distributed.mesh import Mesh, check_world, this_rank
from purestep.errors import ConfigError, explain
from purestep.sharding.leaf_roles import follow
from purestep.sharding.messages import Message, copies, is_even, slice_of
from purestep.sharding.spec import OFFLOADED, Box, Layout, Spec, box, placements, spec_of
from purestep.sharding.unmatched_rules import check_matches

if TYPE_CHECKING:
    from purestep.sharding._dtensor import DTensorSpec

T = TypeVar("T")


def place(plan: Layout, value: T, device: torch.device | None = None) -> T:
    """Return a state whose leaves live where a plan says.

    It needs no communication when every rank holds the same whole values, as after `init` under one seed. Leaves that
    are split already, by this or another plan, are taken as they are, or gathered and split anew: then every rank calls
    it.

    Args:
        plan: the plan.
        value: a state, or any pytree; see `Plan.specs`.
        device: where steps compute; see `homes_of`.

    Returns:
        The same tree, on the device that the mesh sends tensors from; what the plan offloads, on the CPU. Leaves that
        are whole, and there already, are the very tensors that were given; parts are copies.

    Raises:
        ConfigError: a rule or an entry of `units` matches nothing in a state, or the plan is for another job.

    Examples:
        >>> from purestep.sharding import fsdp
        >>> params = {"w": torch.ones(4, 4)}
        >>> place(fsdp(), params)["w"] is params["w"]    # one process holds everything
        True
    """
    check_matches(plan, value)
    specs, homes = plan.specs(value), homes_of(plan, value, device)
    # On one process nothing is sharded, and torch's DTensor, which takes seconds to import, is not needed.
    if all(not spec.axes for spec in tree.leaves(specs)):
        value = gather(value)
        leaves, structure = tree.flatten(value)
        moved = list(map(_at, leaves, homes))
        return value if all(map(operator.is_, leaves, moved)) else tree.unflatten(structure, moved)
    check_world(plan.mesh)
    leaves, structure = tree.flatten(value)
    return tree.unflatten(
        structure,
        [_placed(plan, x, spec, home) for x, spec, home in zip(leaves, tree.leaves(specs), homes, strict=True)],
    )


def homes_of(plan: Layout, value: object, device: torch.device | None = None) -> list[torch.device | None]:
    """Return the device of each leaf of a tree under a plan; None leaves a leaf where it is.

    Args:
        plan: says what is offloaded.
        value: the tree.
        device: where steps compute; by default where the mesh sends tensors from, or the card that some leaf is on.
    """
    leaves = tree.leaves(value)
    if device is None:
        cards = (x.device for x in leaves if isinstance(x, Tensor) and x.device.type not in HOSTS)
        device = plan.mesh.device or next(cards, None)
    if plan.offload is None or device is None or device.type in HOSTS:
        return [device] * len(leaves)
    return [_CPU if leaf.kind in OFFLOADED[plan.offload] else device for leaf in follow(value)]


HOSTS = ("cpu", "meta")
_CPU = torch.device("cpu")


def _placed(plan: Layout, leaf: object, spec: Spec, home: torch.device | None) -> object:
    if not isinstance(leaf, Tensor):
        return leaf
    if is_split(leaf):
        if _torch.layout_of(leaf).mesh == plan.mesh.device_mesh and spec_of_leaf(leaf) == spec:
            here = _torch.local_tensor(leaf)
            moved = _at(here, home)
            return leaf if moved is here else _torch.from_part(type(leaf), moved, _torch.layout_of(leaf))
        leaf = full(_at_sender(plan, leaf))
    if not spec.axes:
        return _at(leaf, home)
    return wrap(plan, _at(cut(plan, leaf, spec), home), spec, tuple(leaf.shape))


def _at_sender(plan: Layout, leaf: Tensor) -> Tensor:
    """Return a split leaf whose part is where a process group can send it from."""
    here = _torch.local_tensor(leaf)
    moved = _at(here, plan.mesh.device)
    return leaf if moved is here else _torch.from_part(type(leaf), moved, _torch.layout_of(leaf))


def _at(leaf: Any, device: torch.device | None) -> Any:
    """Return a tensor with memory on a device: page-locked where it is to be copied to a card from."""
    if device is None or not isinstance(leaf, Tensor) or leaf.is_meta or leaf.device == device:
        return leaf
    moved = leaf.to(device)
    return moved.pin_memory() if moved.is_cpu and torch.cuda.is_available() else moved


def cut(plan: Layout, whole: Tensor, spec: Spec) -> Tensor:
    """Return a copy of the part of a whole tensor that this rank holds under a resolved spec, contiguous."""
    return cuts(plan, [whole], [spec])[0]


def cuts(plan: Layout, wholes: Sequence[Tensor], specs: Sequence[Spec]) -> list[Tensor]:
    """Return copies of the parts of whole tensors that this rank holds under resolved specs, contiguous."""
    parts = [slice_of(x, box_here(plan, x.shape, spec)) for x, spec in zip(wholes, specs, strict=True)]
    return copies([part.detach() for part in parts])


def box_here(plan: Layout, shape: Sequence[int], spec: Spec) -> Box:
    """Return `(offset, shape)` of the part of a tensor that this rank holds under a resolved spec."""
    sizes = dict(zip(plan.mesh.axes, plan.mesh.shape, strict=True))
    return box(spec, sizes, shape, plan.mesh.coordinate())


def wrap(plan: Layout, shard: Tensor, spec: Spec, shape: tuple[int, ...]) -> Tensor:
    """Return the DTensor of a shape whose part on this rank is `shard`."""
    from purestep.sharding import _dtensor

    sizes = dict(zip(plan.mesh.axes, plan.mesh.shape, strict=True))
    mesh, placed = plan.mesh.device_mesh, placements(spec, sizes)
    layout = _dtensor.layout(mesh, placed, shape, _contiguous(shape), shard.dtype)
    return _torch.from_part(_dtensor.AtHome if spec.at else _dtensor.DTensor, shard, layout)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


# --- in a step --------------------------------------------------------------------------------------------------------


is_split = _torch.is_dtensor


def part_of(leaf: T) -> T:
    """Return the local part of a split leaf, and any other leaf itself."""
    return cast(T, _torch.local_tensor(leaf)) if is_split(leaf) else leaf


def local(value: T) -> T:
    """Return a tree with the local part of each split leaf; other leaves are themselves."""
    return tree.map(part_of, value)


def rewrap(values: T, like: object) -> T:
    """Return a tree of local tensors with each leaf split again as the leaf of `like` is; `local` undone.

    Raises:
        ConfigError: a local tensor does not have the shape of the part it stands for.
    """
    return cast(T, tree.map(_rewrapped, values, like))


def _rewrapped(part: Tensor, like: object) -> Tensor:
    if not is_split(like):
        return part
    here = _torch.local_tensor(like)
    if part.shape != here.shape:
        where = f"{tree.describe(part)} for {tree.describe(here)} of {tree.describe(like)}"
        raise ConfigError(explain("a local tensor has another shape than the part it stands for", where=where))
    layout = _torch.layout_of(like)
    if part.dtype != like.dtype:
        from purestep.sharding._dtensor import with_dtype

        layout = with_dtype(layout, part.dtype)
    return _torch.from_part(type(like), part, layout)


# --- is it where it should be? ----------------------------------------------------------------------------------------


def check_plain(state: object) -> None:
    """Refuse a state with split parameters, where a step or an evaluation has no plan to gather them with.

    Raises:
        ConfigError: names the first of them.
    """
    params = getattr(state, "params", None)
    if not isinstance(params, dict) or not set(map(type, params.values())) - {Tensor}:
        return
    split = next((name for name, leaf in params.items() if is_split(leaf)), None)
    if split is not None:
        raise ConfigError(needs_plan(f"state.params[{split!r}]", params[split]))


def needs_plan(path: str, leaf: Tensor) -> str:
    """Return the text of the error about a split leaf that was given to a step without a plan."""
    return explain(
        "the state is placed by a plan, and the step has none",
        where=f"{path}: {tree.describe(leaf)}, {spec_of_leaf(leaf)}",
        why="this process holds a part of the tensor, and only the plan says how to compute with it",
        instead="ps.make_step(loss_fn, tx, plan=plan), ps.make_eval(loss_fn, plan=plan)   # the plan of the state\n"
        "or state = plan.gather(state)   # the whole state on every rank",
    )


def check_placed(plan: Layout, params: Mapping[str, Tensor]) -> None:
    """Refuse parameters that do not live where the plan of a step says, on a job of several processes.

    Steps call it each time: a layout that was right before is only looked up.

    Raises:
        ConfigError: names the first parameter that does not.
    """
    layout = tuple([(n, x.shape, _layout(x)) for n, x in params.items()])
    _check_layout(plan, plan.mesh.shape, layout)


def _layout(leaf: Tensor) -> DTensorSpec | None:
    return _torch.layout_of(leaf) if is_split(leaf) else None


@functools.lru_cache(maxsize=64)
def _check_layout(
    plan: Layout, sizes: tuple[int, ...], layout: tuple[tuple[str, torch.Size, DTensorSpec | None], ...]
) -> None:
    named = dict(zip(plan.mesh.axes, sizes, strict=True))
    for name, shape, held in layout:
        wanted = plan.spec(name, tuple(shape))
        if held is None:
            right = not wanted.axes
        else:
            here = held.mesh == plan.mesh.device_mesh
            right = bool(wanted.axes) and here and tuple(held.placements) == placements(wanted, named)
        if right:
            continue
        now = "whole on every rank" if held is None else f"placed by {held.placements} on {held.mesh}"
        raise ConfigError(
            explain(
                "the state is not placed by the plan of the step",
                where=f"state.params[{name!r}]: {list(shape)}, {now}; the plan says {wanted} on {plan.mesh!r}",
                instead="state = ps.init(model, tx, seed=0, plan=plan)\n"
                "or state = plan.place(state)   # a state that exists",
            )
        )


# --- what is where ----------------------------------------------------------------------------------------------------


def _sizes(leaf: Tensor) -> dict[str, int]:
    mesh = _torch.layout_of(leaf).mesh
    names = mesh.mesh_dim_names or tuple(str(i) for i in range(mesh.ndim))
    return dict(zip(names, mesh.shape, strict=True))


def spec_of_leaf(leaf: Tensor) -> Spec:
    """Return the resolved spec of a split leaf."""
    return spec_of(_torch.layout_of(leaf).placements, _sizes(leaf))


def _coordinate(leaf: Tensor) -> Mapping[str, int]:
    return dict(zip(_sizes(leaf), _torch.layout_of(leaf).mesh.get_coordinate() or (), strict=True))


def shard_of(leaf: Tensor) -> Box:
    """Return `(offset, shape)` of the part of a tensor that this rank holds: all of it for a plain tensor."""
    if not is_split(leaf):
        return (0,) * leaf.dim(), tuple(leaf.shape)
    return box(spec_of_leaf(leaf), _sizes(leaf), leaf.shape, _coordinate(leaf))


def is_owner(leaf: Tensor, *, among: Sequence[str] | None = None) -> bool:
    """Tell whether this rank is the first of those that hold the same part of a tensor: the one that writes it.

    Args:
        leaf: a leaf of a state.
        among: look only at the ranks along these axes of the mesh of a split leaf; at all by default.
    """
    if not is_split(leaf):
        return this_rank() == 0
    split, here = spec_of_leaf(leaf).axes, _coordinate(leaf)
    return all(here[a] == 0 for a in here if a not in split and (among is None or a in among))


def gather(value: T) -> T:
    """Return a tree of full plain tensors; every rank calls it when leaves are split."""
    leaves, structure = tree.flatten(value)
    found = iter(fulls([leaf for leaf in leaves if is_split(leaf)]))
    return cast(T, tree.unflatten(structure, [next(found) if is_split(leaf) else leaf for leaf in leaves]))


def full(leaf: Tensor) -> Tensor:
    """Return the full tensor of a split one, on every rank of its mesh; every rank calls it."""
    return fulls([leaf])[0]


def fulls(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return the full tensors of split ones; every rank calls it. Those that are split over the same ranks are gathered
    together, some megabytes at a time."""
    found: list[Any] = [None] * len(leaves)
    for members in _messages(tuple([(_torch.layout_of(x), x.shape, x.dtype) for x in leaves])):
        message, group = members.message, members.mesh.group(*members.axes)
        sent = message.pack([_torch.local_tensor(leaves[i]) for i in members.of])
        received = collectives.gather(sent, group).wait()
        for i, tensor in zip(members.of, message.unpack(received), strict=True):
            found[i] = tensor
    return found


# Digests, differences and `to_module` take the full tensor of a split leaf; only this file makes such leaves.
bits.gather_split_with(full)

_MOST_BYTES = 32 << 20  # of full tensors from which a message takes no more


@dataclasses.dataclass
class _Gathered:
    """Tensors that are gathered by one message: their positions, and along which axes of which mesh."""

    of: list[int]
    mesh: Mesh
    axes: tuple[str, ...]
    message: Message


@functools.lru_cache(maxsize=64)
def _messages(kinds: tuple[tuple[DTensorSpec, torch.Size, torch.dtype], ...]) -> list[_Gathered]:
    """Return how tensors of these layouts, full shapes and dtypes are gathered."""
    groups: dict[Any, list[int]] = {}
    sizes: dict[Any, int] = {}
    parts = []
    for i, (layout, shape, dtype) in enumerate(kinds):
        axes = layout.mesh.mesh_dim_names or tuple(str(k) for k in range(layout.mesh.ndim))
        mesh = dict(zip(axes, layout.mesh.shape, strict=True))
        spec = spec_of(layout.placements, mesh)
        parts.append([box(spec, mesh, shape, at) for at in _grid(spec.axes, mesh)])
        kind = tuple(mesh.items()), tuple(a for a in mesh if a in spec.axes), is_even(parts[-1])
        number = sizes.get(kind, 0) // _MOST_BYTES
        sizes[kind] = sizes.get(kind, 0) + shape.numel() * dtype.itemsize
        groups.setdefault((*kind, number), []).append(i)
    return [
        _Gathered(
            of,
            Mesh(tuple(a for a, _ in mesh), tuple(n for _, n in mesh)),
            axes,
            Message([tuple(kinds[i][1]) for i in of], [kinds[i][2] for i in of], [parts[i] for i in of]),
        )
        for (mesh, axes, _, _), of in groups.items()
    ]


def _grid(axes: tuple[str, ...], sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Return the coordinates along some axes, in the order of the mesh, the last axis fastest."""
    grid: list[dict[str, int]] = [{}]
    for axis in sizes:
        if axis in axes:
            grid = [c | {axis: i} for c in grid for i in range(sizes[axis])]
    return grid


def parts_like(wholes: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of the parts of whole tensors that this rank holds of split leaves."""
    return copies([slice_of(whole, shard_of(leaf)) for whole, leaf in zip(wholes, leaves, strict=True)])
