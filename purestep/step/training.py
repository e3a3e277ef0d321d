"""`make_step`: a training step.

It is two pure pieces, `grads(state, microbatch, index)` and `update(state, gradients)`; accumulation and data
parallelism put a fixed-order sum between them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import torch
from torch import Tensor

from purestep import metrics as metrics_
from purestep.activations import Checkpoint, as_checkpoint
from purestep.arguments import checked
from purestep.donation import also_donated, apart, donation_of
from purestep.errors import ConfigError, StepError, explain
from purestep.functional import Binding
from purestep.grad import Engine, loss_gradients
from purestep.microbatch import (
    NO_EXCHANGE,
    Context,
    Gradients,
    MicrobatchExchange,
    Prepared,
    accumulate,
    both,
    counted,
    split_batch,
)
from purestep.optim.base import GradientTransformation, check_transformation
from purestep.optim.scope import needs_value
from purestep.parallel import offload, zero
from purestep.parallel.fsdp_order import Orders
from purestep.precision import Policy
from purestep.precision import policy as policy_of
from purestep.precision.cast_params import Uncast, casting, wrapped
from purestep.random.keys import step_key
from purestep.sharding import placement
from purestep.sharding.local_batches import MOST_MICROBATCHES
from purestep.sharding.plan import Plan, check_plan
from purestep.state import TrainState, definition
from purestep.step.direct import direct_gradients
from purestep.step.loss import LossFn, Metrics, check_arity, dispatching, on_plan, read_loss, samples_of, splitting
from purestep.step_protocol import AnyStep, StepFacts, StepFn, following
from purestep.tree import Filter


@dataclasses.dataclass(frozen=True)
class Step(AnyStep):
    """A training step. Made by `make_step`; call it as `step(state, batch)`."""

    loss_fn: LossFn
    tx: GradientTransformation
    microbatches: int | Literal["auto"] | None = 1
    engine: Engine = "auto"
    policy: Policy | None = None
    plan: Plan | None = None
    checkpoint: Checkpoint | None = None

    @property
    def microbatch_count(self) -> int:
        """Number of microbatches of a batch (V): the given one, or one for each replica of the plan."""
        if self.microbatches == "auto":
            raise ConfigError(
                explain(
                    "the number of microbatches is not settled yet",
                    where="ps.make_step(..., microbatches='auto')",
                    why="it depends on the state, the batch and the memory that is free",
                    instead="ps.fit(step, ...)   # the step itself: the first batch settles it\n"
                    "ps.fit(ps.wrap_step(step, function), ...)   # where a function is around it\n"
                    "count = ps.loop.choose_microbatches(step, state, batch)   # in a loop of your own",
                )
            )
        return self.microbatches or (1 if self.plan is None else self.plan.replicas)

    @functools.cached_property
    def orders(self) -> Orders:
        """What the ranks of the plan know of the order in which this step gathers the units of a model."""
        return Orders()

    @functools.cached_property
    def _direct(self) -> bool:
        """Whether nothing is cast, exchanged with other ranks, or computed again in the backward pass."""
        return self.plan is None and self.policy is None and self.checkpoint is None

    @functools.cached_property
    def _needs_value(self) -> bool:
        """Whether the transformation may read the loss."""
        return needs_value(self.tx)

    def identity(self) -> dict[str, Any]:
        """Return what a snapshot of a run records of its step, beside microbatches and policy: not where it runs."""
        return {"loss_fn": self.loss_fn, "tx": self.tx, "engine": self.engine}

    @property
    def facts(self) -> StepFacts:
        """What the loop, `jit` and the checks before the first batch know of it."""
        count: int | Literal["auto"] = "auto" if self.microbatches == "auto" else self.microbatch_count
        return StepFacts(self.loss_fn, self.tx, count, self.policy, self.plan, gradients=self.gradients)

    def bare(self, microbatches: int | None = None) -> Step:
        return dataclasses.replace(self, plan=None, microbatches=microbatches or self.microbatches)

    def with_microbatches(self, count: int) -> Step:
        return dataclasses.replace(self, microbatches=count)

    def under(self, plan: Plan) -> StepFn:
        return self

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Return the state after one update, and the metrics of the batch, which follows the state to its device."""
        batch = following(state, batch)
        if self.plan is None:
            return self.update(state, self.gradients(state, batch))
        view = placement.local(state)
        also_donated(state, view)
        return zero.updated(self.plan, state, view, self._planned(self.plan, state, view, batch), self.update)

    def gradients(self, state: TrainState, batch: Any) -> Gradients:
        """Compute the mean gradients and the metrics of a batch, without an update; under a plan those of this rank's
        parts, and every rank calls it."""
        if self.plan is not None:
            return self._planned(self.plan, state, placement.local(state), batch)
        if self.microbatches == 1 or self.microbatch_count == 1:
            part = self.grads(state, batch)
            return part if isinstance(part.weight, int) else counted(part)
        total = accumulate(state, samples_of(batch), self.microbatch_count)
        for index, (microbatch, _) in enumerate(split_batch(batch, self.microbatch_count)):
            total.add(self.grads(state, microbatch, index), index)
        return total.result()

    def _planned(self, plan: Plan, state: TrainState, view: TrainState, batch: Any) -> Gradients:
        from purestep.parallel import microbatches as microbatches_module

        microbatches_module.check(plan, self)
        if plan.pipelined:
            from purestep.parallel import pipeline

            module = casting(self.policy, definition(state).module).module
            return pipeline.total(plan, self.microbatch_count, module, state, view, batch, self._prepared)
        return microbatches_module.total(plan, self.microbatch_count, state, view, batch, self._grads, self.orders)

    def grads(self, state: TrainState, microbatch: Any, index: int | Tensor = 0) -> Gradients:
        """Compute the gradients and metrics of one microbatch, randomness from (state.rng, state.step, index)."""
        if self._direct:
            return direct_gradients(self.loss_fn, self.engine, state, microbatch, index)
        return self._grads(state, microbatch, index, NO_EXCHANGE)

    def _grads(
        self, state: TrainState, microbatch: Any, index: int | Tensor, exchange: MicrobatchExchange
    ) -> Gradients:
        """Do what `grads` says, for a microbatch whose parameters and gradients an exchange may pass between ranks."""
        ready = self._prepared(state, microbatch, index, exchange)
        grads, (weight, new, metrics) = loss_gradients(ready.loss_of, ready.tracked, self.engine, exchange.collects)
        return Gradients(exchange.backward_done(ready.cast, grads), weight, new, metrics)

    def _prepared(
        self, state: TrainState, microbatch: Any, index: int | Tensor, exchange: MicrobatchExchange
    ) -> Prepared:
        """Make ready one microbatch: what is differentiated, and the function that computes its loss."""
        exchange.check(state)
        samples, cast = samples_of(microbatch), casting(self.policy, definition(state).module)
        rng = functools.partial(step_key, state.rng, state.step, index)
        cast.check(state)
        old, params = cast.buffers(state.buffers), cast.params(state.params)
        together = None if self.plan is None else splitting(self.plan, cast.module)
        if self.plan is not None:
            old = offload.on_card(self.plan, state, old, exchange.gathers)
            params = offload.on_card(self.plan, state, params, exchange.gathers)

        def loss_of(tracked: Any) -> tuple[Tensor, Any]:
            tensors, given, around = exchange.bound(tracked, old, self._around(cast))
            buffers = given
            if together is not None:
                tensors, buffers = together.bound(tensors), together.bound(given)
                around = together.around(cast.module, around)
            if not exchange.dispatches:
                around = dispatching(self.plan, cast.module, around)
            bound = Binding(cast.module, tensors, buffers, rng=rng, around=around, handlers=cast.handlers)
            with cast.scope(params):
                loss_fn, alone = on_plan(self.plan, self.loss_fn), exchange.repeatable and together is None
                loss, weight, metrics = read_loss(loss_fn, bound, cast.batch(microbatch), samples, alone=alone)
            left = bound.new_buffers if together is None else together.kept(bound.new_buffers, given)
            new = cast.kept(state.buffers, old, exchange.plain(left, state.buffers))
            if self.plan is not None:
                new = offload.at_rest(self.plan, state, new)
            # What is known before the backward pass leaves before it: the exchange then goes on beside it.
            exchange.forward_done(weight, new, metrics)
            return cast.scaled(loss, state), (weight, new, metrics)

        return Prepared(loss_of, exchange.tracked(cast, params), cast)

    def _around(self, cast: Uncast) -> Context | None:
        """Return what makes the context that the model runs in: hooks of the policy, checkpoints by rule."""
        if self.checkpoint is None:
            return cast.around
        return functools.partial(both, self.checkpoint.around(cast.module), cast.around)

    def update(self, state: TrainState, gradients: Gradients) -> tuple[TrainState, Metrics]:
        """Apply the gradients of a whole batch; an update that was refused counts itself in `skipped`."""
        metrics = gradients.metrics
        donation = donation_of(state)
        if donation is not None:
            # A metric may be a view of a parameter, whose memory the update is about to write over.
            metrics = apart(metrics, donation.memory)
        grads, finite = gradients.grads, None
        if self.policy is not None:
            grads, finite = casting(self.policy, definition(state).module).settled(state, grads)
        value = metrics["loss"].compute() if self._needs_value else None
        new = self._advanced(state, grads, gradients.buffers, finite, value)
        refused = self.tx.refused(new.opt_state)
        if refused is not None:
            refused = refused.to(state.step.device, non_blocking=True)
        if finite is not None:
            # Of what was not finite nothing reached the transformation, whose state still tells of the update before.
            refused = ~finite if refused is None else ~finite | refused
            new = new.replace(loss_scale=state.loss_scale.adjust(finite))
        if refused is not None:
            metrics = metrics | {"skipped": metrics_.Sum(refused.to(torch.int64))}
        return new, metrics

    def _advanced(
        self, state: TrainState, grads: Any, buffers: dict[str, Tensor], accept: Tensor | None, value: Any
    ) -> TrainState:
        """Return the state with the gradients applied, on the CPU where the plan keeps the optimizer state there."""
        if self.plan is not None and offload.is_away(self.plan, state):
            return offload.apply_gradients(
                self.plan, state, self.tx, grads, buffers=buffers, accept=accept, value=value
            )
        return state.apply_gradients(self.tx, grads, buffers=buffers, accept=accept, last_use=True, value=value)


@checked(StepError)
def make_step(
    loss_fn: LossFn,
    tx: GradientTransformation,
    *,
    microbatches: int | Literal["auto"] | None = None,
    engine: Engine = "auto",
    policy: Policy | str | None = None,
    plan: Plan | None = None,
    checkpoint: Filter | Checkpoint | None = None,
) -> Step:
    """Make a pure training step `(state, batch) -> (state, metrics)`.

    Args:
        loss_fn: `loss_fn(net, batch)` returns a loss, or `(loss, metrics)`. `net` is the model bound to the params
            that are differentiated; use it like the module it is. The loss is a 0-d floating mean over the samples of
            the batch, or `ps.weighted(mean, weight)` for a mean over something else. Metrics are a dict; see
            `metrics.as_metrics`.
        tx: gradient transformation, the one the state was made with.
        microbatches: slice each batch into so many equal ones, run one after the other through the model, and sum their
            gradients in a fixed binary tree. Memory falls, the gradient is that of the whole batch to rounding. By
            default 1; with a plan one for each rank that computes others, so name it where the number of ranks may
            change: the bits depend on it. "auto" lets `fit` take the smallest number that fits in memory; a resumed
            run keeps the one it began with.
        engine: see `grad_and_value`.
        policy: precision policy, or the name of one; the state has to be under it, `policy.apply(state)`. The model is
            cast by its rules, gradients are summed in its reduce dtype and unscaled before `tx` sees them, and with a
            loss scale an update with gradients that are not finite changes nothing but the scale.
        plan: a `ps.sharding` plan; the state has to be placed by it, `plan.place(state)`. Every rank calls the step
            with the same global batch, or with its `LocalBatch`, and computes its own microbatches of it.
        checkpoint: globs of submodules that store no activations and run again in the backward pass (`"blocks.*"`), or
            a `ps.Checkpoint` that says more. The bits do not change.

    Returns:
        A Step. Its metrics hold `loss`, those of `loss_fn`, and `skipped` if `tx` or the policy can skip updates. Its
        `tx` is the one it applies: the given one, with master weights around it if the policy has them.

    Raises:
        ConfigError: `microbatches` is not a positive integer, `plan` is no plan, or `loss_fn` does not take two
            arguments.

    Examples:
        >>> from torch import nn
        >>> import purestep as ps
        >>> def loss_fn(net, batch):
        ...     return ((net(batch["x"]) - batch["y"]) ** 2).mean()
        >>> tx = ps.optim.sgd(0.1)
        >>> state = ps.init(lambda: nn.Linear(3, 1), tx, seed=0)
        >>> step = make_step(loss_fn, tx)
        >>> batch = {"x": torch.ones(4, 3), "y": torch.ones(4, 1)}
        >>> new, metrics = step(state, batch)
        >>> int(state.step), int(new.step), sorted(metrics)
        (0, 1, ['loss'])
    """
    if microbatches not in (None, "auto") and (
        not isinstance(microbatches, int)
        or isinstance(microbatches, bool)
        or not 1 <= microbatches <= MOST_MICROBATCHES
    ):
        raise ConfigError(
            explain(
                f"microbatches is a positive integer or 'auto', at most {MOST_MICROBATCHES}",
                where=f"microbatches={microbatches!r}",
            )
        )
    check_plan(plan, "ps.make_step")
    if microbatches == "auto" and plan is not None:
        raise ConfigError(
            explain(
                "microbatches='auto' and a plan do not go together",
                where="ps.make_step(..., microbatches='auto', plan=...)",
                why="each rank would choose by the memory that it has, and all need the same number",
                instead="microbatches=8   # a number that all of them can share",
            )
        )
    check_transformation(tx)
    check_arity(loss_fn)
    chosen = None if policy is None else policy_of(policy)
    if plan is None and microbatches is None:
        microbatches = 1
    rule = as_checkpoint(checkpoint)
    if rule is not None and rule.offload and plan is not None and plan.zero == 3 and plan.shard_axes:
        raise ConfigError(
            explain(
                "activations cannot be moved to the CPU under a plan that splits parameters",
                where=f"{rule!r} on {plan.mesh!r}",
                why="a unit that gathers its parameters keeps account itself of what is saved inside of it",
                instead=f"ps.make_step(..., checkpoint=ps.Checkpoint({rule.modules!r}))   # recomputed\n"
                "or plan=ps.sharding.zero2()",
            )
        )
    return Step(loss_fn, wrapped(chosen, tx), microbatches, engine, chosen, plan, rule)
