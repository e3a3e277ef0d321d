"""What a step would need on a machine that is not here: memory of a rank by kind, and bytes it sends in a step.

Arithmetic over the rows of `describe`: no memory is allocated, and no rank is asked. `step_account` says what is there
beside the state in the course of a step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Protocol

import torch

from purestep import tree
from purestep.bits import human_bytes
from purestep.errors import ConfigError, explain
from purestep.sharding.pipeline_order import Action, bubble, tables
from purestep.sharding.report import Description, Row, describe
from purestep.sharding.spec import Layout
from purestep.sharding.stage_account import StageAccount
from purestep.sharding.stages import AXIS, Schedule, Stages
from purestep.sharding.step_account import LONG_ON_CPU, LONG_ON_DEVICE, Account, Course, Job, Leaf, peak
from purestep.sharding.step_time import StepTime
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

    def stage_of(self, name: str) -> int | None:
        """Return the stage of a parameter."""

    def home(self, stage: int) -> int:
        """Return the coordinate of the rank that computes a stage."""

    def microbatches(self, count: int, *, rank: int | None = None) -> tuple[int, ...]:
        """Return the numbers of the microbatches that a rank computes."""

    @property
    def reduction(self) -> str:
        """In which order ranks add."""

    @property
    def data_axes(self) -> tuple[str, ...]:
        """Axes whose ranks hold the same parts."""


@dataclasses.dataclass(frozen=True, repr=False)
class DryRun(Printed):
    """What one rank needs for a step; prints as a table.

    Attributes:
        description: where each leaf lives.
        memory: bytes a rank by kind, at the moment of a step in which most is there. At rest: `params`, `frozen`,
            `buffers`, `optimizer` and `other`. In the step: `grads`, of parts or whole; `gathered`, whole parameters
            that are live at once, or copies of parameters in the compute dtype or from the CPU; `sums`, buffers that
            are sent and received; `update`, copies and the new state while it is made; `activations`, with what the
            passes compute meanwhile, where the step and a batch are known.
        sent: bytes that a rank sends in a step by reason: `gather` (parameters), `reduce` (gradients), and under
            context parallelism `context` (gradients that are summed over positions), in a pipeline `stages` (what goes
            from one to the next, and its gradients), where the step and a batch are known. What tensor, context and
            expert parallelism send of activations is not in it.
        host: bytes of the CPU's memory, of what a plan with `offload=` keeps there while the state is on a card: what
            rests there, and what an update there copies, `grads` and `params`. They are not in `memory`.
        bubble: the part of a step in which a rank of a pipeline waits, if all stages take as long, a backward pass
            twice as long as a forward pass, and sending no time; None where the number of microbatches is not given,
            and without a pipeline. Tied parameters of other stages are not in `memory`.
        flops: floating-point operations of a rank in a step, a multiplication and an addition as two: those of matrix
            products, convolutions and attention, in the forward and the backward pass of each of its microbatches,
            what checkpoints compute again included. None where step and batch are not known, and where several ranks
            compute one layer together.
    """

    description: Description
    memory: dict[str, int]
    sent: dict[str, int]
    host: dict[str, int] = dataclasses.field(default_factory=dict)
    bubble: float | None = None
    flops: int | None = None

    def seconds(self, *, flops: float, bandwidth: float) -> StepTime:
        """Return how long a step takes of ranks that compute and send so fast.

        Not in it: the loading of data, what is no matrix product (norms, the update), and what a rank waits for the
        network to answer, which for many small messages is longer than what they take to send.

        Args:
            flops: operations a second that a rank reaches in the dtype of the step. What is reached of the number on a
                card's data sheet, 30 to 60 % for large models, is the utilization that you expect or have measured.
            bandwidth: bytes a second that a rank sends, in the slowest of the links that it uses.

        Raises:
            ConfigError: the number of operations is not known; a rate that is no positive number.

        Examples:
            >>> import torch
            >>> import purestep as ps
            >>> tx = ps.optim.sgd(0.1)
            >>> step = ps.make_step(lambda net, x: net(x).square().mean(), tx, plan=ps.sharding.ddp())
            >>> with torch.device("meta"):
            ...     state = ps.init(torch.nn.Linear(1000, 1000, bias=False), tx)
            >>> found = ps.step_memory(step, state, torch.ones(64, 1000), {"data": 4})
            >>> found.flops, found.sent["reduce"]  # 16 samples, forward and the gradient of the weight; 2 * 3/4 of it
            (64000000, 6000000)
            >>> time = found.seconds(flops=1e9, bandwidth=1e9)
            >>> time.compute, time.send, time.hidden, round(time.apart, 3)
            (0.064, 0.006, 0.064, 0.07)
        """
        for name, rate in (("flops", flops), ("bandwidth", bandwidth)):
            if not 0 < rate < math.inf:
                raise ConfigError(explain(f"{name} is a rate above 0", where=f"{name}={rate}", instead=f"{name}=1e12"))
        if self.flops is None:
            raise ConfigError(
                explain(
                    "how much a rank computes is not known",
                    where=repr(self.description.mesh),
                    why="it follows from a step and a batch, and not where ranks compute a layer together",
                    instead="ps.step_memory(step, state, batch, sizes).seconds(flops=..., bandwidth=...)",
                )
            )
        return StepTime(self.flops / flops, sum(self.sent.values()) / bandwidth, self.bubble or 0.0)

    @property
    def nbytes(self) -> int:
        """Bytes of memory a rank needs on its device: the peak of a step."""
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
    donate: bool = True,
    by_element: bool = True,
    one_graph: bool = False,
    course: Course | None = None,
) -> DryRun:
    """Return what a step of a state under a plan needs of a rank; see `Plan.dry_run`.

    Args:
        plan, value, microbatches, compute_dtype, reduce_dtype, donate: as there.
        by_element: whether the update of an element depends on it alone, so that long parameters go in slices.
        one_graph: whether a microbatch is compiled as a whole, so that all parameters are gathered at once.
        course: what the passes of one microbatch keep; by default nothing is known of it.
    """
    of_rank = functools.partial(
        _of_rank,
        plan,
        value,
        microbatches=microbatches,
        compute_dtype=compute_dtype,
        reduce_dtype=reduce_dtype,
        donate=donate,
        by_element=by_element,
        one_graph=one_graph,
        course=course,
    )
    # Stages differ in size: what is told is what the rank with the most needs.
    ranks = plan.mesh.ranks(AXIS, rank=0) if plan.pipelined else [0]
    return max(map(of_rank, ranks), key=lambda each: each.nbytes)


def _of_rank(
    plan: Costed,
    value: object,
    rank: int,
    *,
    microbatches: int | None,
    compute_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    donate: bool,
    by_element: bool,
    one_graph: bool,
    course: Course | None,
) -> DryRun:
    description = describe(plan, value, rank=rank)
    own = [row for row in description.rows if row.unit is not None]
    turns = len(plan.microbatches(microbatches or plan.replicas, rank=0))
    trained = [row for row in own if row.kind == "params"]
    kinds = ("params", "frozen", "buffers", "optimizer", "other")
    memory = {kind: _at_rest(description, kind, on_host=False) for kind in kinds}
    away = plan.offload is not None
    job = Job(
        plan.zero,
        plan.replicas,
        plan.mesh.size(*plan.data_axes),
        turns,
        plan.reshard_after_forward,
        plan.reduction == "fast",
        donate,
        memory["optimizer"],
        away,
        _long(value),
        by_element,
        one_graph,
    )
    known = course or Course()
    leaves = [_leaf(plan, row, compute_dtype, reduce_dtype, known) for row in own]
    if plan.pipelined:
        actions = _actions(plan, rank, turns if microbatches else None)
        stage_of = {leaf.name: plan.stage_of(leaf.name) or 0 for leaf in leaves}
        memory |= peak(StageAccount(job, leaves, course, actions, stage_of))
        # Parameters are gathered once a step, as the state has them.
        sent = {"gather": _gather_traffic(plan, own, 1, None)}
        if known.stages:
            sent["stages"] = sum(_passed_on(known, action) for action in actions)
    else:
        memory |= peak(Account(job, leaves, course))
        times = 2 if plan.reshard_after_forward and not one_graph else 1
        sent = {"gather": _gather_traffic(plan, own, turns * times, compute_dtype)}
    wire = plan.sent_dtype or reduce_dtype
    sent["reduce"] = sum(_reduce_traffic(plan, row, turns, wire) for row in trained)
    if plan.context:
        size = plan.mesh.size(*plan.model_axes)
        # In each microbatch an exchange of slices, and one of their sums.
        whole = sum(_split(plan, row) * _bytes([row], compute_dtype) for row in trained)
        sent["context"] = turns * 2 * (size - 1) * whole // size
    host = {kind: _at_rest(description, kind, on_host=True) for kind in kinds}
    if plan.offload is not None:
        host["grads"] = sum(_shard(plan, row, None) for row in trained)
        host["params"] = host["params"] or sum(_shard(plan, row, None) for row in trained)
    waits = None
    if plan.pipelined and microbatches is not None:
        waits = bubble(plan.schedule, plan.mesh.size(AXIS), len(plan.cut), turns)
    shared = plan.pipelined or plan.mesh.size(*plan.model_axes) > 1
    flops = None if course is None or shared else course.flops * turns
    return DryRun(
        description, {k: n for k, n in memory.items() if n}, sent, {k: n for k, n in host.items() if n}, waits, flops
    )


def _actions(plan: Costed, rank: int, turns: int | None) -> Sequence[Action]:
    """Return what a rank of a pipeline does; one pass through each of its stages, if the microbatches are not known."""
    here, ranks, count = plan.mesh.coordinate(rank)[AXIS], plan.mesh.size(AXIS), len(plan.cut)
    if turns is not None:
        return tables(plan.schedule, ranks, count, turns)[here]
    own = [stage for stage in range(count) if plan.home(stage) == here]
    return [*(("forward", s, 0) for s in own), *(("backward", s, 0) for s in reversed(own))]


def _passed_on(course: Course, action: Action) -> int:
    """Return the bytes that a rank sends to another stage when it has done what its schedule says."""
    kind, stage, _ = action
    to = stage + 1 if kind == "forward" else stage
    return course.stages[to].given if to < len(course.stages) else 0


def _long(value: object) -> int:
    """Return from how many elements a parameter is updated in slices, on the device of a state."""
    devices = {leaf.device.type for leaf in tree.leaves(value) if isinstance(leaf, torch.Tensor)}
    return LONG_ON_CPU if devices <= {"cpu", "meta"} else LONG_ON_DEVICE


def _at_rest(description: Description, kind: str, *, on_host: bool) -> int:
    return sum(row.nbytes for row in description.rows if row.kind == kind and row.on_host == on_host)


def _leaf(plan: Costed, row: Row, compute: torch.dtype | None, reduce: torch.dtype | None, course: Course) -> Leaf:
    """Return a parameter as a step sees it."""
    width = _width(row)
    computed = compute.itemsize if compute else width
    known = course.widths.get(row.name or "", (computed, reduce.itemsize if reduce else width))
    split = _split(plan, row)
    whole = math.prod(row.local) * split
    trained = row.kind == "params"
    # What is offloaded is copied to the device for each microbatch.
    at_rest = 0 if row.on_host and split == 1 else width
    return Leaf(row.name or row.path, row.unit or "", trained, whole, split, _apart(plan, row), at_rest, *known)


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


def _gather_traffic(plan: Costed, rows: list[Row], gathers: int, dtype: torch.dtype | None) -> int:
    inside = sum(gathers * (_split(plan, r) - 1) * _bytes([r], dtype) for r in rows)
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
