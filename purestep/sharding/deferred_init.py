"""Deferred init: the first state of a model that fits no single process.

The model and the optimizer state are made without memory under a tape; then one leaf at a time is computed, cut by the
plan and freed. Which bits come out is a function of the seed and the names alone, not of the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from purestep import tree
from purestep.sharding.init_tape import recording
from purestep.sharding.leaf_roles import follow
from purestep.sharding.placement import cut, homes_of, wrap
from purestep.sharding.spec import REPLICATED, Layout, Spec
from purestep.sharding.unmatched_rules import check_matches

T = TypeVar("T")


def materialize(
    make: Callable[[], T], rng: Tensor, *, plan: Layout | None, device: torch.device | str | int | None
) -> T:
    """Make a tree of tensors one leaf at a time, holding at most one whole split leaf.

    Args:
        make: makes the tree; under it tensors have no memory.
        rng: int64[2] key of the random numbers drawn in it.
        plan: where the leaves live; None keeps all of them whole.
        device: where tensors are put. They are computed on the CPU, so their bits do not depend on it.
    """
    with recording(rng) as tape:
        described = make()
    # All names first: which draws belong to which parameter must not depend on which leaf is computed first.
    for name, leaf in _named(described):
        if isinstance(leaf, Tensor) and leaf.is_meta:
            tape.name_random(name, leaf)
    if plan is not None:
        check_matches(plan, described)
    specs = tree.map(lambda _: REPLICATED, described) if plan is None else plan.specs(described)
    leaves, structure = tree.flatten(described)
    asked = None if device is None else torch.device(device)
    homes = [asked] * len(leaves) if plan is None else homes_of(plan, described, asked)

    def computed(leaf: object, spec: Spec, home: torch.device | None) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        value = tape.value(leaf)
        if plan is None or not spec.axes:
            return _own(value).to(home or value.device)
        shape = tuple(value.shape)
        # `cut` copies, so the full tensor is freed before the next leaf is computed.
        return wrap(plan, cut(plan, value, spec).to(home or value.device), spec, shape)

    return tree.unflatten(structure, list(map(computed, leaves, tree.leaves(specs), homes)))


def _named(value: object) -> list[tuple[str, object]]:
    """Return leaves by name, parameters first, whether they are trained or frozen: the names draw random numbers."""
    leaves = list(zip(follow(value), tree.leaves(value), strict=True))
    params = [(f.name or "", leaf) for f, leaf in leaves if f.kind in ("params", "frozen")]
    rest = [(".".join(map(str, f.path)), leaf) for f, leaf in leaves if f.kind not in ("params", "frozen")]
    return sorted(params, key=lambda pair: pair[0]) + rest


def _own(value: Tensor) -> Tensor:
    """Return a tensor that does not keep more memory than its own."""
    if value.untyped_storage().nbytes() == value.nbytes:
        return value
    return value.clone()
