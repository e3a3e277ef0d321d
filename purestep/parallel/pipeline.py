"""A step of a pipeline: each rank computes its stages of every microbatch, in the order of a schedule.

`pipeline_order` has the schedule, `stage_pass` computes one stage of one microbatch, `wire` sends what goes from one to
the next. Here a rank performs its actions, adds up the gradients of its own stages in the tree of microbatches, and the
ranks of the data axis add up theirs.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from purestep import tree
from purestep.microbatch import Accumulation, Gradients, Partial, accumulate
from purestep.parallel.assignment import Shares, shares
from purestep.parallel.same_inputs import compare_first, compare_sizes, sizes_of
from purestep.parallel.small_exchange import exchange_small
from purestep.parallel.stage_cut import Left, run_of
from purestep.parallel.stage_pass import Pass, Prepare, Stages
from purestep.parallel.tree_reduce import Summing, flat_like, whole_sum
from purestep.parallel.wire import Key
from purestep.sharding import placement
from purestep.sharding.local_batches import local_batch
from purestep.sharding.pipeline_order import tables
from purestep.sharding.plan import Plan
from purestep.sharding.stages import AXIS
from purestep.state import TrainState

T = TypeVar("T")
_LIMITS = 1 << 20, 25 << 20  # bytes of gradients that the ranks of the data axis add up at a time


def total(
    plan: Plan,
    count: int,
    module: nn.Module,
    at_rest: TrainState,
    view: TrainState,
    batch: Any,
    prepare: Prepare,
) -> Gradients:
    """Compute this rank's stages of the microbatches of its pipeline, and return the mean over those of all.

    Args:
        plan, count, at_rest, view, batch: as of `microbatches.total`.
        module: the model, as the policy has it.
        prepare: makes ready one microbatch.
    """
    local = local_batch(batch, plan, count)
    placement.check_placed(plan, at_rest.params)
    compare_first(plan, count, at_rest, batch)
    stages = Stages(plan, module, at_rest, view, prepare)
    sums = {stage: accumulate(view, local.samples, count) for stage in stages.own}
    for each in sums.values():
        each.told = sizes_of(batch, local.samples)
    who = shares(plan, count, len(sums[stages.own[0]].sizes))
    pieces: dict[int, Any] = {index: data for index, data, _ in local.pieces(who.mine)}
    # One that has no microbatch computes one all the same, to know what the others send.
    computed = pieces or {who.mine[0]: local.spare(who.mine)}
    step = _Step(stages, who, sums, counts=bool(pieces))
    step.perform(computed)
    return step.result()


def evaluated(
    plan: Plan, module: nn.Module, at_rest: TrainState, view: TrainState, batch: Any, prepare: Prepare
) -> Any:
    """Compute this rank's stages of a batch without gradients, and return on all of them what the last stage found."""
    stages, found = Stages(plan, module, at_rest, view, prepare), None
    for stage in stages.own:
        one = Pass(stages, stage, 0, train=False)
        one.forward(batch)
        found = one.value
    found = _told(stages, found)
    stages.wire.close()
    return found


def _told(stages: Stages, found: T) -> T:
    """Return what the rank of the last stage found, on every rank of a pipeline."""
    last, device = stages.cut.count - 1, stages.wire.device
    home, key = stages.plan.home(last), Key("metrics", last)
    if stages.here == home:
        # A card has another number on another rank.
        data = torch.frombuffer(bytearray(pickle.dumps(_moved(found, torch.device("cpu")))), dtype=torch.uint8)
        for other in stages.others(home):
            stages.wire.send(other, key, [data.to(device)])
        return found
    (received,) = stages.wire.receive(home, key)
    return _moved(cast(T, pickle.loads(cast(Tensor, received).cpu().numpy().tobytes())), device)


def _moved(found: T, device: torch.device) -> T:
    return cast(T, tree.map(lambda x: x.to(device) if isinstance(x, Tensor) else x, found))


class _Step:
    """What one rank does in a step, and the sums of its stages.

    Args:
        stages: of this rank.
        who: who computes which microbatches.
        sums: what is added and divided, by stage.
        counts: whether what is computed counts; it does not on a rank without microbatches.
    """

    def __init__(self, stages: Stages, who: Shares, sums: dict[int, Accumulation], *, counts: bool) -> None:
        self.stages, self.who, self.sums, self.counts = stages, who, sums, counts
        self.patterns: dict[int, Partial] = {}

    def perform(self, computed: Mapping[int, Any]) -> None:
        """Perform the actions of this rank on the microbatches of its pipeline.

        Args:
            computed: by number; those that are missing are empty, on every rank of this pipeline.
        """
        stages, mine = self.stages, self.who.mine
        plan, passes = stages.plan, {}
        order = tables(plan.schedule, plan.mesh.size(AXIS), stages.cut.count, len(mine))[stages.here]
        for kind, stage, number in order:
            index = mine[number]
            if index not in computed:
                continue
            if kind == "forward":
                passes[stage, index] = Pass(stages, stage, index)
                passes[stage, index].forward(computed[index])
            else:
                self._add(stage, passes.pop((stage, index)).backward(), index)

    def _add(self, stage: int, part: Gradients, index: int) -> None:
        lifted = self.sums[stage].lift(part, index)
        self.patterns.setdefault(stage, lifted)
        if self.counts:
            self.sums[stage].sum.add(lifted, index)

    def result(self) -> Gradients:
        """Add up over the data axis, and tell every rank of the pipeline the metrics and the new buffers."""
        stages = self.stages
        view, parts = stages.view, [self._over_data(stage) for stage in stages.own]
        grads = {n: x for part in parts for n, x in part.grads.items()}
        # Of the parameters of other stages this rank holds nothing: an empty tensor, and so is its gradient.
        dtypes = [x.dtype for x in grads.values()]
        empty = {n: x.new_empty((0,) * x.dim(), dtype=dtypes[0] if dtypes else x.dtype) for n, x in view.params.items()}
        metrics = _told(stages, parts[-1].metrics)
        buffers = stages.told_buffers([part.buffers for part in parts])
        stages.wire.close()
        compare_sizes(self.sums[stages.own[0]].heard)
        return Gradients({n: grads.get(n, empty[n]) for n in view.params}, parts[-1].weight, buffers, metrics)

    def _over_data(self, stage: int) -> Gradients:
        """Return the mean over all microbatches of what a stage contributes."""
        sums, who, pattern = self.sums[stage], self.who, self.patterns[stage]
        nodes = sums.sum.nodes
        small = exchange_small(nodes, who.owners, who.group, pattern, sums)()
        if who.group is None:
            return sums.mean(small.replaced(sums.sum.result().vector))
        layout = flat_like(pattern.vector, _LIMITS)
        flats = {node: layout.pack(part.vector) for node, part in nodes.items()}
        likes = layout.pack(pattern.vector)
        begun = [
            Summing({node: flat[k] for node, flat in flats.items()}, who.owners, who.group, like)
            for k, like in enumerate(likes)
        ]
        return sums.mean(small.replaced(layout.unpack([whole_sum(each) for each in begun])))


def partial_loss(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loss function that ends where the next stage begins, with a number that stands for the loss."""

    def wrapped(net: Any, batch: object) -> object:
        run = run_of(net)
        run.begin()
        try:
            return loss_fn(net, batch)
        except Left:
            return torch.zeros(())
        finally:
            run.end()

    wrapped.__name__ = getattr(loss_fn, "__name__", "loss_fn")
    return wrapped
