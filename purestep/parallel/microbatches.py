"""The microbatches of one rank under a plan, and the sum over all ranks: the same tree whoever computes what.

Owns the order in which things are exchanged. `sharding` moves the tensors, `microbatch` says what is added and divided,
`step` computes a microbatch and calls `total`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from purestep import transforms
from purestep.distributed.mesh import world_size
from purestep.errors import ConfigError, explain
from purestep.microbatch import NO_EXCHANGE, Accumulation, Gradients, MicrobatchExchange, accumulate
from purestep.optim.base import GradientTransformation
from purestep.optim.scope import fused_on_shards
from purestep.parallel import zero
from purestep.parallel.assignment import shares
from purestep.parallel.ddp import Buckets
from purestep.parallel.fsdp import Sharded, split_leaves
from purestep.parallel.fsdp_order import Orders
from purestep.parallel.same_inputs import compare_first, compare_sizes, sizes_of
from purestep.parallel.scattered import Scattered
from purestep.parallel.small_exchange import exchange_small
from purestep.sharding import placement
from purestep.sharding.local_batches import local_batch
from purestep.sharding.plan import Plan
from purestep.state import TrainState

Compute = Callable[[TrainState, Any, int, MicrobatchExchange], Gradients]


def total(
    plan: Plan, count: int, at_rest: TrainState, view: TrainState, batch: Any, compute: Compute, orders: Orders
) -> Gradients:
    """Compute the microbatches of this rank, and return the mean over those of all ranks.

    Args:
        plan: the plan.
        count: number of microbatches of the whole batch (V).
        at_rest: the state, with DTensors where the plan splits it.
        view: the same with the local parts.
        batch: the global batch, or this rank's LocalBatch.
        compute: computes one microbatch, and tells the exchange what comes of it.
        orders: what the ranks know of the order in which the step gathers the units of a model.
    """
    local = local_batch(batch, plan, count)
    if world_size() > 1:
        if view.rng.is_meta:
            # Only the dry run of an opaque function comes here: of every other step it runs the `bare` one.
            raise ConfigError(
                explain(
                    "a function around a step hides its plan from the run",
                    where=f"{plan!r}, on {world_size()} processes",
                    why="ranks share the data, the clock, signals and snapshots of a run by the plan of its step; "
                    "without it each of them would run by itself",
                    instead="ps.wrap_step(step, function)   # function(step, state, batch), and the plan stays known",
                )
            )
        placement.check_placed(plan, at_rest.params)
        compare_first(plan, count, at_rest, batch)
    sums = accumulate(view, local.samples, count)
    sums.told = sizes_of(batch, local.samples)
    who = shares(plan, count, len(sums.sizes))
    # Every rank enters every exchange in one order, so a rank whose microbatches are empty computes on spare samples,
    # and its contribution does not count.
    pieces = {index: data for index, data, _ in local.pieces(who.mine)}
    spare = local.spare(who.mine) if len(pieces) < len(who.mine) else None
    split = split_leaves(at_rest)
    specs = zero.parts_of(plan, view.params)
    if split or (specs and plan.zero == 2):
        sharded = Scattered(who, sums, view.params, specs, orders) if specs else Sharded(who, sums, split, orders)
        for number, index in enumerate(who.mine):
            compute(view, pieces.get(index, spare), index, sharded.exchange(number, index, last=index == who.mine[-1]))
        return _compared(sharded.result(), sums)
    if who.group is None:
        return _alone(sums, view, pieces, compute)
    buckets = Buckets(who, sums, specs)
    # A rank that has none runs one all the same, to know what the others send; batch norm over ranks needs all of them.
    computed = who.mine if plan.sync_batchnorm else list(pieces) or who.mine[:1]
    for index in computed:
        exchange = buckets.exchange(index, counts=index in pieces, last=index == computed[-1])
        compute(view, pieces.get(index, spare), index, exchange)
    return _compared(buckets.result(), sums)


def _compared(result: Gradients, sums: Accumulation) -> Gradients:
    # Not where the sizes arrive: a rank that left in the middle of the exchanges would keep the others waiting.
    compare_sizes(sums.heard)
    return result


def _alone(sums: Accumulation, view: TrainState, pieces: Mapping[int, Any], compute: Compute) -> Gradients:
    """Add up the microbatches of a rank that computes all of them, in the same operations as several ranks do."""
    for index, data in pieces.items():
        sums.sum.add(sums.lift(compute(view, data, index, NO_EXCHANGE), index), index)
    small = exchange_small(sums.sum.nodes, [], None, next(iter(sums.sum.nodes.values())), sums)()
    return sums.mean(small.replaced(sums.sum.result().vector))


class Checked(Protocol):
    """What of a step decides whether it can run under a plan."""

    @property
    def engine(self) -> str: ...

    @property
    def tx(self) -> GradientTransformation: ...


def check(plan: Plan, step: Checked) -> None:
    """Refuse what a plan cannot keep, or what cannot run under one."""
    if transforms.active() or step.engine == "func":
        raise ConfigError(
            explain(
                "a step with a plan cannot be transformed",
                where="inside of vmap, grad or jvp, or with engine='func'",
                why="ranks exchange gradients in it, which no transform knows how to map or differentiate",
                instead="make_step(loss_fn, tx)   # without a plan",
            )
        )
    if plan.reduction == "tree" and plan.shard_axes and fused_on_shards(step.tx):
        raise ConfigError(
            explain(
                "this optimizer gives a part of a tensor other bits than the whole",
                where=f"{step.tx!r} with a plan that splits parameters",
                why='reduction="tree" promises the same bits on every topology',
                instead='fused=False\nor fsdp(reduction="fast"), which promises nothing about bits',
            )
        )
