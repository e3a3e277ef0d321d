"""Hyperparameters in the state: readable, changeable, saved with it, mapped over by `vmap`, differentiated through."""

from __future__ import annotations

import dataclasses
import inspect as python_inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import checked
from purestep.errors import OptimError, explain
from purestep.optim.base import (
    ElementWrapper,
    GradientTransformation,
    Scalar,
    StepNumber,
    new_count,
    scalar_like,
    transformation,
    value_at,
    wide,
)
from purestep.views import Tree


@tree.pytree
class InjectHyperparamsState:
    """`hyperparams`: values that `optim.set` may change; `scheduled`: the latest values of schedules; `inner`: the
    state of the transformation.
    """

    hyperparams: dict[str, Tensor]
    scheduled: dict[str, Tensor]
    inner: Any


@transformation
class InjectHyperparams(ElementWrapper):
    factory: Callable[..., GradientTransformation]
    fixed: tuple[tuple[str, Any], ...]
    numbers: tuple[tuple[str, Any], ...]
    schedules: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return str(getattr(self.factory, "__name__", "inject_hyperparams"))

    @property
    def inner(self) -> GradientTransformation:  # type: ignore[override]
        """The transformation with the initial hyperparameters, for its properties."""
        return self._made(dict(self.numbers) | {name: 0.0 for name, _ in self.schedules})

    def _made(self, values: dict[str, Any]) -> GradientTransformation:
        return self.factory(**dict(self.fixed), **values)

    def init(self, params: Any) -> InjectHyperparamsState:
        like = wide(new_count(params))
        values = {name: scalar_like(value, like).clone() for name, value in self.numbers}
        scheduled = {name: torch.zeros_like(like) for name, _ in self.schedules}
        return InjectHyperparamsState(values, scheduled, self._made(values | scheduled).init(params))

    def update(
        self, updates: Any, state: Any, params: Any = None, *, step: StepNumber | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        tx, scheduled = self._now(state, step)
        proposed, inner = tx.update(updates, state.inner, params, step=step, **extra)
        return proposed, InjectHyperparamsState(dict(state.hyperparams), scheduled, inner)

    def advance(
        self,
        updates: Any,
        state: Any,
        params: Any,
        *,
        reuse: bool = False,
        step: StepNumber | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        tx, scheduled = self._now(state, step)
        params, inner = tx.advance(updates, state.inner, params, reuse=reuse, step=step, **extra)
        return params, InjectHyperparamsState(dict(state.hyperparams), scheduled, inner)

    def _now(self, state: Any, step: StepNumber | None) -> tuple[GradientTransformation, dict[str, Tensor]]:
        """Return the transformation at a step, and the values of its schedules."""
        scheduled = {
            name: scalar_like(value_at(schedule, step, name), state.scheduled[name])
            for name, schedule in self.schedules
        }
        return self._made(state.hyperparams | scheduled), scheduled

    def hyperparams(self, state: Any, step: StepNumber | None = None) -> dict[str, Scalar]:
        now = {name: value_at(s, step, name) for name, s in self.schedules} if step is not None else state.scheduled
        return {**state.hyperparams, **now}

    def outline(self, label: str = "") -> Tree:
        """Return a leaf, because the inner transformation is made anew at each step."""
        numbers = ", ".join(f"{n}={v!r}" for n, v in (*self.fixed, *self.numbers, *self.schedules))
        return Tree(f"{label}: {self.name}" if label not in ("", self.name) else self.name, f"{numbers}; in the state")

    def _one_pass(self) -> bool:
        return self.inner._one_pass()

    def only_fused(self) -> bool:
        return self.inner.only_fused()

    def __repr__(self) -> str:
        shown = ", ".join(f"{n}={v!r}" for n, v in (*self.fixed, *self.numbers, *self.schedules))
        return f"inject_hyperparams({self.name})({shown})"


@dataclasses.dataclass(frozen=True)
class _Injector:
    factory: Callable[..., GradientTransformation]
    static_args: tuple[str, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> GradientTransformation:
        given = python_inspect.signature(self.factory).bind(*args, **kwargs).arguments
        fixed, numbers, schedules = [], [], []
        for name, value in given.items():
            if name in self.static_args:
                fixed.append((name, value))
            elif (isinstance(value, Tensor) and value.dim() == 0) or isinstance(value, float) or _is_rate(name, value):
                numbers.append((name, value))
            elif _is_schedule(name, value):
                schedules.append((name, value))
            else:
                fixed.append((name, tuple(value) if isinstance(value, list) else value))
        if not numbers and not schedules:
            raise OptimError(
                explain(
                    "there is no hyperparameter to keep in the state",
                    where=f"arguments: {dict(given)}",
                    why="floats, 0-d tensors and schedules that are passed by name are kept; defaults are not",
                    instead="optim.inject_hyperparams(optim.adamw)(learning_rate=1e-3, weight_decay=0.1)",
                )
            )
        tx = InjectHyperparams(self.factory, tuple(fixed), tuple(numbers), tuple(schedules))
        made = tx.inner
        if not isinstance(made, GradientTransformation):
            raise OptimError(
                explain("the factory did not make a transformation", where=f"{self.factory!r} made {made!r}")
            )
        return tx


@checked(OptimError)
def inject_hyperparams(
    factory: Callable[..., GradientTransformation], static_args: tuple[str, ...] | list[str] = ()
) -> Callable[..., GradientTransformation]:
    """Make an optimizer whose hyperparameters are tensors in its state.

    Floats, 0-d tensors and schedules that the call passes are kept in the state; defaults stay part of the
    transformation, which is cheaper. `optim.get` and `optim.set` read and change the kept values. A change never
    retraces a compiled step, `vmap` can sweep the values, gradients flow to them, and a snapshot holds them.

    Args:
        factory: a function of this module, such as `adamw`, or your own function that returns a transformation.
        static_args: names of arguments that stay part of the transformation.

    Returns:
        A function with the arguments of the factory.

    Examples:
        >>> from purestep import optim
        >>> tx = inject_hyperparams(optim.adamw)(learning_rate=0.5)
        >>> tx
        inject_hyperparams(adamw)(learning_rate=0.5)
        >>> state = tx.init({"w": torch.zeros(2)})
        >>> tx.hyperparams(optim.set(state, learning_rate=0.25))
        {'learning_rate': tensor(0.2500, dtype=torch.float64)}

    Reference: `optax.inject_hyperparams`.
    """
    return _Injector(factory, tuple(static_args))


def _is_rate(name: str, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and name in ("learning_rate", "weight_decay")


def _is_schedule(name: str, value: Any) -> bool:
    return callable(value) and not isinstance(value, (type, GradientTransformation)) and "mask" not in name
