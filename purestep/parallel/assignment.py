"""Who computes which microbatches of a batch: what every rank knows of every other, without a word."""

from __future__ import annotations

import functools

import torch.distributed as dist

from purestep.distributed.mesh import world_size
from purestep.sharding.plan import Plan
from purestep.treesum import Node, forest


class Shares:
    """Who computes which microbatches of a batch: what every rank knows of every other. Made once, by `shares`.

    Args:
        plan: the plan.
        count: number of microbatches (V).
        filled: how many of them are not empty; the first ones.
    """

    def __init__(self, plan: Plan, count: int, filled: int) -> None:
        self.plan, self.count, self.filled = plan, count, filled
        self.mine = plan.microbatches(count)
        self.batch_axes = (*plan.data_axes, *plan.shard_axes)

    def held(self, rank: int) -> list[int]:
        """Return the microbatches of a rank that are not empty."""
        return [i for i in self.plan.microbatches(self.count, rank=rank) if i < self.filled]

    @functools.cached_property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that compute different microbatches; None for this one alone."""
        return self.plan.mesh.group(*self.batch_axes)

    @functools.cached_property
    def copies(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same parts of parameters; None for this one alone."""
        return self.plan.mesh.group(*self.plan.data_axes)

    @functools.cached_property
    def owners(self) -> list[list[Node]]:
        """The parts of the tree that each rank of the batch has, when each adds its own."""
        return [forest(self.held(rank)) for rank in self.plan.mesh.ranks(*self.batch_axes)]

    @functools.cached_property
    def leaves(self) -> list[list[Node]]:
        """The microbatches of each rank of the batch, as parts of the tree of one value each."""
        return [[(0, i) for i in self.held(rank)] for rank in self.plan.mesh.ranks(*self.batch_axes)]

    @functools.cached_property
    def rounds(self) -> list[list[list[Node]]]:
        """For each round, what each rank of a group that shares parameters computes in it."""
        ranks = self.plan.mesh.ranks(*self.plan.shard_axes)
        chosen = [self.plan.microbatches(self.count, rank=rank) for rank in ranks]
        return [[[(0, i)] if i < self.filled else [] for i in indices] for indices in zip(*chosen, strict=True)]

    @functools.cached_property
    def groups(self) -> list[list[Node]]:
        """The parts of the tree that each group that shares parameters has, when it has added its own."""
        mesh, axes = self.plan.mesh, self.plan.shard_axes
        together = [
            [i for s in mesh.ranks(*axes, rank=r) for i in self.held(s)] for r in mesh.ranks(*self.plan.data_axes)
        ]
        return [forest(sorted(indices)) for indices in together]


@functools.lru_cache(maxsize=64)
def _shares(world: dist.ProcessGroup | None, plan: Plan, count: int, filled: int) -> Shares:
    return Shares(plan, count, filled)


def shares(plan: Plan, count: int, filled: int) -> Shares:
    """Return who computes which microbatches; the same object as long as the job has the same processes."""
    several = world_size() > 1  # joins those that torchrun started
    return _shares(dist.group.WORLD if several else None, plan, count, filled)
