"""Who computes which microbatches of a batch: what every rank knows of every other, without a word."""

from __future__ import annotations

from purestep.sharding.plan import Plan
from purestep.treesum import Node, forest


class Shares:
    """Who computes which microbatches of a batch: what every rank knows of every other.

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

    def owners(self) -> list[list[Node]]:
        """Return the parts of the tree that each rank of the batch has, when each adds its own."""
        return [forest(self.held(rank)) for rank in self.plan.mesh.ranks(*self.batch_axes)]

    def leaves(self) -> list[list[Node]]:
        """Return the microbatches of each rank of the batch, as parts of the tree of one value each."""
        return [[(0, i) for i in self.held(rank)] for rank in self.plan.mesh.ranks(*self.batch_axes)]

    def turn(self, m: int) -> list[list[Node]]:
        """Return what each rank of a group that shares parameters computes in its m-th turn."""
        ranks = self.plan.mesh.ranks(*self.plan.shard_axes)
        chosen = [self.plan.microbatches(self.count, rank=r)[m] for r in ranks]
        return [[(0, i)] if i < self.filled else [] for i in chosen]

    def groups(self) -> list[list[Node]]:
        """Return the parts of the tree that each group that shares parameters has, when it has added its own."""
        mesh, axes = self.plan.mesh, self.plan.shard_axes
        together = [
            [i for s in mesh.ranks(*axes, rank=r) for i in self.held(s)] for r in mesh.ranks(*self.plan.data_axes)
        ]
        return [forest(sorted(indices)) for indices in together]
