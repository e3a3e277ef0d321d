"""A step as one process alone would run it on fake tensors: whole parameters, its own rows, nothing exchanged.

So every rank of a plan can check its part of a step without the others. `precheck`, `memory` and `guard` run what
`lone` returns; what the ranks make of it together is up to `ranks`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from purestep import tree
from purestep.sharding.local import local_batch
from purestep.sharding.place import is_split, part_of
from purestep.step import Eval, Step


@dataclasses.dataclass(frozen=True)
class Lone:
    """What a dry run is made of.

    Attributes:
        step: any step, uncompiled and without a plan.
        state: with a fake tensor of the whole shape for each that is split over ranks.
        batch: the rows that this process computes.
    """

    step: Any
    state: Any
    batch: Any


def lone(step: Any, state: Any, batch: Any) -> Lone | None:
    """Return what to run on fake tensors; None where they would say nothing about the step.

    Args:
        step: any step; a compiled one is taken uncompiled.
        state: whole or placed by the plan of the step.
        batch: what the step is about to be given: a batch, or the `LocalBatch` of this rank.
    """
    inner = getattr(step, "__wrapped__", step)
    leaves = tree.leaves(state)
    if not all(map(_is_plain, leaves)):
        return None
    whole = tree.map(_whole, state) if any(map(is_split, leaves)) else state
    plan = getattr(inner, "plan", None)
    if plan is None:
        return Lone(inner, whole, batch)
    if isinstance(inner, Eval):
        return Lone(dataclasses.replace(inner, plan=None), whole, batch)
    if not isinstance(inner, Step):
        return None
    local, mine = local_batch(batch, plan, inner.parts), plan.microbatches(inner.parts)
    # A rank without rows in a small batch runs the model on those of another.
    count = max(len(local.pieces(mine)), 1)
    return Lone(dataclasses.replace(inner, plan=None, microbatches=count), whole, local.data)


def _is_plain(leaf: Any) -> bool:
    if not isinstance(leaf, Tensor):
        return True
    return type(part_of(leaf)) in (Tensor, nn.Parameter)


def _whole(leaf: Any) -> Any:
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") if is_split(leaf) else leaf
