"""Which processes of a job share a machine, and a group of processes as a grid: machines, and places on each.

Sums over ranks go through it to send less between machines. `mesh` prepares it with the groups of its axes. What a
launcher says of machines may be wrong: then more is sent between them than need be, and nothing else differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from purestep.distributed import control, launchers


@dataclasses.dataclass(frozen=True)
class Grid:
    """A group that has equally many members on each of several machines, those of a machine one after the other.

    Attributes:
        inside: the members on this machine.
        across: those of each machine that have this process's place on it.
        machines: their number.
        places: members on each.
    """

    inside: dist.ProcessGroup
    across: dist.ProcessGroup
    machines: int
    places: int


_owner: Any = None  # the default group that all below belongs to
_each = 1
_known: dict[dist.ProcessGroup, Grid] = {}


def grid(group: dist.ProcessGroup | None) -> Grid | None:
    """Return a group as a grid; None where it is on one machine, or nobody knows."""
    return None if group is None or _owner is not dist.group.WORLD else _known.get(group)


def prepare(group: dist.ProcessGroup, groups: Sequence[Sequence[int]]) -> None:
    """Make the groups of a grid, where there is one. Every process calls it at the same time.

    Args:
        group: that this process is in.
        groups: the ranks of this group and of all like it, each ascending; together they are all ranks.
    """
    global _owner, _each
    if _owner is not dist.group.WORLD:
        _known.clear()
        _each = agreed(control.gather(_told(), what="processes on each machine")) if control.size() >= 4 else 1
        _owner = dist.group.WORLD
    if group in _known or (parted := by_machine(groups, _each)) is None:
        return
    machines, places = len(parted[0]), len(parted[0][0])
    inside = [list(members) for each in parted for members in each]
    across = [list(members) for each in parted for members in zip(*each, strict=True)]
    near, far = (dist.new_subgroups_by_enumeration(found)[0] for found in (inside, across))
    _known[group] = Grid(near, far, machines, places)


def _told() -> int:
    """What the launcher says: how many processes this machine has, if they follow one another, and otherwise 1."""
    launch = launchers.launch_of()
    if launch is None or launch.rank != control.rank() or launch.rank % max(launch.local_size, 1) != launch.local_rank:
        return 1
    return launch.local_size


def agreed(told: Sequence[int]) -> int:
    """Return how many processes each machine has, from what each process was told; 1 where machines differ.

    Examples:
        >>> agreed([2, 2, 2, 2]), agreed([4, 4, 4, 4, 2, 2]), agreed([3, 3, 3, 3])
        (2, 1, 1)
    """
    return told[0] if len(set(told)) == 1 and len(told) % told[0] == 0 else 1


def by_machine(groups: Sequence[Sequence[int]], each: int) -> list[list[list[int]]] | None:
    """Return the ranks of each group, machine by machine; None where that is no grid, or one of a row or a column.

    Args:
        groups: ranks, ascending.
        each: processes of a machine.

    Examples:
        >>> by_machine([[0, 1, 2, 3]], 2), by_machine([[0, 2, 4, 6], [1, 3, 5, 7]], 4)
        ([[[0, 1], [2, 3]]], [[[0, 2], [4, 6]], [[1, 3], [5, 7]]])
        >>> by_machine([[0, 1], [2, 3]], 2) is by_machine([[0, 2], [1, 3]], 2) is by_machine([[0, 1, 2, 3]], 3) is None
        True
    """
    found = []
    for ranks in groups:
        parts: dict[int, list[int]] = {}
        for rank in ranks:
            parts.setdefault(rank // each, []).append(rank)
        found.append(list(parts.values()))
    shapes = {(len(parts), len(members)) for parts in found for members in parts}
    return found if len(shapes) == 1 and min(next(iter(shapes))) > 1 else None
