"""`local_sgd` and `diloco`: a step of workers that train apart, made of the step that each of them takes.

Owns what a batch means to workers: which samples are whose, when a round ends, and the phase before the first round, in
which they take one step together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Count, Whole, checked
from purestep.distributed.mesh import world_size
from purestep.errors import ConfigError, StepError, explain
from purestep.metrics import Metric, as_metrics
from purestep.microbatch import Accumulation
from purestep.optim.base import GradientTransformation, check_transformation
from purestep.parallel.same_inputs import compare_first, sizes_of
from purestep.sharding import placement, presets
from purestep.sharding.plan import Plan, check_plan
from purestep.state import TrainState
from purestep.step import Step
from purestep.step_protocol import StepFacts, facts_of, following, name_of
from purestep.workers.average import averaged, check_workers, merged, team
from purestep.workers.base import StepOfWorkers
from purestep.workers.batches import cut_for, with_key_of
from purestep.workers.state import LocalState, WorkerPlan, one_of, repeated, steps_of, together


@dataclasses.dataclass(frozen=True)
class LocalStep(StepOfWorkers):
    """A step of workers that train apart. Made by `local_sgd` or `diloco`; call it as `step(state, batch)`.

    Attributes:
        step, workers, plan, pieces: as of `StepOfWorkers`; the step is that of one worker.
        every: steps of a round, at whose end they are averaged.
        start: steps that they take together before the first round.
        outer: what updates the params at the end of a round; None for their mean.
        average_optimizer: whether the state of their optimizers is averaged, too.
    """

    every: int
    start: int = 0
    outer: GradientTransformation | None = None
    average_optimizer: bool = False

    def begin(self, state: TrainState) -> LocalState:
        """Return the state of a run: every worker begins with the given train state, placed by the plan.

        Args:
            state: from `ps.init`, or of another run; whole, or placed by any plan. Under a plan every rank calls it.

        Raises:
            StepError: a leaf of the state is no tensor.
            ConfigError: the ranks of the plan cannot hold equally many workers.
        """
        state = placement.gather(state)
        if self.plan is not None:
            check_workers(self.plan, self.workers)
        step, outer = torch.zeros_like(state.step), None
        if self.outer is not None:
            params = tree.map(torch.clone, state.params)
            outer = TrainState(step, params, {}, self.outer.init(params), state.rng)
        begun = LocalState(step, repeated(state, self.workers), outer)
        # On one process a place copies nothing, and the workers are still views of one of them.
        return tree.map(_own_memory, begun if self.plan is None else self.plan.place(begun))

    def __call__(self, state: LocalState, batch: Any) -> tuple[LocalState, dict[str, Metric]]:
        """Return the state after one step of each worker, and the metrics of the batch over all of them."""
        view = self._checked(state)
        if self.plan is not None and world_size() > 1:
            compare_first(self.plan, self.microbatch_count, state, batch)
        batch = following(view.workers, batch)
        done = steps_of(state.step)
        if done is not None and done < self.start:
            new, metrics = self._together(view, batch)
        else:
            new, metrics = self._apart(view, batch)
            if done is None or (done + 1 - self.start) % self.every == 0:
                who = team(self.plan, self.workers)
                new = averaged(who, new, self.workers, self.outer, optimizer=self.average_optimizer)
        return placement.rewrap(new.replace(step=state.step + 1), state), metrics

    def _apart(self, view: LocalState, batch: Any) -> tuple[LocalState, dict[str, Metric]]:
        """Let each worker of this rank take a step on its share of the batch; one without samples stays as it is."""
        who, cut = team(self.plan, self.workers), cut_for(self, batch)
        states = [one_of(view.workers, place) for place in range(len(who.mine))]
        found = {}
        for place, worker in enumerate(who.mine):
            if worker in cut.shares:
                states[place], found[worker] = self._one(states[place], worker, *cut.shares[worker])
        pattern = next(iter(found.values()), None)
        if pattern is None:  # the ranks exchange metrics like those of a worker that has samples
            pattern = self._one(states[0], who.mine[0], *cut.spare)[1]
        sums = Accumulation(view.workers, cut.samples)
        sums.told = sizes_of(batch, sum(cut.samples))
        counted = team(self.plan, self.workers, cut.filled)
        return view.replace(workers=together(states)), merged(counted, sums, found, pattern)

    def _one(self, state: TrainState, worker: int, batch: Any, samples: int) -> tuple[TrainState, dict[str, Metric]]:
        """Let one worker take a step, with a key of its own."""
        new, values = self.step(with_key_of(state, worker), batch)
        return new.replace(rng=state.rng), as_metrics(values, samples)

    def _together(self, view: LocalState, batch: Any) -> tuple[LocalState, dict[str, Metric]]:
        """Take one step of all workers, which are all alike, on the gradient of the whole batch."""
        step: Any = self.step
        planned = dataclasses.replace(step, plan=self.plan, microbatches=self.microbatch_count)
        new, metrics = planned(one_of(view.workers, 0), batch)
        outer = None if view.outer is None else view.outer.replace(params=tree.map(torch.clone, new.params))
        return view.replace(workers=tree.map(_own_memory, repeated(new, _here(view))), outer=outer), metrics

    def _checked(self, state: object) -> LocalState:
        """Return the part of a state that is here.

        Raises:
            StepError: it is no state of workers, or one of another number of them.
            ConfigError: it is not placed by the plan.
        """
        if not isinstance(state, LocalState):
            raise StepError(
                explain(
                    "a step of workers takes the state of all of them",
                    where=f"state: {type(state).__name__}",
                    instead="state = step.begin(ps.init(make_model, tx))",
                )
            )
        count = int(state.workers.step.shape[0])
        if count != self.workers or (state.outer is None) != (self.outer is None):
            has = f"{count} workers, {'no' if state.outer is None else 'an'} outer optimizer"
            wants = f"{self.workers} workers, {'no' if self.outer is None else 'an'} outer optimizer"
            raise StepError(
                explain(
                    "the state was begun by another step of workers",
                    where=f"state: {has}; step: {wants}",
                    instead="state = step.begin(ps.average_workers(state))",
                )
            )
        view = placement.local(state)
        self.check_here(_here(view), "")
        return view

    @property
    def facts(self) -> StepFacts:
        """What is known of it; the tx and the gradients are those of one worker, so they are not those of its state."""
        of_one = facts_of(self.step)
        known = StepFacts(of_one.loss_fn, None, self.microbatch_count, of_one.policy, self.plan)
        return dataclasses.replace(known, backend=of_one.backend, warmup=of_one.warmup, ready=of_one.ready)

    def identity(self) -> dict[str, Any]:
        """Return what a snapshot of a run records of it: not where it runs."""
        names = ("step", "workers", "every", "start", "outer", "average_optimizer")
        return {name: getattr(self, name) for name in names}


def _here(view: LocalState) -> int:
    return int(view.workers.step.shape[0])


def _own_memory(leaf: Tensor) -> Tensor:
    """Return a tensor that shares its memory with no other worker."""
    return leaf if placement.is_split(leaf) else leaf.clone(memory_format=torch.contiguous_format)


@checked(ConfigError)
def local_sgd(
    step: Callable[..., Any],
    *,
    workers: Count,
    every: Count,
    start: Whole = 0,
    average_optimizer: bool = False,
    plan: Plan | None = None,
) -> LocalStep:
    """Make a step of workers that train apart, each on its share of the batch, and are averaged every so many steps.

    Gradients are not exchanged: the params travel once a round. What does travel in each step are the metrics, a few
    numbers. The number of workers belongs to the run, like the batch size: a process holds one or several, so a run has
    the same bits on 1, 2 or 4 processes, and resumes on another number of them.

    Args:
        step: that of one worker, of `ps.make_step` without a plan, or `ps.jit` of one; `microbatches=` counts those of
            one worker.
        workers: their number (W), a multiple of the number of processes. A batch is shared among them in order; of
            uneven shares the first are larger by one sample, and a worker without samples stays as it is.
        every: steps of a round (H). Params and floating buffers then become their means over the workers; counters,
            and the optimizer state by default, stay those of each worker.
        start: steps before the first round, on the gradient of the whole batch: post-local SGD. They have the bits of
            `ps.make_step(..., microbatches=W)`.
        average_optimizer: average the floating part of the optimizer state, too (momentum), at as much traffic.
        plan: whose ranks hold the workers; `ps.sharding.ddp()` by default, all processes of the job. It splits no
            parameter.

    Returns:
        A step. `step.begin(state)` makes the state of all workers from that of `ps.init`; `ps.average_workers(state)`
        is their mean, to evaluate or export. On a card the host reads the number of the step in each step, and waits.

    Raises:
        ConfigError: `step` has a plan, evaluates, donates its state, or leaves its microbatches to `fit`; `start` with
            a step that is none of `ps.make_step`; a precision policy with master weights without `average_optimizer`.

    Examples:
        >>> import purestep as ps
        >>> tx = ps.optim.sgd(0.1)
        >>> inner = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        >>> step = local_sgd(inner, workers=4, every=16)
        >>> state = step.begin(ps.init(lambda: torch.nn.Linear(2, 1), tx))
        >>> result = ps.fit(step, state, ps.data.batches({"x": torch.ones(64, 2)}, 8), until=ps.steps(16))
        >>> weight = result.state.workers.params["weight"]
        >>> weight.shape, bool((weight == weight[0]).all())
        (torch.Size([4, 1, 2]), True)

    References:
        Stich, "Local SGD Converges Fast and Communicates Little", 2019, https://arxiv.org/abs/1805.09767
        Lin et al., "Don't Use Large Mini-Batches, Use Local SGD", 2020 (`start`), https://arxiv.org/abs/1808.07217
    """
    check_plan(plan, "ps.local_sgd")
    return _made(LocalStep(step, workers, every, start, None, average_optimizer), plan)


@checked(ConfigError)
def diloco(
    step: Callable[..., Any],
    *,
    workers: Count,
    every: Count,
    outer: GradientTransformation | None = None,
    start: Whole = 0,
    average_optimizer: bool = False,
    plan: Plan | None = None,
) -> LocalStep:
    """Make a step of workers that train apart, whose mean progress in a round is the gradient of an outer optimizer.

    At the end of a round the outer optimizer updates the params that the round began with, by their difference to the
    mean of the workers; all workers go on from there, each with its own optimizer state. Everything else is as in
    `local_sgd`, which is `outer=ps.optim.sgd(1.0)`.

    Args:
        step, workers, every, start, average_optimizer, plan: as for `local_sgd`. The paper has AdamW inside, and rounds
            of 500 steps.
        outer: transformation of the outer update; by default the paper's, `ps.optim.sgd(0.7, momentum=0.9,
            nesterov=True)`. Its schedules count rounds.

    Examples:
        >>> import purestep as ps
        >>> tx = ps.optim.adamw(1e-3)
        >>> step = diloco(ps.make_step(lambda net, x: net(x).square().mean(), tx), workers=2, every=500)
        >>> state = step.begin(ps.init(lambda: torch.nn.Linear(3, 1), tx))
        >>> state, metrics = step(state, torch.randn(4, 3))
        >>> int(state.step), int(state.outer.step), sorted(metrics)
        (1, 0, ['loss'])

    Reference: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023,
    https://arxiv.org/abs/2311.08105
    """
    from purestep import optim

    chosen = optim.sgd(0.7, momentum=0.9, nesterov=True) if outer is None else outer
    check_transformation(chosen)
    check_plan(plan, "ps.diloco")
    return _made(LocalStep(step, workers, every, start, chosen, average_optimizer), plan)


def _made(step: LocalStep, plan: Plan | None) -> LocalStep:
    """Return a step of workers with its plan, once it is checked."""
    facts = facts_of(step.step)
    problems: Mapping[str, bool] = {
        "has a plan": facts.plan is not None,
        "evaluates": facts.evaluates,
        "consumes its state": facts.donate,
        "leaves its number of microbatches to fit": facts.microbatches == "auto",
    }
    found = [problem for problem, there in problems.items() if there]
    if found:
        raise ConfigError(
            explain(
                f"the step of a worker {found[0]}",
                where=name_of(step.step),
                why="a worker is whole on one process, and takes its step alone",
                instead="ps.local_sgd(ps.make_step(loss_fn, tx), workers=4, every=16, plan=ps.sharding.ddp())",
            )
        )
    if step.start and not isinstance(step.step, Step):
        raise ConfigError(
            explain(
                "start= needs a step of make_step",
                where=f"start={step.start}, {name_of(step.step)}",
                why="before the first round gradients are averaged, and only such a step tells its own",
                instead="ps.local_sgd(ps.make_step(loss_fn, tx), workers=4, every=16, start=100)",
            )
        )
    if facts.policy is not None and facts.policy.master is not None and not step.average_optimizer:
        raise ConfigError(
            explain(
                "master weights are a part of the optimizer state, which is not averaged",
                where=f"policy {facts.policy}",
                why="the next update of each worker would begin from its own master weights again",
                instead="average_optimizer=True, or a policy without master weights",
            )
        )
    return dataclasses.replace(step, plan=WorkerPlan.of(presets.ddp() if plan is None else plan))
