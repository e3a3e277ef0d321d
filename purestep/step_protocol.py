"""`AnyStep`: what the loop, `jit` and the checks before the first batch may ask of a step.

The steps of `make_step` and `make_eval`, a compiled step, a donating one and one of `wrap_step` inherit from it. Any
other callable is an opaque pure function: it is run as it is, and nothing else is known of it. Attributes are no
answer, because `functools.wraps` copies those of a step to a function that does something else.
"""

from __future__ import annotations

import abc
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from torch import Tensor

from purestep import _torch, transforms, tree
from purestep.arguments import checked
from purestep.data.to_device import on_device
from purestep.errors import ConfigError, explain
from purestep.microbatch import Gradients
from purestep.optim.base import GradientTransformation
from purestep.precision import Policy
from purestep.sharding.plan import Plan
from purestep.state import TrainState

StepFn = Callable[[Any, Any], Any]
Around = Callable[[StepFn, Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Seat:
    """The place of a state among those over which a step is mapped.

    Attributes:
        number: from 0 on.
        members: how many states there are.
    """

    number: int
    members: int


@dataclasses.dataclass(frozen=True)
class StepFacts:
    """What is known of a step besides that it can be called; the defaults are what is known of an opaque function.

    Attributes:
        loss_fn: the loss function that it was made of.
        tx: the gradient transformation that it applies.
        microbatches: how many of them a global batch is sliced into; "auto" until the first batch settles it, None for
            steps without any.
        policy: precision policy.
        plan: the plan of the ranks that call it together.
        donate: whether it consumes the state that it is called with.
        backend: what compiled it, None where nothing did.
        by_unit: whether the units of the model were compiled each by itself.
        seat: where it is computed together with the steps of other runs, its place among them.
        warmup: steps of a state that it runs uncompiled, before the first compiled one; "eager": a run decides.
        ready: of a step whose run is to decide: returns the counter of the state from which on it may run compiled,
            None while it is still being compiled.
        evaluates: whether it returns metrics only, as a step of `make_eval` does.
        gradients: `gradients(state, batch)` returns those of a batch without an update; collective under a plan.
    """

    loss_fn: Callable[..., Any] | None = None
    tx: GradientTransformation | None = None
    microbatches: int | Literal["auto"] | None = None
    policy: Policy | None = None
    plan: Plan | None = None
    donate: bool = False
    backend: str | None = None
    by_unit: bool = False
    seat: Seat | None = None
    warmup: int | Literal["eager"] = 0
    ready: Callable[[], int | None] | None = None
    evaluates: bool = False
    gradients: Callable[[TrainState, Any], Gradients] | None = None


class AnyStep(abc.ABC):
    """A step of which more is known than that it can be called."""

    @abc.abstractmethod
    def __call__(self, state: Any, batch: Any) -> Any:
        """Return the state after the step and its metrics, or the metrics alone where it evaluates."""

    @property
    @abc.abstractmethod
    def facts(self) -> StepFacts:
        """What is known of it."""

    @abc.abstractmethod
    def bare(self, microbatches: int | None = None) -> StepFn:
        """Return the step as one process alone would run it: not compiled, without donation and without a plan.

        Args:
            microbatches: into how many to slice a batch; None for as many as it does now.
        """

    @abc.abstractmethod
    def with_microbatches(self, count: int) -> AnyStep:
        """Return the step with a number of microbatches, compiled or donating as it is.

        Raises:
            ConfigError: it has no microbatches.
        """

    def with_warmup(self, warmup: int | None) -> AnyStep:
        """Return a step of `warmup="eager"` as a run calls it; any other as it is.

        Args:
            warmup: counter of the state from which on it runs compiled; None while the run has not decided. Then it
                runs uncompiled, other processes compile from its first call on, and `facts.ready` is there.
        """
        return self

    @abc.abstractmethod
    def under(self, plan: Plan) -> StepFn:
        """Return an evaluation step told of a plan, unless it has one or was compiled without; any other as it is."""


def facts_of(step: object) -> StepFacts:
    """Return what is known of any step; of an opaque function nothing.

    Examples:
        >>> facts_of(lambda state, batch: (state, {})).plan is None
        True
    """
    return step.facts if isinstance(step, AnyStep) else _OPAQUE


_OPAQUE = StepFacts()


def following(state: object, batch: Any) -> Any:
    """Return a batch on the device of a train state; where that is the CPU, and inside of a trace, the very batch."""
    if not isinstance(state, TrainState) or (device := state.step.device).type in _HOSTS:
        return batch
    if transforms.active() or _torch.dispatch_modes() > 0 or not any(map(_on_host, tree.leaves(batch))):
        return batch
    return on_device(batch, device)


_HOSTS = ("cpu", "meta")


def _on_host(leaf: object) -> bool:
    return leaf.device.type == "cpu" if isinstance(leaf, Tensor) else isinstance(leaf, np.ndarray)


def bare(step: StepFn, microbatches: int | None = None) -> StepFn:
    """Return any step as one process alone would run it, see `AnyStep.bare`; an opaque function is itself."""
    return step.bare(microbatches) if isinstance(step, AnyStep) else step


def resliced(step: StepFn, count: int) -> AnyStep:
    """Return any step with a number of microbatches, see `AnyStep.with_microbatches`; an opaque function has none."""
    if isinstance(step, AnyStep):
        return step.with_microbatches(count)
    raise no_microbatches(step)


def warmed_up(step: StepFn, warmup: int | None) -> StepFn:
    """Return any step as a run calls it, see `AnyStep.with_warmup`."""
    return step.with_warmup(warmup) if isinstance(step, AnyStep) else step


def no_microbatches(step: object) -> ConfigError:
    """Return the error for a step whose number of microbatches cannot be chosen from outside."""
    return ConfigError(
        explain(
            "this step has no number of microbatches that could be chosen",
            where=name_of(step),
            why="only a step of ps.make_step has one; a function around it is opaque, whatever functools.wraps says",
            instead="ps.wrap_step(step, function)   # function(step, state, batch), and the step stays known\n"
            "or ps.make_step(loss_fn, tx, microbatches=8) inside of the function",
        )
    )


def name_of(step: object) -> str:
    """Return what messages call a step."""
    return str(getattr(step, "__name__", type(step).__name__))


def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature under which a callable itself can be called, None where Python does not know it.

    What a decorator notes in `__wrapped__` is another function, which may take other arguments.
    """
    try:
        return inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        return None


@dataclasses.dataclass(frozen=True)
class WrappedStep(AnyStep):
    """A step with a function around it. Made by `wrap_step`.

    Attributes:
        step: the step that the function calls.
        function: called as `function(step, state, batch)`.
    """

    step: StepFn
    function: Around

    def __call__(self, state: Any, batch: Any) -> Any:
        return self.function(self.step, state, batch)

    @property
    def __name__(self) -> str:
        return name_of(self.function)

    @property
    def facts(self) -> StepFacts:
        """Those of the step. Its gradients are not: the function may call it with another batch."""
        return dataclasses.replace(facts_of(self.step), gradients=None)

    def bare(self, microbatches: int | None = None) -> StepFn:
        return WrappedStep(bare(self.step, microbatches), self.function)

    def with_microbatches(self, count: int) -> AnyStep:
        return WrappedStep(resliced(self.step, count), self.function)

    def with_warmup(self, warmup: int | None) -> AnyStep:
        return WrappedStep(warmed_up(self.step, warmup), self.function)

    def under(self, plan: Plan) -> StepFn:
        return WrappedStep(self.step.under(plan), self.function) if isinstance(self.step, AnyStep) else self

    def identity(self) -> dict[str, Any]:
        """Return what a snapshot of a run records of it."""
        return {"step": self.step, "function": self.function}

    def __repr__(self) -> str:
        return f"wrap_step({self.step!r}, {name_of(self.function)})"


@checked(ConfigError)
def wrap_step(step: Callable[..., Any], function: Callable[..., Any]) -> WrappedStep:
    """Put a function around a step, so that `fit` still knows of its plan, microbatches, donation and compilation.

    A function that merely calls a step is a step as well, and `fit` runs it as it is; but it cannot see what is inside:
    the plan that several ranks need, `microbatches="auto"`, or the memory that donation saves.

    Args:
        step: a step of `make_step` or `make_eval`, compiled or not, donating or not.
        function: `function(step, state, batch)` returns what the step returns. It is pure, and calls the step that it
            is handed, which may be another than `step`: without its plan in a dry run, say.

    Returns:
        A step `(state, batch) -> (state, metrics)`.

    Raises:
        ConfigError: the function does not take three arguments.

    Examples:
        >>> import torch
        >>> import purestep as ps
        >>> tx = ps.optim.sgd(0.1)
        >>> step = ps.make_step(lambda net, batch: net(batch).square().mean(), tx)
        >>> def flat(step, state, batch):
        ...     return step(state, batch.flatten(1))
        >>> state = ps.init(lambda: torch.nn.Linear(4, 1), tx)
        >>> new, metrics = wrap_step(step, flat)(state, torch.ones(3, 2, 2))
        >>> int(new.step), sorted(metrics)
        (1, ['loss'])
    """
    signature = signature_of(function)
    if signature is not None:
        try:
            signature.bind(step, None, None)
        except TypeError as error:
            raise ConfigError(
                explain(
                    "a function around a step takes the step, a state and a batch",
                    where=f"{name_of(function)}{signature}",
                    instead="def flat(step, state, batch):\n    return step(state, batch.flatten(1))",
                )
            ) from error
    return WrappedStep(step, function)
