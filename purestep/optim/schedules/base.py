"""The base of schedules: frozen values that map the number of applied updates to a number.

Subclasses define one formula, in float64 tensors; `Schedule.__call__` handles ints, tensors and dtypes. A schedule
depends on the step only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, dataclass_transform, overload

import torch
from torch import Tensor

from purestep.errors import OptimError, explain
from purestep.optim.base import _arguments, _snake, as_scalar, wide
from purestep.views import Block, Curves, Line, Note, Panel, View

T = TypeVar("T")


class ScheduleBase(View):
    """A schedule: call it with the step.

    An int gives a float. A tensor of any shape gives a float32 tensor of that shape, on its device; the formula is
    evaluated in float64, so that large steps and small differences are not rounded away.
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

    def horizon(self) -> int:
        """Return the number of steps to draw: up to the end of the last transition."""
        return max(_whole_numbers([getattr(self, field.name) for field in dataclasses.fields(self)]), default=100)  # type: ignore[arg-type]

    def view(self) -> list[Block]:
        """Return the blocks of the display: the arguments, and the values up to a little more than the horizon."""
        panel = self.panel("value")
        return [Note(repr(self)), *([Curves((panel,))] if panel is not None else [])]

    def panel(self, title: str) -> Panel | None:
        """Return the curve of the schedule; None if it cannot be called with a step alone."""
        last = max(2, self.horizon() + self.horizon() // 10)
        steps = sorted({round(i * last / _DRAWN) for i in range(_DRAWN + 1)})
        try:
            points = [(step, float(self(step))) for step in steps]
        except Exception:  # a user's function may raise anything; then only the arguments are shown
            return None
        return Panel(title, (Line(title, points),), limits=(0, last))

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name if name.endswith(('LR', 'Restarts')) else _snake(name)}({_arguments(self)})"


_DRAWN = 240  # points of a curve


def _whole_numbers(value: Any) -> Iterator[int]:
    """Return the positive integers in the arguments of a schedule, which are numbers of steps."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _whole_numbers(item)


@dataclass_transform(frozen_default=True)
def schedule(cls: type[T]) -> type[T]:
    """Make a subclass of `ScheduleBase` a frozen dataclass that keeps the short `repr`."""
    return dataclasses.dataclass(frozen=True, repr=False)(cls)


def evaluate(part: Callable[[Any], Any], t: Tensor) -> Tensor:
    """Return a schedule's value at float64 steps; a schedule may be any function of an int64 step tensor."""
    if isinstance(part, ScheduleBase):
        return part.at(t)
    return torch.as_tensor(as_scalar(part(t.to(torch.int64)), "schedule", part), device=t.device).to(t.dtype)


def need(condition: bool, what: str, where: str, instead: str) -> None:
    """Raise an OptimError about a schedule's arguments unless a condition holds."""
    if not condition:
        raise OptimError(explain(what, where=where, instead=instead))
