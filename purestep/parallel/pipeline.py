"""A step of a pipeline: each rank computes its stages of every microbatch, in the order of a schedule.

`pipeline_order` has the schedule, `stage_pass` computes one stage of one microbatch, `wire` sends what goes from one to
the next. Here a rank performs its actions, and hands the gradients of each of its stages to the sums of the plan over
the batch axes: those of `ddp`, which ZeRO 1 shares, or of `scattered`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from purestep import tree
from purestep.microbatch import Gradients, MicrobatchExchange, accumulate
from purestep.parallel.assignment import Shares, shares
from purestep.parallel.ddp import Buckets
from purestep.parallel.fsdp_order import Orders
from purestep.parallel.same_inputs import compare_first, compare_sizes, sizes_of
from purestep.parallel.scattered import Scattered
from purestep.parallel.stage_cut import Left, run_of
from purestep.parallel.stage_pass import Pass, Prepare, Stages
from purestep.parallel.wire import Key
from purestep.parallel.zero import parts_of, split_over_batch
from purestep.sharding import placement
from purestep.sharding.local_batches import local_batch, microbatch_sizes
from purestep.sharding.pipeline_order import tables
from purestep.sharding.plan import Plan
from purestep.sharding.stages import AXIS
from purestep.state import TrainState

T = TypeVar("T")


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
    who = shares(plan, count, sum(map(bool, microbatch_sizes(local.samples, count))))
    sums = {stage: _sums(stages, stage, who, local.samples, sizes_of(batch, local.samples)) for stage in stages.own}
    pieces: dict[int, Any] = {index: data for index, data, _ in local.pieces(who.mine)}
    # One that has no microbatch computes one all the same, to know what the others send; where ranks exchange the
    # gradients of each microbatch they compute the same number of them.
    computed = who.mine if _each(plan) else list(pieces) or who.mine[:1]
    spare = local.spare(who.mine) if len(pieces) < len(computed) else None
    step = _Step(stages, who, sums, frozenset(pieces))
    step.perform({index: pieces.get(index, spare) for index in computed})
    return step.result()


def _each(plan: Plan) -> bool:
    """Whether the ranks of the batch axes add up gradients in each microbatch, of which each keeps its parts."""
    return plan.zero > 1 and plan.mesh.size(*plan.shard_axes) > 1


def _sums(stages: Stages, stage: int, who: Shares, samples: int, told: tuple[int, int]) -> Buckets | Scattered:
    """Return the sums of a stage over the microbatches and the ranks of the batch axes."""
    plan, at_rest = stages.plan, stages.at_rest
    own = [n for n in at_rest.params if plan.stage_of(n) == stage]
    sums = accumulate(stages.view.replace(params={n: stages.view.params[n] for n in own}), samples, who.count)
    sums.told = told
    params = {n: at_rest.params[n] for n in own}
    if not _each(plan):
        return Buckets(who, sums, parts_of(plan, params))
    specs = split_over_batch(plan, params, "optimizer")
    return Scattered(who, sums, sums.state.params, specs, Orders())


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
        sums: of the batch, by stage.
        counted: the microbatches that are of the batch; what is computed of others does not count.
    """

    def __init__(
        self, stages: Stages, who: Shares, sums: Mapping[int, Buckets | Scattered], counted: frozenset[int]
    ) -> None:
        self.stages, self.who, self.sums, self.counted = stages, who, sums, counted

    def perform(self, computed: Mapping[int, Any]) -> None:
        """Perform the actions of this rank on the microbatches of its pipeline.

        Args:
            computed: by number; those that are missing are empty, on every rank of this pipeline.
        """
        stages, mine = self.stages, self.who.mine
        plan, passes, last = stages.plan, {}, max(computed)
        order = tables(plan.schedule, plan.mesh.size(AXIS), stages.cut.count, len(mine))[stages.here]
        for kind, stage, number in order:
            index = mine[number]
            if index not in computed:
                continue
            if kind == "forward":
                passes[stage, index] = Pass(stages, stage, index)
                passes[stage, index].forward(computed[index])
            else:
                # Without a name: the gradients of one microbatch would be there until those of the next are.
                exchange = self._exchange(stage, number, last=index == last)
                exchange.taken(passes.pop((stage, index)).backward(), stages.view)
                del exchange

    def _exchange(self, stage: int, number: int, *, last: bool) -> MicrobatchExchange:
        """Return what takes the gradients of a microbatch, which leave in the order in which stages end."""
        sums, index = self.sums[stage], self.who.mine[number]
        if isinstance(sums, Buckets):
            return sums.exchange(index, counts=index in self.counted, last=last)
        return sums.exchange(number, index, last=last)

    def result(self) -> Gradients:
        """Add up over the batch axes, and tell every rank of the pipeline the metrics and the new buffers."""
        stages = self.stages
        parts = [self.sums[stage].result() for stage in stages.own]
        grads = {n: x for part in parts for n, x in part.grads.items()}
        # Of the parameters of other stages this rank holds nothing: an empty tensor, and so is its gradient.
        dtypes = [x.dtype for x in grads.values()]
        params = stages.view.params
        empty = {n: x.new_empty((0,) * x.dim(), dtype=dtypes[0] if dtypes else x.dtype) for n, x in params.items()}
        metrics = _told(stages, parts[-1].metrics)
        buffers = stages.told_buffers([part.buffers for part in parts])
        stages.wire.close()
        compare_sizes(self.sums[stages.own[0]].sums.heard)
        return Gradients({n: grads.get(n, empty[n]) for n in params}, parts[-1].weight, buffers, metrics)


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
