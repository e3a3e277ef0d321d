"""ZeRO 1 and 2: parameters are whole on every rank, and each rank updates a part of them.

Owns the way from whole parameters to the parts that a rank updates, and back. Under ZeRO 1 a rank adds up the gradients
of its microbatches whole, and `part_sums` adds those of all ranks into parts; under ZeRO 2 `scattered` does so for each
microbatch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from purestep.distributed import collectives
from purestep.donation import also_donated, donation_of, lies_in
from purestep.microbatch import Gradients
from purestep.parallel.fsdp_layout import Row, Rows
from purestep.parallel.tree_reduce import Flat
from purestep.sharding import full_tensors, placement
from purestep.sharding.messages import copy_all
from purestep.sharding.plan import Plan
from purestep.sharding.spec import Spec
from purestep.sharding.step_account import GATHERED
from purestep.state import TrainState

M = TypeVar("M")


def parts_of(plan: Plan, params: Mapping[str, Tensor]) -> dict[str, Spec]:
    """Return where the parameters are updated of which this rank updates a part; none but under ZeRO 1 and 2."""
    if plan.zero == 3 or plan.mesh.size(*plan.shard_axes) == 1:
        return {}
    found = {name: plan.spec(name, tuple(x.shape), "optimizer") for name, x in params.items()}
    return {name: spec for name, spec in found.items() if spec.axes}


def updated(
    plan: Plan,
    state: TrainState,
    view: TrainState,
    gradients: Gradients,
    update: Callable[[TrainState, Gradients], tuple[TrainState, M]],
) -> tuple[TrainState, M]:
    """Return the state at rest after an update of what this rank updates.

    The caller should not hold the gradients: their memory is free once they are applied.

    Args:
        plan: of the step.
        state: the state at rest.
        view: the same with local parts.
        gradients: of a whole batch; of a parameter that is split for the update whole or a part.
        update: updates local parts.
    """
    specs = parts_of(plan, state.params)
    at_rest = state
    if specs:
        at_rest = state.replace(params=_split(plan, state.params, specs))
        gradients = dataclasses.replace(gradients, grads=_parted(plan, state, gradients.grads, specs))
        split, view = view, placement.local(at_rest)
        also_donated(split, view)
    with full_tensors.updating(full_tensors.Whole(plan, at_rest.params, at_rest.opt_state)):
        new, metrics = update(view, gradients)
    del gradients
    if not specs:
        return new if view is state else placement.rewrap(new, state), metrics
    donation = donation_of(split)
    written = donation.memory if donation is not None and donation.written else frozenset()
    whole = _gathered(plan, new.params, state.params, specs, written)
    return placement.rewrap(new.replace(params=whole), state), metrics


def _split(plan: Plan, params: Mapping[str, Tensor], specs: Mapping[str, Spec]) -> dict[str, Tensor]:
    """Return the parameters as they are updated: of those that are split, DTensors over copies of this rank's parts."""
    parts = dict(zip(specs, placement.cuts(plan, [params[n] for n in specs], list(specs.values())), strict=True))
    return {n: placement.wrap(plan, parts[n], specs[n], tuple(x.shape)) if n in specs else x for n, x in params.items()}


def _parted(plan: Plan, state: TrainState, grads: dict[str, Tensor], specs: Mapping[str, Spec]) -> dict[str, Tensor]:
    """Return this rank's parts of gradients that may be whole. Whole ones are taken out of the dict: nothing else needs
    them, and they would be held until the update ends."""
    found = dict(grads)
    whole = [n for n, grad in grads.items() if n in specs and grad.shape == state.params[n].shape]
    grads.clear()
    found.update(zip(whole, placement.cuts(plan, [found[n] for n in whole], [specs[n] for n in whole]), strict=True))
    return found


def _gathered(
    plan: Plan,
    parts: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    specs: Mapping[str, Spec],
    written: frozenset[int],
) -> dict[str, Tensor]:
    """Return whole parameters from the parts that each rank has updated, in the memory of donated ones if there are."""
    group = plan.mesh.group(*plan.shard_axes)
    coming: list[tuple[Rows, collectives.Pending]] = []
    found = dict(parts)

    def arrive() -> None:
        rows, pending = coming.pop(0)
        wholes = rows.wholes(rows.unpack(pending.wait()))
        for name in wholes:
            # A tensor of its own: one that is a window on others would be copied whenever the state is donated.
            reuse = lies_in(old[name], written) and old[name].is_contiguous()
            found[name] = old[name] if reuse else torch.empty_like(wholes[name])
        copy_all([found[name] for name in wholes], list(wholes.values()))

    for rows in grouped(plan, [(n, tuple(old[n].shape), parts[n].dtype, spec) for n, spec in specs.items()]):
        packed = rows.pack([parts[row.name].to(old[row.name].device, non_blocking=True) for row in rows.rows])
        coming.append((rows, collectives.gather(packed, group)))
        # One more is under way while this one is taken apart.
        if len(coming) > 1:
            arrive()
    while coming:
        arrive()
    return found


Where = tuple[str, tuple[int, ...], torch.dtype, Spec]


def grouped(plan: Plan, where: Sequence[Where], limits: tuple[int, int] = GATHERED) -> list[Rows]:
    """Return how parameters or their gradients travel: in rows of one dtype, some megabytes of whole tensors each.

    Args:
        plan: of the step.
        where: name, whole shape, dtype and spec of each.
        limits: bytes at which the first group is full, and the others.
    """
    return _grouped(plan, plan.mesh.shape, tuple(where), limits)


@functools.lru_cache(maxsize=64)
def _grouped(plan: Plan, sizes: tuple[int, ...], where: tuple[Where, ...], limits: tuple[int, int]) -> list[Rows]:
    like = [torch.empty(shape, dtype=dtype, device="meta") for _, shape, dtype, _ in where]
    rows = [Row.under(plan, name, shape, spec) for name, shape, _, spec in where]
    return [Rows(plan, [rows[i] for i in members]) for members in Flat(like, limits).groups]
