"""Meshes: the processes of a job as a grid with named axes.

A `Mesh` is a value: it can describe a machine that is not here. torch's DeviceMesh and its process groups are made when
they are first asked for, by every process in the same order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist

from purestep import devices
from purestep.arguments import checked
from purestep.distributed import control, machines
from purestep.errors import ConfigError, explain

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes of this job, after joining them; 1 for a process alone."""
    control.initialize()
    return control.size()


def this_rank() -> int:
    """Return the number of this process in its job: 0 without others."""
    return control.rank()


@checked(ConfigError)
@dataclasses.dataclass(frozen=True)
class Mesh:
    """A grid of processes with named axes; made by `mesh`. The rank is the row-major coordinate.

    Attributes:
        axes: names, outermost first; put axes whose processes talk most last, so that they share a machine.
        sizes: processes along each axis; one may be -1, which stands for what is left of the job.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        _check(self.axes, self.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Processes along each axis, with -1 resolved against the number of processes of this job.

        Raises:
            ConfigError: the other sizes do not divide the number of processes.
        """
        known = math.prod(n for n in self.sizes if n != -1)
        if -1 not in self.sizes:
            return self.sizes
        rest, left = divmod(world_size(), known)
        if left:
            raise ConfigError(
                explain(
                    f"the mesh does not fit the job: {known} does not divide {world_size()} processes",
                    where=repr(self),
                    why="the axis of size -1 takes what the others leave",
                    instead=f"start a multiple of {known} processes, or name other sizes",
                )
            )
        return tuple(rest if n == -1 else n for n in self.sizes)

    @property
    def world(self) -> int:
        """Number of processes in the mesh."""
        return math.prod(self.shape)

    def size(self, *axes: str) -> int:
        """Return the number of processes along an axis, or along several: the product; an unknown axis counts 1."""
        known = dict(zip(self.axes, self.shape, strict=True))
        return math.prod(known.get(axis, 1) for axis in axes)

    def coordinate(self, rank: int | None = None) -> dict[str, int]:
        """Return where a rank stands on each axis; this process by default."""
        rest = this_rank() if rank is None else rank
        found: dict[str, int] = {}
        for axis, size in reversed(list(zip(self.axes, self.shape, strict=True))):
            rest, found[axis] = divmod(rest, size)
        return {axis: found[axis] for axis in self.axes}

    def index(self, *axes: str, rank: int | None = None) -> int:
        """Return the row-major number of a rank among the processes along some axes, in the order given."""
        coordinate, number = self.coordinate(rank), 0
        for axis in axes:
            number = number * self.size(axis) + coordinate.get(axis, 0)
        return number

    def ranks(self, *axes: str, rank: int | None = None) -> list[int]:
        """Return the ranks that differ from a rank (this one by default) along these axes only, ascending."""
        here = self.coordinate(rank)
        same = [a for a in self.axes if a not in axes]
        return [r for r in range(self.world) if all(self.coordinate(r)[a] == here[a] for a in same)]

    @property
    def device_mesh(self) -> DeviceMesh:
        """torch's DeviceMesh of this job; every process makes it at the same time, once.

        Raises:
            ConfigError: the job has another number of processes than the mesh.
        """
        return _cached(self, "mesh", lambda: _make_device_mesh(self))

    @property
    def device(self) -> torch.device | None:
        """Where tensors have to live so that this process can send them: its card under NCCL or XCCL, the CPU under
        gloo alone; None in a job of one process, where any device will do."""
        if not dist.is_available() or not dist.is_initialized():
            return None
        return devices.of_backend(str(dist.get_backend()))

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """Return the process group of this process along some axes, or None where that is this process alone.

        Members are in the order of their ranks. Every process asks for the same groups in the same order.
        """
        wanted = tuple(a for a in self.axes if a in axes and self.size(a) > 1)
        if not wanted:
            return None
        check_world(self)
        return _cached(self, wanted, lambda: _make_group(self, wanted))

    def twin(self, *axes: str) -> dist.ProcessGroup | None:
        """Return a second group of the processes of `group`: what is sent over one does not wait for the other."""
        wanted = tuple(a for a in self.axes if a in axes and self.size(a) > 1)
        if not wanted:
            return None
        check_world(self)
        return _cached(self, ("twin", wanted), lambda: dist.new_subgroups_by_enumeration(_alike(self, wanted))[0])

    def __repr__(self) -> str:
        return f"mesh({dict(zip(self.axes, self.sizes, strict=True))})"


@checked(ConfigError)
def mesh(sizes: Mapping[str, int]) -> Mesh:
    """Describe the processes of a job as a grid with named axes.

    Args:
        sizes: processes by axis, outermost first. One size may be -1: what the others leave of the job, known when it
            is first needed.

    Returns:
        A Mesh, which is only a description: it may be of a machine that is not here.

    Raises:
        ConfigError: no axis, a size that is neither -1 nor positive, or more than one -1.

    Examples:
        >>> m = mesh({"data": 2, "fsdp": 4})
        >>> m.world, m.size("fsdp"), m.coordinate(5)
        (8, 4, {'data': 1, 'fsdp': 1})
        >>> mesh({"data": -1}).world       # one process, without torch.distributed
        1
    """
    return Mesh(tuple(sizes), tuple(sizes.values()))


def _check(axes: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    shown = f"mesh({dict(zip(axes, sizes, strict=False))})"
    problem = None
    if not axes or len(axes) != len(sizes):
        problem = "a mesh has at least one axis, and one size an axis"
    elif not all(isinstance(a, str) and a.isidentifier() for a in axes) or len(set(axes)) < len(axes):
        problem = "the axes of a mesh are different identifiers"
    elif not all(isinstance(n, int) and not isinstance(n, bool) and (n > 0 or n == -1) for n in sizes):
        problem = "sizes of a mesh are positive integers, or -1 for what is left"
    elif sizes.count(-1) > 1:
        problem = "at most one size of a mesh is -1"
    if problem:
        raise ConfigError(explain(problem, where=shown, instead='mesh({"data": 2, "fsdp": -1})'))


def check_world(mesh: Mesh) -> None:
    """Raise ConfigError unless the job has as many processes as the mesh."""
    if mesh.world != world_size():
        raise ConfigError(
            explain(
                f"the mesh has {mesh.world} processes, the job {world_size()}",
                where=repr(mesh),
                why="tensors are placed on the processes that run; another machine can only be planned for",
                instead=f"torchrun --nproc-per-node={mesh.world} train.py\nor plan.dry_run(state, ...), to see a plan",
            )
        )


_cache: dict[tuple[Any, ...], Any] = {}


def _cached(mesh: Mesh, key: object, make: Callable[[], T]) -> T:
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    # Groups die with the job's default group, of which a test may make several in one process.
    for stale in [k for k in _cache if k[0] is not world]:
        del _cache[stale]
    full = (world, mesh.axes, mesh.shape, key)
    if full not in _cache:
        _cache[full] = make()
    return cast(T, _cache[full])


def _make_device_mesh(mesh: Mesh) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    check_world(mesh)
    return init_device_mesh((mesh.device or torch.device("cpu")).type, mesh.shape, mesh_dim_names=mesh.axes)


def _make_group(mesh: Mesh, axes: tuple[str, ...]) -> dist.ProcessGroup | None:
    members = _alike(mesh, axes)
    if mesh.size(*axes) == mesh.world:
        group = dist.group.WORLD
    elif len(axes) == 1:
        group = mesh.device_mesh.get_group(axes[0])
    else:
        group = dist.new_subgroups_by_enumeration(members)[0]
    if group is not None:
        machines.prepare(group, members)
    return group


def _alike(mesh: Mesh, axes: tuple[str, ...]) -> list[list[int]]:
    """Return the ranks of each group along some axes, ascending."""
    found: dict[tuple[int, ...], list[int]] = {}  # by what these axes do not change
    for rank in range(mesh.world):
        found.setdefault(tuple(n for a, n in mesh.coordinate(rank).items() if a not in axes), []).append(rank)
    return list(found.values())
