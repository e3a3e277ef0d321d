"""The simplest rules: multiply updates by a number, by a learning rate, by a schedule; the last step of most
optimizers.

`scale_by_learning_rate` changes the sign of an update, from the direction of the gradient to descent.
"""

from __future__ import annotations

from typing import Any

import torch

from purestep import tree
from purestep.arguments import Finite, NonNegative, checked
from purestep.errors import OptimError, explain
from purestep.optim.base import GradientTransformation, Scalar, ScalarOrSchedule, StepNumber, transformation, value_at
from purestep.optim.kernels import foreach as fx


@transformation
class Scale(GradientTransformation):
    scope = "element"
    step_size: Scalar

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        xs, treedef = tree.flatten(updates)
        return tree.unflatten(treedef, fx.mul(xs, self.step_size)), state


@checked(OptimError)
def scale(step_size: Finite[Scalar]) -> GradientTransformation:
    """Multiply updates by a number.

    Examples:
        >>> scale(-0.5).update({"w": torch.ones(2)}, None)[0]
        {'w': tensor([-0.5000, -0.5000])}

    Reference: `optax.scale`.
    """
    return Scale(step_size)


@transformation
class ScaleBySchedule(GradientTransformation):
    scope = "element"
    schedule: ScalarOrSchedule

    def update(
        self, updates: Any, state: Any, params: Any = None, *, step: StepNumber | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        xs, treedef = tree.flatten(updates)
        return tree.unflatten(treedef, fx.mul(xs, value_at(self.schedule, step, "schedule"))), state


@checked(OptimError)
def scale_by_schedule(schedule: Finite[ScalarOrSchedule]) -> GradientTransformation:
    """Multiply updates by a schedule of the number of applied updates. The sign is the schedule's.

    Examples:
        >>> from purestep.optim import linear_schedule
        >>> tx = scale_by_schedule(linear_schedule(0.0, 1.0, transition_steps=4))
        >>> tx.update({"w": torch.ones(2)}, None, step=torch.tensor(1))[0]
        {'w': tensor([0.2500, 0.2500])}

    Reference: `optax.scale_by_schedule`.
    """
    return ScaleBySchedule(schedule)


@transformation
class ScaleByLearningRate(GradientTransformation):
    scope = "element"
    learning_rate: ScalarOrSchedule

    def update(
        self, updates: Any, state: Any, params: Any = None, *, step: StepNumber | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        xs, treedef = tree.flatten(updates)
        return tree.unflatten(treedef, fx.mul(xs, -value_at(self.learning_rate, step))), state

    def hyperparams(self, state: Any, step: StepNumber | None = None) -> dict[str, Scalar]:
        return {"learning_rate": value_at(self.learning_rate, step)}


@checked(OptimError)
def scale_by_learning_rate(learning_rate: NonNegative[ScalarOrSchedule]) -> GradientTransformation:
    r"""Turn a direction into a descent: $u \leftarrow -\eta u$.

    Args:
        learning_rate: a number, a 0-d tensor, or a schedule of the number of applied updates.

    Examples:
        >>> scale_by_learning_rate(0.1).update({"w": torch.ones(2)}, None)[0]
        {'w': tensor([-0.1000, -0.1000])}

    Reference: `optax.scale_by_learning_rate`.
    """
    return ScaleByLearningRate(checked_rate(learning_rate))


def checked_rate(value: ScalarOrSchedule, name: str = "learning_rate") -> ScalarOrSchedule:
    """Return a learning rate, or refuse one that is neither number, 0-d tensor nor schedule, or is negative."""
    if isinstance(value, torch.Tensor):
        if value.dim() != 0:
            raise OptimError(explain(f"{name} must be a scalar", where=f"{name}: {tree.describe(value)}"))
        return value
    if callable(value):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
        return value
    raise OptimError(
        explain(
            f"{name} is not a learning rate",
            where=f"{name}={value!r}",
            why="it is a number >= 0, a 0-d tensor, or a schedule: a function of the number of applied updates",
            instead="adam(1e-3)   or   adam(linear_schedule(0.0, 1e-3, transition_steps=100))",
        )
    )
