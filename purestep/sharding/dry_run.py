"""What a step would need on a machine that is not here: memory of a rank by kind, and bytes it sends in a step.

Arithmetic over the rows of `describe`: no memory is allocated, and no rank is asked.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import torch

from purestep.bits import human_bytes
from purestep.sharding.pipeline_order import bubble
from purestep.sharding.report import Description, Row, describe
from purestep.sharding.spec import Layout
from purestep.sharding.stages import AXIS, Schedule, Stages
from purestep.views import Block, Note, Printed, Table


class Costed(Layout, Protocol):
    """What is asked of a plan here: its layout, and who computes what."""

    @property
    def batch(self) -> str | tuple[str, ...]:
        """Axes over which microbatches are distributed."""

    @property
    def replicas(self) -> int:
        """Number of ranks that compute different microbatches."""

    @property
    def context(self) -> bool:
        """Whether ranks compute runs of positions together."""

    @property
    def model_axes(self) -> tuple[str, ...]:
        """Axes over which the batch is the same."""

    @property
    def zero(self) -> int:
        """The stage of ZeRO."""

    @property
    def reshard_after_forward(self) -> bool:
        """Whether gathered parameters are freed after the forward pass."""

    @property
    def sent_dtype(self) -> torch.dtype | None:
        """The dtype in which ranks exchange gradients."""

    @property
    def pipelined(self) -> bool:
        """Whether ranks compute stages of a model."""

    @property
    def cut(self) -> Stages:
        """The stages."""

    @property
    def schedule(self) -> Schedule:
        """The order in which a pipeline computes."""

    def microbatches(self, count: int, *, rank: int | None = None) -> tuple[int, ...]:
        """Return the numbers of the microbatches that a rank computes."""


@dataclasses.dataclass(frozen=True, repr=False)
class DryRun(Printed):
    """What one rank needs for a step; prints as a table.

    Attributes:
        description: where each leaf lives.
        memory: bytes a rank by kind: `params`, `frozen`, `buffers`, `optimizer` and `other` at rest, `grads` (one set,
            as params are split), and `gathered`: whole parameters that are live at once, with the whole gradients of
            one unit, or the copies of parameters that are offloaded. Activations are not in it.
        sent: bytes that a rank sends in a step by reason: `gather` (parameters), `reduce` (gradients), and under
            context parallelism `context` (gradients that are summed over positions). What tensor, context
            and expert parallelism send of activations is not in it.
        host: bytes of the CPU's memory, of what a plan with `offload=` keeps there while the state is on a card: what
            rests there, and what an update there copies, `grads` and `params`. They are not in `memory`.
        bubble: the part of a step in which a rank of a pipeline waits, if all stages take as long, a backward pass
            twice as long as a forward pass, and sending no time; None where the number of microbatches is not given,
            and without a pipeline. What stages send each other is not in `sent`, tied parameters not in `memory`.
    """

    description: Description
    memory: dict[str, int]
    sent: dict[str, int]
    host: dict[str, int] = dataclasses.field(default_factory=dict)
    bubble: float | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory a rank needs on its device, without activations."""
        return sum(self.memory.values())

    def view(self) -> list[Block]:
        """Return the blocks that show it."""

        def table(title: str, values: dict[str, int]) -> Table:
            rows = [(name, human_bytes(count)) for name, count in values.items()]
            return Table(("", ""), rows, title=title, foot=("all", human_bytes(sum(values.values()))), right=(1,))

        return [
            Note(repr(self.description.mesh)),
            table("memory of a rank", self.memory),
            *([table("memory of the host", self.host)] if self.host else []),
            table("sent in a step", self.sent),
            *([Note(self._waits())] if AXIS in self.description.mesh.axes else []),
        ]

    def _waits(self) -> str:
        if self.bubble is None:
            return "how long a rank waits for the others depends on microbatches="
        return f"a rank waits {self.bubble:.1%} of a step, if all stages take as long"


def dry_run(
    plan: Costed,
    value: object,
    *,
    microbatches: int | None = None,
    compute_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> DryRun:
    """Return what a step of a state under a plan needs of a rank; see `Plan.dry_run`."""
    # Stages differ in size: what is told is what the rank with the most needs.
    ranks = plan.mesh.ranks(AXIS, rank=0) if plan.pipelined else [0]
    description = max((describe(plan, value, rank=rank) for rank in ranks), key=lambda each: each.nbytes)
    own = [row for row in description.rows if row.unit is not None]
    turns = len(plan.microbatches(microbatches or plan.replicas, rank=0))
    trained = [row for row in own if row.kind == "params"]
    kinds = ("params", "frozen", "buffers", "optimizer", "other")
    memory = {kind: _at_rest(description, kind, on_host=False) for kind in kinds}
    memory["grads"] = sum(_gradient(plan, row, reduce_dtype) for row in trained)
    memory["gathered"] = _gathered(plan, own, compute_dtype)
    sent = {"gather": _gather_traffic(plan, own, turns, compute_dtype)}
    wire = plan.sent_dtype or reduce_dtype
    sent["reduce"] = sum(_reduce_traffic(plan, row, turns, wire) for row in trained)
    if plan.context:
        size = plan.mesh.size(*plan.model_axes)
        # In each microbatch an exchange of slices, and one of their sums.
        sent["context"] = turns * 2 * (size - 1) * sum(_whole(plan, row, compute_dtype) for row in trained) // size
    host = {kind: _at_rest(description, kind, on_host=True) for kind in kinds}
    if plan.offload is not None:
        host["grads"] = sum(_shard(plan, row, None) for row in trained)
        host["params"] = host["params"] or sum(_shard(plan, row, None) for row in trained)
    waits = None
    if plan.pipelined and microbatches is not None:
        waits = bubble(plan.schedule, plan.mesh.size(AXIS), len(plan.cut), turns)
    return DryRun(
        description, {k: n for k, n in memory.items() if n}, sent, {k: n for k, n in host.items() if n}, waits
    )


def _at_rest(description: Description, kind: str, *, on_host: bool) -> int:
    return sum(row.nbytes for row in description.rows if row.kind == kind and row.on_host == on_host)


def _gradient(plan: Costed, row: Row, dtype: torch.dtype | None) -> int:
    """Return the bytes of a gradient as it is held for the update."""
    return _bytes([row], dtype) if plan.zero == 1 else _shard(plan, row, dtype)


def _shard(plan: Costed, row: Row, dtype: torch.dtype | None) -> int:
    """Return the bytes of the part of a parameter that this rank updates."""
    return -(-_bytes([row], dtype) // _apart(plan, row))


def _apart(plan: Costed, row: Row) -> int:
    """Return over how many ranks a parameter that is whole here is updated: 1 unless ZeRO is at stage 1 or 2."""
    return plan.mesh.size(*(a for a in row.updated.axes if a in plan.batch and a not in row.spec.axes))


def _bytes(rows: list[Row], dtype: torch.dtype | None) -> int:
    return sum(math.prod(r.local) * (dtype.itemsize if dtype else _width(r)) for r in rows)


def _width(row: Row) -> int:
    return row.nbytes // math.prod(row.local) if math.prod(row.local) else 0


def _split(plan: Costed, row: Row) -> int:
    """Return over how many ranks a leaf is gathered for a step."""
    return 1 if row.resident else _over(plan, row)


def _over(plan: Costed, row: Row) -> int:
    """Return how many ranks of the batch share a leaf."""
    return plan.mesh.size(*(a for a in row.spec.axes if a in plan.batch))


def _whole(plan: Costed, row: Row, dtype: torch.dtype | None) -> int:
    """Return the bytes of a leaf gathered over the batch axes: its tensor-parallel part stays split."""
    return _bytes([row], dtype) * _split(plan, row)


def _gathered(plan: Costed, rows: list[Row], dtype: torch.dtype | None) -> int:
    split = [r for r in rows if _split(plan, r) > 1]
    units: dict[str, int] = {}
    for row in split:
        units[row.unit or ""] = units.get(row.unit or "", 0) + _whole(plan, row, dtype)
    if not units:
        # Whole parameters that are offloaded are copied to the device for each microbatch.
        return _bytes([row for row in rows if row.on_host], dtype)
    root = units.pop("", 0)
    largest = max(units.values(), default=0)
    # One unit computes while the next one is gathered, and has its whole gradients in the backward pass.
    live = sum(units.values()) if not plan.reshard_after_forward else min(2 * largest, sum(units.values()))
    return root + live + max(largest, root if not units else 0)


def _gather_traffic(plan: Costed, rows: list[Row], turns: int, dtype: torch.dtype | None) -> int:
    times = 2 if plan.reshard_after_forward else 1
    inside = sum(turns * times * (_split(plan, r) - 1) * _bytes([r], dtype) for r in rows)
    # Under ZeRO 1 and 2 ranks send each other what they have updated, once a step, in the dtype of the state.
    return inside + sum((_apart(plan, r) - 1) * _shard(plan, r, None) for r in rows if r.kind == "params")


def _reduce_traffic(plan: Costed, row: Row, turns: int, dtype: torch.dtype | None) -> int:
    """Return bytes sent for the gradient of a leaf: reduce-scatters over what splits it, then one all-reduce."""
    if plan.zero < 3 and _apart(plan, row) > 1:
        part, split = _shard(plan, row, dtype), _apart(plan, row)
        turns = turns if plan.zero == 2 else 1  # ZeRO 1 adds up its microbatches first
    else:
        part, split = _bytes([row], dtype), _split(plan, row)
    rest = plan.replicas // (_over(plan, row) if row.resident else split)
    return turns * (split - 1) * part + 2 * (rest - 1) * part // rest
