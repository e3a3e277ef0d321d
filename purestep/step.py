"""Steps: pure functions `(state, batch) -> (state, metrics)` made from a loss function and a gradient transformation.

A step is two pure pieces, `grads(state, microbatch, index)` and `update(state, gradients)`; accumulation and data
parallelism put a fixed-order sum between them. `make_eval` and `make_predict` make the read-only counterparts.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from purestep import metrics as metrics_
from purestep import random, transforms, tree
from purestep.activations import Checkpoint, as_checkpoint
from purestep.arguments import NonNegative, checked
from purestep.donation import also_donated, apart, donation_of
from purestep.errors import ConfigError, StepError, explain
from purestep.functional import Binding
from purestep.grad import Engine, loss_gradients
from purestep.metrics import Metric, as_metrics, sample_count
from purestep.metrics.converted import refuse_captured
from purestep.metrics.dicts import described
from purestep.microbatch import (
    NO_EXCHANGE,
    Context,
    Gradients,
    MicrobatchExchange,
    accumulate,
    both,
    counted,
    split_batch,
)
from purestep.optim.base import GradientTransformation, check_transformation
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
from purestep.step_protocol import AnyStep, StepFacts, StepFn, following, no_microbatches
from purestep.tree import Filter

if TYPE_CHECKING:
    from purestep.parallel.tensor_parallel import Splitter

LossFn = Callable[[Any, Any], Any]
Metrics = dict[str, Metric]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A loss and what it is a mean over. Made by `weighted`."""

    loss: Tensor
    weight: Tensor


@checked(StepError)
def weighted(loss: Tensor, weight: NonNegative[Tensor | float]) -> Weighted:
    """Return a loss together with what it is a mean over, when that is not the samples: tokens, pixels, edges.

    Microbatches and epochs are then weighted by it, so that the gradient is that of the mean over the whole batch. A
    batch of weight 0, all padding, has the gradient 0, and its loss counts for nothing in the mean of an epoch.

    Args:
        loss: floating [], the mean over `weight` items.
        weight: number of items, a number or a 0-d tensor.

    Examples:
        >>> weighted(torch.tensor(2.0), 3)
        Weighted(loss=tensor(2.), weight=tensor(3., dtype=torch.float64))
    """
    if not isinstance(loss, Tensor):
        raise StepError(explain("ps.weighted takes the loss as a tensor", where=f"loss: {tree.describe(loss)}"))
    # float64 counts tokens exactly, and divides without adding to the error of the gradients.
    dtype = torch.float32 if loss.device.type == "mps" else torch.float64
    if isinstance(weight, Tensor):
        return Weighted(loss, transforms.detached(weight).to(loss.device, dtype))
    return Weighted(loss, torch.full((), weight, dtype=dtype, device=loss.device))


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

    @property
    def _loss_fn(self) -> LossFn:
        return on_plan(self.plan, self.loss_fn)

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
        gradients = self._planned(self.plan, state, view, batch)
        return zero.updated(self.plan, state, view, gradients, self.update)

    def gradients(self, state: TrainState, batch: Any) -> Gradients:
        """Compute the mean gradients and the metrics of a batch, without an update; under a plan those of this rank's
        parts, and every rank calls it."""
        if self.plan is not None:
            return self._planned(self.plan, state, placement.local(state), batch)
        if self.microbatch_count == 1:
            return counted(self.grads(state, batch))
        total = accumulate(state, _samples(batch), self.microbatch_count)
        for index, (microbatch, _) in enumerate(split_batch(batch, self.microbatch_count)):
            total.add(self.grads(state, microbatch, index), index)
        return total.result()

    def _planned(self, plan: Plan, state: TrainState, view: TrainState, batch: Any) -> Gradients:
        from purestep.parallel import microbatches as microbatches_module

        microbatches_module.check(plan, self)
        return microbatches_module.total(plan, self.microbatch_count, state, view, batch, self._grads, self.orders)

    def grads(self, state: TrainState, microbatch: Any, index: int | Tensor = 0) -> Gradients:
        """Compute the gradients and metrics of one microbatch, randomness from (state.rng, state.step, index)."""
        return self._grads(state, microbatch, index, NO_EXCHANGE)

    def _grads(
        self, state: TrainState, microbatch: Any, index: int | Tensor, exchange: MicrobatchExchange
    ) -> Gradients:
        """Do what `grads` says, for a microbatch whose parameters and gradients an exchange may pass between ranks."""
        exchange.check(state)
        samples, cast = _samples(microbatch), casting(self.policy, definition(state).module)
        rng = functools.partial(step_key, state.rng, state.step, index)
        cast.check(state)
        old = offload.on_card(self.plan, state, cast.buffers(state.buffers), exchange.gathers)
        params = offload.on_card(self.plan, state, cast.params(state.params), exchange.gathers)

        together = splitting(self.plan, cast.module)

        def loss_of(tracked: Any) -> tuple[Tensor, Any]:
            tensors, given, around = exchange.bound(tracked, old, self._around(cast))
            buffers = given
            if together is not None:
                tensors, buffers = together.bound(tensors), together.bound(given)
            bound = Binding(cast.module, tensors, buffers, rng=rng, around=around, handlers=cast.handlers)
            with cast.scope(params):
                loss, weight, metrics = read_loss(
                    self._loss_fn, bound, cast.batch(microbatch), samples, alone=self.plan is None
                )
            left = bound.new_buffers if together is None else together.kept(bound.new_buffers, given)
            new = cast.kept(state.buffers, old, exchange.plain(left, state.buffers))
            new = offload.at_rest(self.plan, state, new)
            # What is known before the backward pass leaves before it: the exchange then goes on beside it.
            exchange.forward_done(weight, new, metrics)
            return cast.scaled(loss, state), (weight, new, metrics)

        tracked = exchange.tracked(cast, params)
        grads, (weight, new, metrics) = loss_gradients(loss_of, tracked, self.engine, exchange.collects)
        return Gradients(exchange.backward_done(cast, grads), weight, new, metrics)

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
        grads, finite = casting(self.policy, definition(state).module).settled(state, gradients.grads)
        value = metrics["loss"].compute()
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
        self, state: TrainState, grads: Any, buffers: dict[str, Tensor], accept: Tensor | None, value: Tensor
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
    _check_arity(loss_fn)
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


def _check_arity(loss_fn: LossFn) -> None:
    refuse_captured(loss_fn)
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        name = getattr(loss_fn, "__name__", "loss_fn")
        raise ConfigError(
            explain(
                "a loss function takes the model and the batch",
                where=f"{name}{signature}",
                instead="def loss_fn(net, batch): ...",
            )
        ) from error


def on_plan(plan: Plan | None, loss_fn: LossFn) -> LossFn:
    """Return a loss function as several ranks compute it together, where a plan says so."""
    if plan is None:
        return loss_fn
    plan.check_computed()
    if not plan.tensor_axis:
        return loss_fn
    from purestep.parallel.tensor_parallel import plain_loss

    return plain_loss(loss_fn)


def splitting(plan: Plan | None, module: nn.Module) -> Splitter | None:
    """Return what binds a model to the parts that a rank of a plan has; None where parameters are whole in a call."""
    if plan is None or not plan.tensor_axis:
        return None
    from purestep.parallel import tensor_parallel

    return tensor_parallel.splitter(plan, module)


def _samples(batch: Any) -> int:
    """Return the number of samples of a batch, which is never 0: the mean over none of them is NaN."""
    samples = sample_count(batch)
    if samples == 0:
        raise StepError(
            explain(
                "the batch has no samples",
                where=described(batch),
                why="the mean of a loss over none is 0 / 0, and would make every mean that it enters NaN",
                instead="leave empty batches out where they are made: (b for b in batches if len(b) > 0)",
            )
        )
    return samples


def read_loss(
    loss_fn: LossFn, bound: Binding, batch: Any, samples: int, *, alone: bool = True
) -> tuple[Tensor, Any, Metrics]:
    """Call a loss function on a bound model, and check and normalise what it returns.

    Args:
        loss_fn, bound, batch: what is called on what.
        samples: the weight of the loss, unless it brings its own.
        alone: whether it may be called a second time: not where the model waits for other ranks.

    Returns:
        The loss to differentiate, its weight, and all metrics, `loss` first.
    """
    out = _called(loss_fn, bound, batch, alone=alone)
    loss, extra = out if isinstance(out, tuple) and len(out) == 2 else (out, {})
    weight: Any = samples
    if isinstance(loss, Weighted):
        weight = loss.weight
        loss = loss.loss
    is_dict = type(extra) is dict or isinstance(extra, Mapping)
    if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point() or not is_dict:
        raise StepError(_loss_message(loss_fn, out))
    if "loss" in extra:
        raise StepError(explain("the metric 'loss' is the loss itself", instead="give the other metric another name"))
    metrics: Metrics = {"loss": metrics_.mean(loss, weight), **as_metrics(extra, samples)}
    return loss, weight, metrics


def _called(function: Callable[[Any, Any], Any], bound: Binding, batch: Any, *, alone: bool) -> Any:
    """Return what a function makes of the bound model and a batch; `alone`: it may be called a second time."""
    if alone:
        return bound.run(lambda net: function(net, batch), function)
    with bound as net:
        return function(net, batch)


def _loss_message(loss_fn: LossFn, out: Any) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{k!r}: {shown(v)}" for k, v in list(value.items())[:6]) + "}"
        if isinstance(value, (tuple, list)):
            return "(" + ", ".join(shown(v) for v in value) + ")"
        return tree.describe(value) if isinstance(value, Tensor) else type(value).__name__

    instead = "return loss\nreturn loss, {'accuracy': ps.metrics.accuracy(logits, labels)}"
    if isinstance(out, Mapping) and "loss" in out:
        instead = "return out['loss'], {...}   # the loss first, then a dict of metrics"
    elif isinstance(out, Tensor) and out.ndim:
        instead = "return loss.mean()   # one number"
    return explain(
        "a loss function returns a loss, or (loss, metrics): a 0-d floating tensor and a dict",
        where=f"{getattr(loss_fn, '__name__', 'loss_fn')} returned {shown(out)}",
        instead=instead,
    )


@dataclasses.dataclass(frozen=True)
class _Inference(AnyStep):
    """A model that is called in evaluation mode, without gradients; nothing is changed."""

    loss_fn: LossFn
    policy: Policy | None = None
    plan: Plan | None = None

    @functools.cached_property
    def orders(self) -> Orders:
        """What the ranks of the plan know of the order in which this evaluation gathers the units of a model."""
        return Orders()

    def identity(self) -> dict[str, Any]:
        """Return what a snapshot of a run records of its evaluations: not where they run."""
        return {"loss_fn": self.loss_fn, "policy": self.policy}

    def bare(self, microbatches: int | None = None) -> Self:
        return dataclasses.replace(self, plan=None)

    def with_microbatches(self, count: int) -> AnyStep:
        raise no_microbatches(self)

    def under(self, plan: Plan) -> Self:
        return self if self.plan is not None else dataclasses.replace(self, plan=plan)

    def _call(self, state: TrainState, batch: Any, call: Callable[[Binding, Any], T]) -> T:
        """Return `call(bound, batch)` with the model bound to the state, and the batch as the policy has it."""
        cast = casting(self.policy, definition(state).module)
        if self.plan is None:
            placement.check_plain(state)
        view = state if self.plan is None else placement.local(state)
        params, buffers = cast.params(view.params), cast.buffers(view.buffers)
        around: Context | None = cast.around
        rng = functools.partial(random.fold_in, state.rng, "eval")
        with transforms.unrecorded(), cast.scope(params):
            if self.plan is not None:
                from purestep.parallel.fsdp import evaluated, split_leaves

                held = split_leaves(state)
                params, buffers = (offload.on_card(self.plan, state, x, held) for x in (params, buffers))
                params, buffers, around = evaluated(self.plan, state, cast, params, buffers, self.orders)
            together = splitting(self.plan, cast.module)
            if together is not None:
                params, buffers = together.bound(params), together.bound(buffers)
            bound = Binding(cast.module, params, buffers, rng=rng, train=False, around=around, handlers=cast.handlers)
            return call(bound, cast.batch(batch))


@dataclasses.dataclass(frozen=True)
class Eval(_Inference):
    """An evaluation step. Made by `make_eval`; call it as `eval_step(state, batch)`."""

    @property
    def facts(self) -> StepFacts:
        """What callbacks and the checks before the first batch know of it."""
        return StepFacts(self.loss_fn, policy=self.policy, plan=self.plan, evaluates=True)

    def __call__(self, state: TrainState, batch: Any) -> Metrics:
        """Return the metrics of a batch, with the model in evaluation mode; nothing is changed."""
        batch = following(state, batch)
        samples, loss_fn = _samples(batch), on_plan(self.plan, self.loss_fn)
        return self._call(
            state, batch, lambda bound, given: read_loss(loss_fn, bound, given, samples, alone=self.plan is None)[2]
        )


@dataclasses.dataclass(frozen=True)
class Predict(_Inference):
    """A prediction step. Made by `make_predict`; call it as `predict_step(state, batch)`."""

    @property
    def facts(self) -> StepFacts:
        """What is known of it: it has no loss."""
        return StepFacts(policy=self.policy, plan=self.plan)

    def __call__(self, state: TrainState, batch: Any) -> Any:
        """Return what the function computes for a batch, with the model in evaluation mode; nothing is changed."""
        batch = following(state, batch)
        samples, function = _samples(batch), on_plan(self.plan, self.loss_fn)
        outputs = self._call(
            state, batch, lambda bound, given: _called(function, bound, given, alone=self.plan is None)
        )
        return _one_a_sample(self.loss_fn, outputs, samples)


def _one_a_sample(function: LossFn, outputs: Any, samples: int) -> Any:
    leaves = tree.leaves(outputs)
    odd = [
        f"{path}: {tree.describe(leaf)}"
        for path, leaf in zip(tree.paths(outputs, "output"), leaves, strict=True)
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != samples
    ]
    if odd or not leaves:
        raise StepError(
            explain(
                "a prediction is a tensor with the samples of the batch as dim 0, or a dict or tuple of them",
                where=", ".join(odd[:5]) or f"{getattr(function, '__name__', 'function')} returned {outputs!r}"[:200],
                why=f"the batch has {samples} samples, and each output belongs to one of them",
                instead="lambda net, batch: net(batch['x']).argmax(-1)",
            )
        )
    return outputs


@checked(StepError)
def make_eval(loss_fn: LossFn, *, policy: Policy | str | None = None, plan: Plan | None = None) -> Eval:
    """Make a pure evaluation step `(state, batch) -> metrics`.

    Args:
        loss_fn: as in `make_step`; the same function serves both. It runs in evaluation mode without gradients. A
            model that draws random numbers even then draws them from a key that is the same for every batch.
        policy: precision policy to evaluate under, or the name of one.
        plan: the plan that the state is placed by. A rank gets the metrics of the batch it is given; where parameters
            are split every rank calls it at the same time, because they are gathered.

    Examples:
        >>> from torch import nn
        >>> import purestep as ps
        >>> state = ps.init(lambda: nn.Linear(3, 1), ps.optim.sgd(0.1))
        >>> evaluate = make_eval(lambda net, batch: net(batch).square().mean())
        >>> sorted(evaluate(state, torch.ones(4, 3)))
        ['loss']
    """
    check_plan(plan, "ps.make_eval")
    _check_arity(loss_fn)
    return Eval(loss_fn, None if policy is None else policy_of(policy), plan)


@checked(StepError)
def make_predict(
    function: Callable[[Any, Any], Any], *, policy: Policy | str | None = None, plan: Plan | None = None
) -> Predict:
    """Make a pure prediction step `(state, batch) -> outputs`; `ps.predict` makes one of a function.

    Args:
        function: `function(net, batch)` returns a tensor with the samples of the batch as dim 0, or a pytree of them.
            It runs in evaluation mode without gradients.
        policy: precision policy to predict under, or the name of one.
        plan: the plan that the state is placed by, as of `make_eval`.

    Raises:
        StepError: the function does not take two arguments; when called: an output is not one a sample.

    Examples:
        >>> from torch import nn
        >>> import purestep as ps
        >>> state = ps.init(lambda: nn.Linear(3, 2), ps.optim.sgd(0.1))
        >>> make_predict(lambda net, batch: net(batch).argmax(-1))(state, torch.ones(4, 3)).shape
        torch.Size([4])
    """
    check_plan(plan, "ps.make_predict")
    _check_arity(function)
    return Predict(function, None if policy is None else policy_of(policy), plan)
