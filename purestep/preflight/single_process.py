"""A step as one process alone would run it on fake tensors: full parameters, its own samples, nothing exchanged.

So every rank of a plan can check its part of a step without the others. `check`, `memory` and `guard` run what
`lone` returns; what the ranks make of it together is up to `loop.ranks`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from purestep import tree
from purestep.sharding.local_batches import local_batch
from purestep.sharding.placement import is_split, part_of
from purestep.step_protocol import StepFn, bare, facts_of


@dataclasses.dataclass(frozen=True)
class Lone:
    """What a dry run is made of.

    Attributes:
        step: any step, not compiled and without a plan.
        state: with a fake tensor of the full shape for each that is split over ranks.
        batch: the samples that this process computes.
    """

    step: StepFn
    state: object
    batch: object


def lone(step: StepFn, state: object, batch: object) -> Lone | None:
    """Return what to run on fake tensors; None where they would say nothing about the step.

    Args:
        step: any step; a compiled one is run as the function it was compiled of, an opaque function as it is.
        state: whole or placed by the plan of the step.
        batch: what the step is about to be given: a batch, or the `LocalBatch` of this rank.
    """
    leaves = tree.leaves(state)
    if not all(map(_is_plain, leaves)):
        return None
    whole = tree.map(_whole, state) if any(map(is_split, leaves)) else state
    facts = facts_of(step)
    if facts.plan is None or not isinstance(facts.microbatches, int):
        return Lone(bare(step), whole, batch)
    local, mine = local_batch(batch, facts.plan, facts.microbatches), facts.plan.microbatches(facts.microbatches)
    # A rank without samples in a small batch runs the model on those of another.
    count = max(len(local.pieces(mine)), 1)
    return Lone(bare(step, count), whole, local.data)


def _is_plain(leaf: object) -> bool:
    if not isinstance(leaf, Tensor):
        return True
    return type(part_of(leaf)) in (Tensor, nn.Parameter)


def _whole(leaf: object) -> object:
    if not isinstance(leaf, Tensor) or not is_split(leaf):
        return leaf
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
