"""`make_eval` and `make_predict`: steps that read a state and change nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self, TypeVar

from torch import Tensor

from purestep import random, transforms, tree
from purestep.arguments import checked
from purestep.errors import StepError, explain
from purestep.functional import Binding
from purestep.microbatch import Context, MicrobatchExchange, Prepared
from purestep.parallel import offload
from purestep.parallel.fsdp_order import Orders
from purestep.precision import Policy
from purestep.precision import policy as policy_of
from purestep.precision.cast_params import casting
from purestep.sharding import placement
from purestep.sharding.plan import Plan, check_plan
from purestep.state import TrainState, definition
from purestep.step.loss import (
    LossFn,
    Metrics,
    called,
    check_arity,
    dispatching,
    on_plan,
    read_loss,
    samples_of,
    splitting,
)
from purestep.step_protocol import AnyStep, StepFacts, following, no_microbatches

T = TypeVar("T")


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
        if self.plan is not None and self.plan.pipelined:
            return self._staged(self.plan, state, batch, call)
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
                around = together.around(cast.module, around)
            around = dispatching(self.plan, cast.module, around)
            bound = Binding(cast.module, params, buffers, rng=rng, train=False, around=around, handlers=cast.handlers)
            return call(bound, cast.batch(batch))

    def _staged(self, plan: Plan, state: TrainState, batch: Any, call: Callable[[Binding, Any], T]) -> T:
        """Do what `_call` does with a model whose stages are on several ranks."""
        from purestep.parallel import pipeline

        cast = casting(self.policy, definition(state).module)
        rng = functools.partial(random.fold_in, state.rng, "eval")

        def prepared(view: TrainState, given: Any, index: int, exchange: MicrobatchExchange) -> Prepared:
            params, held = cast.params(view.params), cast.buffers(view.buffers)

            def outcome(tracked: Any) -> tuple[Any, None]:
                tensors, buffers, around = exchange.bound(tracked, held, cast.around)
                handlers = cast.handlers
                bound = Binding(cast.module, tensors, buffers, rng=rng, train=False, around=around, handlers=handlers)
                with cast.scope(params):
                    return call(bound, cast.batch(given)), None

            return Prepared(outcome, exchange.tracked(cast, params), cast)

        with transforms.unrecorded():
            found: T = pipeline.evaluated(plan, cast.module, state, placement.local(state), batch, prepared)
        return found


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
        samples, loss_fn = samples_of(batch), on_plan(self.plan, self.loss_fn)
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
        samples, function = samples_of(batch), on_plan(self.plan, self.loss_fn)
        outputs = self._call(state, batch, lambda bound, given: called(function, bound, given, alone=self.plan is None))
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
        >>> import torch
        >>> from torch import nn
        >>> import purestep as ps
        >>> state = ps.init(lambda: nn.Linear(3, 1), ps.optim.sgd(0.1))
        >>> evaluate = make_eval(lambda net, batch: net(batch).square().mean())
        >>> sorted(evaluate(state, torch.ones(4, 3)))
        ['loss']
    """
    check_plan(plan, "ps.make_eval")
    check_arity(loss_fn)
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
        >>> import torch
        >>> from torch import nn
        >>> import purestep as ps
        >>> state = ps.init(lambda: nn.Linear(3, 2), ps.optim.sgd(0.1))
        >>> make_predict(lambda net, batch: net(batch).argmax(-1))(state, torch.ones(4, 3)).shape
        torch.Size([4])
    """
    check_plan(plan, "ps.make_predict")
    check_arity(function)
    return Predict(function, None if policy is None else policy_of(policy), plan)
