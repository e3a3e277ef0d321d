"""What a schedule is: a frozen value that maps the number of applied updates to a number.

Subclasses give one formula, in float64 tensors; `Schedule.__call__` takes care of ints, tensors and dtypes. A schedule
reads nothing but the step it is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform, overload

import torch
from torch import Tensor

from purestep.errors import OptimError, explain
from purestep.optim.base import _arguments, _snake, as_scalar, wide

T = TypeVar("T")


class ScheduleBase:
    """A schedule: call it with the step.

    An int gives a float. A tensor of any shape gives a float32 tensor of that shape, on its device; the formula is
    evaluated in float64, so that large steps and small differences keep their meaning.
    """

    def at(self, t: Tensor) -> Tensor:
        """Return the value at a float64 tensor of steps."""
        raise OptimError(explain(f"{type(self).__name__} has no formula", instead="override `at(self, t)`"))

    @overload
    def __call__(self, step: Tensor) -> Tensor: ...
    @overload
    def __call__(self, step: int) -> float: ...
    def __call__(self, step: Any) -> Any:
        if isinstance(step, Tensor):
            return torch.as_tensor(self.at(wide(step))).to(torch.float32).expand(step.shape)
        return float(self.at(torch.tensor(float(step), dtype=torch.float64)))

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name if name.endswith(('LR', 'Restarts')) else _snake(name)}({_arguments(self)})"


@dataclass_transform(frozen_default=True)
def schedule(cls: type[T]) -> type[T]:
    """Make a subclass of `ScheduleBase` a frozen dataclass that keeps the short `repr`."""
    return dataclasses.dataclass(frozen=True, repr=False)(cls)


def evaluate(part: Callable[[Any], Any], t: Tensor) -> Tensor:
    """Return a schedule's value at float64 steps; any function of an int64 step tensor may stand in for a schedule."""
    if isinstance(part, ScheduleBase):
        return part.at(t)
    return torch.as_tensor(as_scalar(part(t.to(torch.int64)), "schedule", part), device=t.device).to(t.dtype)


def need(condition: bool, what: str, where: str, instead: str) -> None:
    """Raise an OptimError about a schedule's arguments unless they are fine."""
    if not condition:
        raise OptimError(explain(what, where=where, instead=instead))
