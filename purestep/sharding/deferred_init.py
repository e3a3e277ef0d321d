"""Deferred init: the first state of a model that fits no single process.

The model and the optimizer state are made without memory under a tape; then one leaf at a time is computed, cut by the
plan and freed. What comes from a file of weights is read in parts. Which bits come out is a function of the seed and
the names alone, not of the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from purestep import tree
from purestep.errors import StepError, explain
from purestep.sharding.init_tape import Tape, recording
from purestep.sharding.leaf_roles import follow
from purestep.sharding.placement import box_here, cut, homes_of, wrap
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

    Raises:
        StepError: `make` has read the values of parameters into memory, or leaves a tensor without values.
    """
    with recording(rng) as tape:
        described = make()
    _check_values(tape, described)
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
        source, shape = tape.source(leaf), tuple(leaf.shape)
        if plan is None or not spec.axes:
            value = tape.value(leaf)
            return _own(value).to(home or value.device)
        # `cut` copies, so the full tensor is freed before the next leaf is computed; of a file only the part is read.
        part = cut(plan, tape.value(leaf), spec) if source is None else source(box_here(plan, shape, spec))
        return wrap(plan, part.to(home or part.device), spec, shape)

    return tree.unflatten(structure, list(map(computed, leaves, tree.leaves(specs), homes)))


def _check_values(tape: Tape, described: object) -> None:
    """Refuse a model whose values were read into memory, or that leaves a tensor without values."""
    named = [(name, leaf) for name, leaf in _named(described) if isinstance(leaf, Tensor)]
    empty = [name for name, leaf in named if tape.never_filled(leaf)]
    known = {f.name or "" for f in follow(described) if f.kind in ("params", "frozen")}
    params = [(name, leaf) for name, leaf in named if name in known]
    in_memory = [name for name, leaf in params if not leaf.is_meta]
    bytes_there = sum(leaf.nbytes for _, leaf in params if not leaf.is_meta)
    # A table of constants as a parameter is fine; a model that exists has nothing to defer.
    exists = 2 * bytes_there > sum(leaf.nbytes for _, leaf in params)
    if not (exists or empty):
        return
    shown = ", ".join(map(repr, in_memory[:3] if exists else empty[:3]))
    count = len(in_memory) if exists else len(empty)
    if exists:
        what = "the function that makes the model has read the values of its parameters into memory"
        why = "every rank would hold the full model, as `from_pretrained` makes it"
    else:
        what, why = "the model leaves tensors without values", "they were made by torch.empty and never filled"
    raise StepError(
        explain(
            what,
            where=f"{shown}; {count} of {len(params if exists else named)} tensors",
            why=why,
            instead="ps.init(lambda: Model(config), tx, weights=directory, plan=plan, deferred=True)\n"
            "# each rank reads its part of each tensor from the files",
        )
    )


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
