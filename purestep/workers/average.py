"""Which process holds which workers, the sum over all of them, and the average at the end of a round.

Owns what is sent: the means of a round as one sum over ranks, and the metrics of a step. Sums are taken in the order of
the workers by the fixed tree, so that their bits do not depend on which process holds which worker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from purestep import tree
from purestep.distributed import collectives
from purestep.distributed.mesh import world_size
from purestep.errors import ConfigError, explain
from purestep.metrics import Metric
from purestep.microbatch import Accumulation, Partial, merge
from purestep.optim.base import GradientTransformation
from purestep.parallel.assignment import shares
from purestep.parallel.same_inputs import compare_sizes
from purestep.parallel.small_exchange import exchange_small
from purestep.parallel.tree_reduce import Owners, Summing, add, flat_like, whole_sum
from purestep.treesum import TreeSum, forest
from purestep.workers.state import LocalState, WorkerPlan, averaged_fields, one_of, together

_LIMITS = 25 << 20, 25 << 20  # bytes of a flat tensor: what is sent at a time while the next is packed


@dataclasses.dataclass(frozen=True)
class Team:
    """Which process holds which workers.

    Attributes:
        mine: the workers of this rank, in their order.
        owners: the workers of each rank as parts of the tree.
        group: the ranks; None for this one alone.
        fast: whether the backend adds, in whatever order.
    """

    mine: tuple[int, ...]
    owners: Owners
    group: dist.ProcessGroup | None
    fast: bool


def team(plan: WorkerPlan | None, workers: int, filled: int | None = None) -> Team:
    """Return which process holds which of so many workers; without a plan this process holds all.

    Args:
        plan: the plan.
        workers: their number.
        filled: how many of them, the first ones, take part in a sum; by default all.

    Raises:
        ConfigError: the ranks cannot hold equally many.
    """
    filled = workers if filled is None else filled
    if plan is None or world_size() == 1:
        return Team(tuple(range(workers)), [forest(list(range(filled)))], None, False)
    check_workers(plan, workers)
    who = shares(plan, workers, filled)
    return Team(who.mine, who.owners, who.group, plan.reduction == "fast")


def check_workers(plan: WorkerPlan, workers: int) -> None:
    """Refuse a number of workers that the ranks of a plan cannot hold equally.

    Raises:
        ConfigError: with numbers that they can.
    """
    if workers % plan.replicas:
        fitting = ", ".join(str(plan.replicas * factor) for factor in (1, 2, 4))
        raise ConfigError(
            explain(
                f"{workers} workers cannot be shared equally by {plan.replicas} ranks",
                where=f"{plan.mesh!r}, workers={workers}",
                why="the number of workers is that of the run, whatever the number of processes",
                instead=f"start another number of processes, or workers={fitting}, ...",
            )
        )


def total_over(team: Team, values: Mapping[int, Sequence[Tensor]]) -> list[Tensor]:
    """Return the sums over all workers of what each has; one exchange between ranks.

    Args:
        team: which process holds which workers.
        values: by worker of this rank, tensors of the same shapes and dtypes.
    """
    layout = flat_like(next(iter(values.values())), _LIMITS)
    trees = [TreeSum(add) for _ in layout.groups]
    for worker in team.mine:
        for sums, flat in zip(trees, layout.pack(values[worker]), strict=True):
            sums.add(flat, worker)
    if team.fast:
        summed = [collectives.sum_into(sums.result(), team.group) for sums in trees]
        return layout.unpack([pending.wait() for pending in summed])
    like = [next(iter(sums.nodes.values())) for sums in trees]
    leaving = [Summing(sums.nodes, team.owners, team.group, x) for sums, x in zip(trees, like, strict=True)]
    return layout.unpack([whole_sum(summing) for summing in leaving])


def averaged(
    team: Team, state: LocalState, workers: int, outer_tx: GradientTransformation | None, *, optimizer: bool
) -> LocalState:
    """Return the state after an average: all workers begin the next round with the same params and buffers.

    With an outer transformation the difference between the params that the round began with and the mean is a gradient,
    and it updates the former.

    Args:
        team: which process holds which workers.
        state: with the workers of this rank.
        workers: number of all workers.
        outer_tx: of DiLoCo.
        optimizer: whether the state of the inner optimizers is averaged, too.
    """
    here = [one_of(state.workers, place) for place in range(len(team.mine))]
    fields = averaged_fields(here[0], optimizer=optimizer)
    sums = total_over(team, {w: fields.of(worker) for w, worker in zip(team.mine, here, strict=True)})
    means = fields.means(sums, here[0], workers)
    here = [fields.put(worker, means) for worker in here]
    if outer_tx is None or state.outer is None:
        return state.replace(workers=together(here))
    moved = tree.map(lambda began, mean: began - mean, state.outer.params, here[0].params)
    outer = state.outer.apply_gradients(outer_tx, moved)
    return state.replace(workers=together([worker.replace(params=outer.params) for worker in here]), outer=outer)


def merged(
    counted: Team, sums: Accumulation, found: Mapping[int, Mapping[str, Metric]], pattern: Mapping[str, Metric]
) -> dict[str, Metric]:
    """Return the metrics of a batch over all workers, merged in their order, on every rank.

    Args:
        counted: which process holds which workers that had samples.
        sums: of the batch, for its sizes, which travel along and are compared.
        found: by worker of this rank that had samples, its metrics.
        pattern: metrics like these, for a rank that has none.
    """
    nodes: TreeSum[Partial] = TreeSum(merge)
    for worker, metrics in found.items():
        nodes.add(Partial([], 1, {}, metrics), worker)
    whole = exchange_small(nodes.nodes, counted.owners, counted.group, Partial([], 1, {}, pattern), sums)()
    compare_sizes(sums.heard)
    return dict(whole.metrics)
