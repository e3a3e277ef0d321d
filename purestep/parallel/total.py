"""The microbatches of one rank under a plan, and the sum over all ranks: the same tree whoever computes what.

Owns the order in which things are exchanged. `sharding` moves the tensors, `accumulate` says what is added and divided,
`step` computes a microbatch and calls `total`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from purestep import transforms, tree
from purestep.accumulate import Accumulation, Gradients, Partial, accumulate
from purestep.errors import ConfigError, explain
from purestep.parallel.gathering import Gathering, split_leaves
from purestep.parallel.shares import Shares
from purestep.parallel.small import exchange_small
from purestep.sharding import collectives
from purestep.sharding.local import local_batch
from purestep.sharding.plan import Plan
from purestep.sharding.reduce import Flat, Flats, add, tree_sum
from purestep.treesum import Node, TreeSum

Compute = Callable[[Any, Any, int, Any], Gradients]


def total(plan: Plan, count: int, at_rest: Any, view: Any, batch: Any, compute: Compute) -> Gradients:
    """Compute the microbatches of this rank, and return the mean over those of all ranks.

    Args:
        plan: the plan.
        count: number of microbatches of the whole batch (V).
        at_rest: the state, with DTensors where the plan splits it.
        view: the same with the local parts.
        batch: the global batch, or this rank's LocalBatch.
        compute: computes one microbatch.
    """
    local = local_batch(batch, plan, count)
    sums = accumulate(view, local.samples, count)
    shares = Shares(plan, count, len(sums.sizes))
    pieces = {index: data for index, data, _ in local.pieces(shares.mine)}
    spare = local.spare(shares.mine) if len(pieces) < len(shares.mine) else None
    split = split_leaves(at_rest)
    if split:
        return _sharded(shares, sums, split, view, pieces, spare, compute)
    return _replicated(shares, sums, view, pieces, spare, compute)


def _replicated(shares: Shares, sums: Accumulation, view: Any, pieces: Any, spare: Any, compute: Compute) -> Gradients:
    pattern = None
    for index, data in pieces.items():
        pattern = sums.lift(compute(view, data, index, None), index)
        sums.sum.add(pattern, index)
    if pattern is None:
        # Only to know what the others send.
        pattern = sums.lift(compute(view, spare, 0, None), 0)
    plan, nodes = shares.plan, sums.sum.nodes
    group = plan.mesh.group(*shares.batch_axes)
    if group is None:
        return sums.finish(_small(nodes, [], None, pattern, sums)().replaced(sums.sum.result().vector))
    small = _small(nodes, shares.owners(), group, pattern, sums)
    flat = Flat(pattern.vector)
    if plan.reduction == "fast":
        mine = flat.pack(sums.sum.result().vector if nodes else [torch.zeros_like(x) for x in pattern.vector])
        flats = [p.wait() for p in [collectives.sum_into(x, group) for x in mine]]
    else:
        packed = {node: flat.pack(part.vector) for node, part in nodes.items()}
        like = next(iter(packed.values())) if packed else flat.pack(pattern.vector)
        flats = _whole_tree(tree_sum(packed, shares.owners(), group, like))
    return sums.finish(small().replaced(flat.unpack(flats)))


def _small(nodes: Any, owners: Any, group: Any, pattern: Partial, sums: Accumulation) -> Callable[[], Partial]:
    return exchange_small(nodes, owners, group, pattern, sum(sums.sizes))


def _whole_tree(nodes: Mapping[Node, Flats]) -> Flats:
    whole = TreeSum(add)
    for node, flats in nodes.items():
        whole.put(node, flats)
    result: Flats = whole.result()
    return result


def _sharded(
    shares: Shares, sums: Accumulation, split: Any, view: Any, pieces: Any, spare: Any, compute: Compute
) -> Gradients:
    plan = shares.plan
    owned: dict[Node, Partial] = {}
    added = TreeSum(add)
    for turn, index in enumerate(shares.mine):
        one = Gathering(shares, sums, split, turn, index)
        part = compute(view, pieces.get(index, spare), index, one)
        pattern = sums.lift(part, index if one.counts else 0)
        names = tree.names(part.grads)
        names += [""] * (len(pattern.vector) - len(names))
        rest = [x for n, x in zip(names, pattern.vector, strict=True) if n not in split]
        for node, flats in one.finish(rest).items():
            added.put((0, turn) if one.fast else node, flats)
        if one.counts:
            owned[0, index] = pattern
    small = _small(owned, shares.leaves(), plan.mesh.group(*shares.batch_axes), pattern, sums)
    group = plan.mesh.group(*plan.data_axes)
    if one.fast:
        flats = [p.wait() for p in [collectives.sum_into(x, group) for x in added.result()]]
    else:
        flats = _whole_tree(tree_sum(added.nodes, shares.groups(), group, one.like))
    local, whole = one.parts(flats, rest)
    others = iter(whole)
    return sums.finish(small().replaced([local[n] if n in split else next(others) for n in names]))


def check(plan: Plan, step: Any) -> None:
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
    if plan.reduction == "tree" and plan.shard_axes and step.tx.on_shards and not step.tx.shard_invariant:
        raise ConfigError(
            explain(
                "this optimizer gives a part of a tensor other bits than the whole",
                where=f"{step.tx!r} with a plan that splits parameters",
                why='reduction="tree" promises the same bits on every topology',
                instead='fused=False\nor fsdp(reduction="fast"), which promises nothing about bits',
            )
        )
