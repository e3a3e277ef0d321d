"""ZeRO 1 and 2: parameters are whole on every rank, and each rank updates a part of them.

Owns the way from whole parameters to the parts that a rank updates, and back. Under ZeRO 1 a rank adds up the gradients
of its microbatches whole, and `part_sums` adds those of all ranks into parts; under ZeRO 2 `scattered` does so for each
microbatch. A rank of a pipeline does all of that with the parameters of its stages.
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
from purestep.sharding.leaf_roles import Kind
from purestep.sharding.messages import copy_all
from purestep.sharding.plan import Plan
from purestep.sharding.spec import Spec
from purestep.sharding.step_account import GATHERED
from purestep.state import TrainState

M = TypeVar("M")


def parts_of(plan: Plan, params: Mapping[str, Tensor]) -> dict[str, Spec]:
    """Return where the parameters are updated of which a rank updates a part; none but under ZeRO 1 and 2."""
    return {} if plan.zero == 3 else split_over_batch(plan, params, "optimizer")


def split_over_batch(plan: Plan, tensors: Mapping[str, Tensor], kind: Kind) -> dict[str, Spec]:
    """Return where those tensors live, by name, that are split over the batch axes.

    Args:
        plan: of the step.
        tensors: parameters, of their whole shapes.
        kind: as of `Plan.spec`.
    """
    if plan.mesh.size(*plan.shard_axes) == 1:
        return {}
    found = {name: plan.spec(name, tuple(x.shape), kind) for name, x in tensors.items()}
    return {name: spec for name, spec in found.items() if any(spec.entries)}


def of_this_rank(plan: Plan, specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """Return the specs of the tensors of which this rank has a part: not those of other stages of a pipeline."""
    here = plan.mesh.coordinate()
    return {n: spec for n, spec in specs.items() if all(here[axis] == home for axis, home in spec.at)}


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
        at_rest = state.replace(params=_split(plan, state.params, view.params, specs))
        gradients = dataclasses.replace(
            gradients, grads=_parted(plan, state, gradients.grads, of_this_rank(plan, specs))
        )
        split, view = view, placement.local(at_rest)
        also_donated(split, view)
    with full_tensors.updating(full_tensors.Whole(plan, at_rest.params, at_rest.opt_state)):
        new, metrics = update(view, gradients)
    del gradients
    if not specs:
        return new if view is state else placement.rewrap(new, state), metrics
    donation = donation_of(split)
    written = donation.memory if donation is not None and donation.written else frozenset()
    whole = new.params | gathered(plan, new.params, split.params, of_this_rank(plan, specs), written)
    return placement.rewrap(new.replace(params=whole), state), metrics


def _split(
    plan: Plan, params: Mapping[str, Tensor], here: Mapping[str, Tensor], specs: Mapping[str, Spec]
) -> dict[str, Tensor]:
    """Return the parameters as they are updated: of those that are split, DTensors over copies of this rank's parts.

    Args:
        plan, specs: as of `updated`.
        params: at rest.
        here: the same on this rank: whole, or nothing of them where they are of another stage.
    """
    mine, parts = of_this_rank(plan, specs), dict(here)
    parts.update(zip(mine, placement.cuts(plan, [here[n] for n in mine], list(mine.values())), strict=True))
    return {n: placement.wrap(plan, parts[n], specs[n], tuple(x.shape)) if n in specs else x for n, x in params.items()}


def _parted(plan: Plan, state: TrainState, grads: dict[str, Tensor], specs: Mapping[str, Spec]) -> dict[str, Tensor]:
    """Return this rank's parts of gradients that may be whole. Whole ones are taken out of the dict: nothing else needs
    them, and they would be held until the update ends."""
    found = dict(grads)
    whole = [n for n, grad in grads.items() if n in specs and grad.shape == state.params[n].shape]
    grads.clear()
    found.update(zip(whole, placement.cuts(plan, [found[n] for n in whole], [specs[n] for n in whole]), strict=True))
    return found


def gathered(
    plan: Plan,
    parts: Mapping[str, Tensor],
    like: Mapping[str, Tensor],
    specs: Mapping[str, Spec],
    written: frozenset[int] = frozenset(),
) -> dict[str, Tensor]:
    """Return whole tensors from the parts of each rank, by name.

    Args:
        plan: of the step.
        parts: this rank's, and perhaps others.
        like: tensors of the whole shapes, on the devices where they are wanted.
        specs: where the parts lie, by the names of those that are gathered.
        written: memory of donated tensors: those of `like` that lie there are written over.
    """
    group = plan.mesh.group(*plan.shard_axes)
    coming: list[tuple[Rows, collectives.Pending]] = []
    found: dict[str, Tensor] = {}

    def arrive() -> None:
        rows, pending = coming.pop(0)
        wholes = rows.wholes(rows.unpack(pending.wait()))
        for name in wholes:
            # A tensor of its own: one that is a window on others would be copied whenever the state is donated.
            reuse = bool(written) and lies_in(like[name], written) and like[name].is_contiguous()
            found[name] = like[name] if reuse else torch.empty_like(wholes[name])
        copy_all([found[name] for name in wholes], list(wholes.values()))

    for rows in grouped(plan, [(n, tuple(like[n].shape), parts[n].dtype, spec) for n, spec in specs.items()]):
        packed = rows.pack([parts[row.name].to(like[row.name].device, non_blocking=True) for row in rows.rows])
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
