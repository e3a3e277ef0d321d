"""Device memory: an estimate before the first step, and the words for too little of it.

The estimate comes from a dry run: state, gradients, and what autograd keeps of the forward pass. It is what has to
fit at least, on one rank where there are several. Where that comes near to what is free, and to settle a number of
microbatches, it is the account of `step_memory`. Workspaces of kernels and fragmentation come on top of either.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from purestep import devices, metrics, tree
from purestep._cpus import available_memory
from purestep.bits import human_bytes
from purestep.distributed import control
from purestep.errors import OutOfMemory, explain
from purestep.preflight.dry_run import Dry, dry_run
from purestep.preflight.explain_shapes import describe_batch
from purestep.preflight.single_process import lone
from purestep.sharding import placement
from purestep.sharding.local_batches import LocalBatch
from purestep.state import TrainState
from purestep.step_protocol import StepFacts, StepFn, facts_of

_SMALLER = "a smaller batch or model, ps.checkpoint around its blocks, or a device with more memory"
USABLE = 0.9  # of the free memory: the rest is for workspaces and fragmentation
_NEAR = 0.2  # of the free memory, from which what is needed is counted with care; that is a second dry run


class MemoryEstimateWarning(UserWarning):
    """The dry estimate of a step is larger than the memory that is free."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step needs at least, in bytes.

    Attributes:
        params, optimizer: of the state.
        state: all of the state.
        gradients: of one batch, with the partial sums of several microbatches.
        activations: kept for the backward pass of the largest microbatch.
        batch: the batch.
        donated: whether the new state takes the place of the old one.
        gathered: parameters of other ranks that are here at one time, and buffers of the sums over ranks.
        update: copies, and the new state, at the peak of the step, where all but the state is counted at that moment;
            None where only what is needed at least is known.
    """

    params: int
    optimizer: int
    state: int
    gradients: int
    activations: int
    batch: int
    donated: bool = False
    gathered: int = 0
    update: int | None = None

    @property
    def beyond(self) -> int:
        """What is needed besides the state and the batch, which are there already."""
        if self.update is not None:
            return self.gradients + self.gathered + self.activations + self.update
        # Activations are freed by the backward pass before the update makes the new state: the larger one counts.
        new = 0 if self.donated else self.state
        return self.gradients + max(self.gathered + self.activations, new)

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.batch + self.beyond

    def __str__(self) -> str:
        parts = (
            ("params", self.params),
            ("optimizer", self.optimizer),
            ("gradients", self.gradients),
            *([("gathered", self.gathered)] if self.gathered else []),
            ("activations", self.activations),
            *([("update", self.update)] if self.update else []),
        )
        return f"{human_bytes(self.total)} in all: " + ", ".join(f"{name} {human_bytes(size)}" for name, size in parts)


def estimate(step: StepFn, state: object, batch: object, dry: Dry) -> Estimate | None:
    """Return what a step needs of this process, from a dry run of it.

    None under tensor and context parallelism: what each rank keeps of a layer that several compute is not known.
    """
    plan = facts_of(step).plan
    if plan is not None and plan.mesh.size(*plan.model_axes) > 1:
        return None
    return estimate_alone(step, state, batch, dry)


def estimate_alone(step: StepFn, state: object, batch: object, dry: Dry) -> Estimate:
    """Return what `estimate` does, for a step whose ranks compute each layer alone."""
    facts = facts_of(step)
    plan, count = facts.plan, facts.microbatches
    here = placement.local(state)
    states = [state for _, state in tree.find(here, TrainState)]
    params = tree.nbytes([s.params for s in states]) if states else tree.nbytes(here)
    own = count if plan is None or not isinstance(count, int) else len(plan.microbatches(count))
    # Several microbatches hold a sum beside the gradients that are added to it.
    sums = 1 if own in (None, 1) else 2
    gathered, cast = _gathered(facts, state)
    return Estimate(
        params,
        tree.nbytes([s.opt_state for s in states]),
        tree.nbytes(here),
        params * sums,
        max(dry.kept - cast, 0),
        tree.nbytes(batch),
        facts.donate,
        gathered,
    )


def accounted(step: StepFn, state: object, batch: object, *, donate: bool | None = None) -> Estimate | None:
    """Return what a step needs at its peak, by the account of `step_memory`; None where it is not known.

    Args:
        step, state, batch, donate: as for `of_first_batch`.
    """
    from purestep.preflight.step_memory import of_first_batch

    found = of_first_batch(step, state, batch, donate=donate)
    if found is None:
        return None
    kinds = found.memory
    return Estimate(
        kinds.get("params", 0),
        kinds.get("optimizer", 0),
        sum(kinds.get(kind, 0) for kind in ("params", "frozen", "buffers", "optimizer", "other")),
        kinds.get("grads", 0),
        kinds.get("activations", 0),
        tree.nbytes(batch.data if isinstance(batch, LocalBatch) else batch),
        facts_of(step).donate if donate is None else donate,
        kinds.get("gathered", 0) + kinds.get("sums", 0),
        kinds.get("update", 0),
    )


def careful(step: StepFn, state: object, batch: object, least: Estimate, free: int | None) -> Estimate:
    """Return the account of a step, if what it needs at least comes near to what is free; else that."""
    if free is None or least.beyond <= _NEAR * free:
        return least
    return accounted(step, state, batch) or least


def _gathered(facts: StepFacts, state: Any) -> tuple[int, int]:
    """Return the bytes of gathered parameters and of buffers at one time, and those of all split ones as computed with.

    A dry run keeps the latter for its backward pass where they are cast; a real one gathers them again.
    """
    if facts.plan is None or not isinstance(facts.microbatches, int) or not isinstance(state, TrainState):
        return 0, 0
    compute = None if facts.policy is None else facts.policy.copied
    held = {name: x for name, x in state.params.items() if not facts.plan.is_expert(name)}
    split = [x for x in tree.leaves(held) if placement.is_split(x)]
    if not split:
        return 0, 0
    said = facts.plan.dry_run(state, microbatches=facts.microbatches, compute_dtype=compute).memory
    found = said.get("gathered", 0) + said.get("sums", 0)
    return found, sum(x.numel() * compute.itemsize for x in split if compute is not None and x.dtype != compute)


def free_memory(device: torch.device, *, root: str | Path = "/") -> int | None:
    """Return how many bytes can be allocated on a device; None where the system does not say.

    On the CPU it is what the system calls available, within the limit of this process's cgroup.

    Args:
        device: where the state lives.
        root: where `proc` and `sys` are looked for.

    Examples:
        >>> free_memory(torch.device("meta")) is None
        True
    """
    return available_memory(root=root) if device.type == "cpu" else devices.free_memory_of(device)


def own_share(free: int | None, device: torch.device) -> int | None:
    """Return what of the free memory of a device is this process's, where others of the job use it too."""
    return free if free is None or device.type != "cpu" else free // control.neighbours()


def shortage(step: StepFn, needed: Estimate, batch: object, device: torch.device, free: int | None) -> str | None:
    """Return what to say when a step needs more than is free, with the numbers and what would fit; else None."""
    if free is None or needed.beyond <= free:
        return None
    return explain(
        "the step may not fit in the memory of the device",
        where=f"{device}: {human_bytes(needed.beyond)} more are needed, {human_bytes(free)} are free",
        why=f"{needed}\nbatch: {describe_batch(batch)}",
        instead=_advice(step, needed, batch, free),
    )


def warn(shortages: Sequence[str | None]) -> None:
    """Warn of a shortage, by the first rank that has one."""
    short = [rank for rank, text in enumerate(shortages) if text is not None]
    if not short:
        return
    text = str(shortages[short[0]])
    if len(shortages) > 1:
        text += (
            f"\n  ranks:   {', '.join(map(str, short))} of {len(shortages)}; the numbers are those of rank {short[0]}"
        )
    warnings.warn(text, MemoryEstimateWarning, stacklevel=2)


def _advice(step: StepFn, needed: Estimate, batch: object, free: int | None) -> str:
    facts = facts_of(step)
    plan = facts.plan
    lines = []
    if facts.microbatches is not None:
        samples = metrics.sample_count(batch.data if isinstance(batch, LocalBatch) else batch)
        count = facts.microbatches if isinstance(facts.microbatches, int) else 1
        own = count if plan is None else len(plan.microbatches(count))
        gradients = 2 * needed.params
        for parts in (2**i for i in range(1, max(samples // own, 1).bit_length())):
            activations = -(-needed.activations // parts)
            smaller = dataclasses.replace(needed, gradients=gradients, activations=activations, update=None)
            if free is None or smaller.beyond <= USABLE * free:
                auto = "; or microbatches='auto'" if plan is None else ""
                lines.append(f"microbatches={count * parts}   # about {human_bytes(smaller.total)}{auto}")
                break
        if plan is not None and plan.replicas > 1 and not needed.gathered:
            lines.append("plan=ps.sharding.fsdp()   # params and optimizer state split over the ranks")
    if not needed.donated:
        lines.append("ps.jit(step, donate=True)   # the new state takes the place of the old one")
    return "\n".join(lines) or _SMALLER


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory could not be allocated, on whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def out_of_memory(
    step: StepFn, state: object, batch: object, error: BaseException, *, index: int, free: int | None
) -> OutOfMemory:
    """Return the error to raise where a step ran out of memory: batch, estimate, and what would fit."""
    alone = lone(step, state, batch)
    dry = None if alone is None else dry_run(alone.step, alone.state, alone.batch)
    needed = None if dry is None or dry.error is not None else estimate(step, state, batch, dry)
    lines = str(error).strip().splitlines()
    first = lines[0][:300] if lines else ""
    room = "" if free is None else f"; {human_bytes(free)} were free at the start"
    known = f"estimate: {needed}" if needed else f"the state takes {human_bytes(tree.nbytes(placement.local(state)))}"
    return OutOfMemory(
        explain(
            "the step ran out of memory",
            where=f"batch {index} of the run: {describe_batch(batch)}",
            why=f"{known}{room}\n{first}",
            instead=_advice(step, needed, batch, free) if needed else _SMALLER,
        )
    )
