"""`power_sgd`: gradients that workers exchange as products of two thin matrices, and what each has not sent yet.

Owns the compression of one batch's gradients. The number of workers belongs to the state, which holds their errors, so
bits do not depend on the number of processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from purestep import random
from purestep.arguments import Count, Whole, checked
from purestep.distributed.mesh import world_size
from purestep.errors import ConfigError, StepError, explain
from purestep.metrics import Metric
from purestep.microbatch import Accumulation, Gradients, Partial, merge
from purestep.parallel.same_inputs import compare_first, compare_sizes, sizes_of
from purestep.parallel.small_exchange import exchange_small
from purestep.precision.loss_scale import NoLossScale
from purestep.sharding import placement, presets
from purestep.sharding.plan import Plan, check_plan
from purestep.state import TrainState
from purestep.step import Step
from purestep.step_protocol import StepFacts, following, name_of
from purestep.treesum import TreeSum
from purestep.workers.average import Team, check_workers, team, total_over
from purestep.workers.base import StepOfWorkers
from purestep.workers.batches import Cut, cut_for, with_key_of
from purestep.workers.state import PowerState, WorkerPlan, steps_of

_LEAST_GAIN = 2  # a matrix is compressed if it has so many times more elements than its factors


@dataclasses.dataclass(frozen=True)
class PowerStep(StepOfWorkers):
    """A step whose workers exchange compressed gradients. Made by `power_sgd`; call it as `step(state, batch)`.

    Attributes:
        step, workers, plan, pieces: as of `StepOfWorkers`; the step computes gradients and applies them.
        rank: columns of the factors.
        start: steps before the first whose gradients are compressed.
    """

    rank: int
    start: int = 0

    def begin(self, state: TrainState) -> PowerState:
        """Return the state of a run that begins with a train state, placed by the plan; workers have sent everything.

        Args:
            state: from `ps.init`, or of another run; whole, or placed by any plan. Under a plan every rank calls it.

        Raises:
            ConfigError: the ranks of the plan cannot hold equally many workers.
        """
        state = placement.gather(state)
        if self.plan is not None:
            check_workers(self.plan, self.workers)
        chosen = {name: x for name, x in state.params.items() if compresses(x, self.rank)}
        if not chosen:
            raise ConfigError(
                explain(
                    "no gradient of the model would be compressed",
                    where=f"rank={self.rank}; {len(state.params)} parameters",
                    why="two factors of a matrix are sent where they are less than half as large",
                    instead="a smaller rank, or ps.make_step(loss_fn, tx, plan=ps.sharding.ddp())",
                )
            )
        errors, q = {}, {}
        for name, x in chosen.items():
            wide = torch.promote_types(x.dtype, torch.float32)
            errors[name] = torch.zeros((), dtype=wide, device=x.device).expand(self.workers, *x.shape)
            key = random.fold_in(state.rng, "power_sgd", name)
            q[name] = random.normal(key, (x[0].numel(), self.rank), dtype=wide)
        begun = PowerState(torch.zeros_like(state.step), state, errors, q)
        placed = begun if self.plan is None else self.plan.place(begun)
        own = {n: x if placement.is_split(x) else x.contiguous() for n, x in placed.errors.items()}
        return PowerState(placed.step, placed.train, own, placed.q)

    def __call__(self, state: PowerState, batch: Any) -> tuple[PowerState, dict[str, Metric]]:
        """Return the state after one update, and the metrics of the batch over all workers."""
        self._check(state)
        view = placement.local(state)
        if self.plan is not None and world_size() > 1:
            compare_first(self.plan, self.microbatch_count, state, batch)
        batch = following(view.train, batch)
        who, cut = team(self.plan, self.workers), cut_for(self, batch)
        parts, sums = self._computed(view.train, who, cut), Accumulation(view.train, cut.samples)
        sums.told = sizes_of(batch, sum(cut.samples))
        vectors, total = self._contributions(parts, sums, cut)
        done = steps_of(state.step)
        compressing = done is None or done >= self.start
        names = list(view.train.params)
        if compressing:
            vector, errors, q = compressed(who, self.workers, vectors, names, view.errors, view.q)
        else:
            vector, errors, q = total_over(who, vectors), view.errors, view.q
        compare_sizes(sums.heard)
        grads = dict(zip(names, vector[: len(names)], strict=True))
        gradients = sums.finish(grads, vector[len(names) :], total)
        train, metrics = self.step.update(view.train, gradients)
        new = PowerState(state.step + 1, train, errors, q)
        return placement.rewrap(new, state), metrics

    def _computed(self, train: TrainState, who: Team, cut: Cut) -> dict[int, Gradients]:
        """Return the gradients of each worker of this rank that has samples; of a spare batch, if none has."""
        shares = cut.shares or {who.mine[0]: cut.spare}
        return {w: self.step.gradients(with_key_of(train, w), batch) for w, (batch, _) in shares.items()}

    def _contributions(
        self, parts: Mapping[int, Gradients], sums: Accumulation, cut: Cut
    ) -> tuple[dict[int, list[Tensor]], Partial]:
        """Return what each worker adds to the mean: gradients by parameter, then changes of buffers; and the rest.

        The mean is that of the whole batch, in which samples (or what `ps.weighted` says) weigh the same.
        """
        nodes: TreeSum[Partial] = TreeSum(merge)
        vectors: dict[int, list[Tensor]] = {}
        for worker, part in parts.items():
            rest, moved = sums.besides(part.weight, part.buffers, part.metrics)
            if worker in cut.shares:
                nodes.add(rest, worker)
            grads = [part.grads[name] for name in sums.state.params]
            vectors[worker] = sums.weighed([*grads, *moved], part.weight, min(worker, cut.filled - 1))
        counted = team(self.plan, self.workers, cut.filled)
        total = exchange_small(nodes.nodes, counted.owners, counted.group, rest, sums)()
        mine = {w: sums.divided(vector, total.weight) for w, vector in vectors.items()}
        zeros = [torch.zeros_like(x) for x in next(iter(mine.values()))]
        who = team(self.plan, self.workers)
        return {w: mine[w] if w in cut.shares else zeros for w in who.mine}, total

    def _check(self, state: object) -> None:
        """Refuse what is no state of this step, or not placed by its plan."""
        if not isinstance(state, PowerState):
            raise StepError(
                explain(
                    "a step of PowerSGD takes a train state and the errors of its workers",
                    where=f"state: {type(state).__name__}",
                    instead="state = step.begin(ps.init(make_model, tx))",
                )
            )
        errors, q = next(iter(state.errors.values())), next(iter(state.q.values()))
        has, wants = (int(errors.shape[0]), int(q.shape[1])), (self.workers, self.rank)
        if has != wants:
            raise StepError(
                explain(
                    "the state was begun by another step of PowerSGD",
                    where=f"state: {has[0]} workers, rank {has[1]}; step: {wants[0]} workers, rank {wants[1]}",
                    instead="state = step.begin(state.train)",
                )
            )
        self.check_here(int(placement.part_of(errors).shape[0]), "the errors of ")

    @property
    def facts(self) -> StepFacts:
        """What is known of it; its tx is that of the train state in its state."""
        return StepFacts(self.step.loss_fn, None, self.microbatch_count, self.step.policy, self.plan)

    def identity(self) -> dict[str, Any]:
        """Return what a snapshot of a run records of it: not where it runs."""
        return {name: getattr(self, name) for name in ("step", "workers", "rank", "start")}


# --- the compression --------------------------------------------------------------------------------------------------


def compresses(param: Tensor, rank: int) -> bool:
    """Tell whether the gradient of a parameter is sent as two factors, because they are so much smaller.

    Examples:
        >>> compresses(torch.zeros(64, 32), 4), compresses(torch.zeros(64), 4), compresses(torch.zeros(8, 8), 4)
        (True, False, False)
    """
    if param.ndim < 2 or not param.is_floating_point() or param.numel() == 0:
        return False
    rows, columns = param.shape[0], param[0].numel()
    return _LEAST_GAIN * rank * (rows + columns) < rows * columns


def compressed(
    who: Team,
    workers: int,
    vectors: Mapping[int, list[Tensor]],
    names: Sequence[str],
    errors: Mapping[str, Tensor],
    q: Mapping[str, Tensor],
) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return the sums over all workers of what each adds, in part compressed; what is not sent yet; the right factors.

    Args:
        who: which process holds which workers.
        workers: number of all workers.
        vectors: by worker of this rank, gradients in the order of `names`, then what is never compressed.
        names: of the parameters.
        errors: by parameter that is compressed, what the workers of this rank have not sent yet.
        q: by parameter that is compressed, the right factor of the step before.
    """
    like = vectors[who.mine[0]]
    places = {name: i for i, name in enumerate(names) if name in errors}
    rest = [i for i in range(len(like)) if i not in places.values()]
    owed = {
        worker: {name: (vectors[worker][i] + errors[name][k]).flatten(1) for name, i in places.items()}
        for k, worker in enumerate(who.mine)
    }
    sent = {w: [m @ q[name] for name, m in owed[w].items()] + [vectors[w][i] for i in rest] for w in who.mine}
    summed = total_over(who, sent)
    left = {name: torch.linalg.qr(x)[0] for name, x in zip(places, summed, strict=False)}
    total = total_over(who, {w: [m.mT @ left[name] for name, m in owed[w].items()] for w in who.mine})
    whole, new_errors, new_q = dict(zip(rest, summed[len(places) :], strict=True)), {}, {}
    for (name, i), right in zip(places.items(), total, strict=True):
        found = left[name] @ right.mT
        kept = torch.stack([owed[w][name] - found / workers for w in who.mine]).view_as(errors[name])
        # What is not finite must not stay: the next steps would add it again, even if this update is skipped.
        finite = found.isfinite().all()
        new_errors[name] = torch.where(finite, kept, errors[name])
        new_q[name] = torch.where(finite, right, q[name])
        whole[i] = found.view_as(like[i]).to(like[i].dtype)
    return [whole[i] for i in range(len(like))], new_errors, new_q


@checked(ConfigError)
def power_sgd(step: Step, *, workers: Count, rank: Count = 1, start: Whole = 0, plan: Plan | None = None) -> PowerStep:
    """Make a step whose workers exchange the gradients of matrices as two thin factors each: PowerSGD.

    A worker adds to its gradient what it has not sent yet, and the sum over all workers is approximated by a matrix of
    rank `rank`, from one step of power iteration that begins at the factor of the step before. Of a matrix of n rows
    and m columns `rank * (n + m)` numbers travel instead of `n * m`. Vectors, and matrices for which that saves less
    than half, are sent as they are.

    The number of workers belongs to the run, like the batch size: a process holds one or several, so a run has the same
    bits on 1, 2 or 4 processes, and resumes on another number of them.

    Args:
        step: of `ps.make_step` without a plan; `microbatches=` counts those of one worker.
        workers: their number (W), a multiple of the number of processes. A batch is shared among them in order.
        rank: columns of the factors (r).
        start: steps before the first whose gradients are compressed; torch's hook has 1000.
        plan: whose ranks hold the workers; `ps.sharding.ddp()` by default, all processes of the job. It splits no
            parameter.

    Returns:
        A step. `step.begin(state)` makes its state from that of `ps.init`; `state.train` is the train state, to
        evaluate or export. On a card the host reads the number of the step in each step, and waits.

    Raises:
        ConfigError: `step` has a plan, a loss scale, or leaves its microbatches to `fit`. When the state is made: no
            parameter would be compressed.

    Examples:
        >>> import purestep as ps
        >>> tx = ps.optim.sgd(0.1, momentum=0.9)
        >>> inner = ps.make_step(lambda net, x: net(x).square().mean(), tx)
        >>> step = power_sgd(inner, workers=2, rank=2)
        >>> state = step.begin(ps.init(lambda: torch.nn.Linear(32, 16), tx))
        >>> state, metrics = step(state, torch.randn(8, 32))
        >>> state.errors["weight"].shape, state.q["weight"].shape, state.train.params["weight"].shape
        (torch.Size([2, 16, 32]), torch.Size([32, 2]), torch.Size([16, 32]))

    Reference: Vogels et al., "PowerSGD: Practical Low-Rank Gradient Compression", 2019,
    https://arxiv.org/abs/1905.13727
    """
    check_plan(plan, "ps.power_sgd")
    problems = {
        "has a plan": step.plan is not None,
        "leaves its number of microbatches to fit": step.microbatches == "auto",
        "has a loss scale, which changes from step to step": step.policy is not None
        and not isinstance(step.policy.loss_scale, NoLossScale),
    }
    found = [problem for problem, there in problems.items() if there]
    if found:
        raise ConfigError(
            explain(
                f"the step of a worker {found[0]}",
                where=name_of(step),
                why="a worker computes its gradients alone, and remembers what it has not sent of them",
                instead="ps.power_sgd(ps.make_step(loss_fn, tx), workers=4, rank=2, plan=ps.sharding.ddp())",
            )
        )
    return PowerStep(step, workers, rank, start, plan=WorkerPlan.of(presets.ddp() if plan is None else plan))
