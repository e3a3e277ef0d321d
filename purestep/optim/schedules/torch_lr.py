"""Any `torch.optim.lr_scheduler` as a schedule: it runs once on a dummy optimizer, and its values are tabulated."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from purestep import _torch, transforms
from purestep.arguments import Count, NonNegative, checked
from purestep.errors import OptimError, explain
from purestep.optim.schedules.base import ScheduleBase, schedule


@schedule
class TableSchedule(ScheduleBase):
    """A value for each step; the last one stays.

    Examples:
        >>> [TableSchedule((1.0, 0.5))(step) for step in (0, 1, 9)]
        [1.0, 0.5, 0.5]
    """

    values: tuple[float, ...]
    source: str = ""

    def horizon(self) -> int:
        """Return how many values there are."""
        return max(1, len(self.values))

    def at(self, t: Tensor) -> Tensor:
        index = t.to(torch.int64).clamp(0, len(self.values) - 1)
        traced = _torch.dispatch_modes() > 0 or transforms.active()
        # In a trace the table must be a constant of the graph, not a captured tensor.
        make = _table.__wrapped__ if traced else _table
        return make(self.values, t.dtype, t.device).index_select(0, index.reshape(-1)).reshape(t.shape)

    def __repr__(self) -> str:
        return self.source or f"TableSchedule({len(self.values)} values)"


_MOST_STEPS = 2**24


@functools.lru_cache(maxsize=32)
def _table(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@checked(OptimError)
def lift_scheduler(
    scheduler: Callable[..., Any], base_lr: NonNegative[float], *, total_steps: Count, **arguments: Any
) -> TableSchedule:
    """Make any torch scheduler class a schedule.

    Args:
        scheduler: the class, `torch.optim.lr_scheduler.StepLR` or a third party's; or a function of an optimizer that
            returns a scheduler, for `SequentialLR` and `ChainedScheduler`.
        base_lr: the learning rate that the scheduler starts from; `CyclicLR` gets it as its argument, too.
        total_steps: number of steps to tabulate, at least 1; later steps have the last value. Passed to `OneCycleLR`.
        **arguments: the other arguments of the class.

    Raises:
        OptimError: the scheduler needs a metric, or cannot be run.

    Examples:
        >>> lr = lift_scheduler(torch.optim.lr_scheduler.StepLR, 1.0, total_steps=9, step_size=3, gamma=0.5)
        >>> [lr(step) for step in (0, 3, 6)]
        [1.0, 0.5, 0.25]

    Reference: `torch.optim.lr_scheduler`. The commonest have names of their own here, without a table:
    `optim.StepLR(1.0, 3)`.
    """
    name = getattr(scheduler, "__name__", repr(scheduler))
    if isinstance(scheduler, type) and issubclass(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        why = "its value depends on the metrics of the run, not on the step alone"
        raise OptimError(
            explain(f"{name} is not a schedule", why=why, instead="optim.reduce_on_plateau(0.1, patience=10)")
        )
    if isinstance(total_steps, int) and total_steps > _MOST_STEPS:
        where = f"total_steps={total_steps!r}"
        why = "each step is run once, and is a number in a table"
        raise OptimError(explain(f"lift_scheduler tabulates {_MOST_STEPS} steps at most", where=where, why=why))
    shown = "".join(f", {k}={v!r}" for k, v in arguments.items())
    # The arguments base_lr of CyclicLR and total_steps of OneCycleLR mean the same as those of this function.
    own: dict[str, Any] = {
        k: v for k, v in {"base_lr": base_lr, "total_steps": total_steps}.items() if _takes(scheduler, k)
    }
    optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=base_lr)
    values = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            running: Any = scheduler(optimizer, **{**own, **arguments})  # type: ignore[call-arg]
            for _ in range(total_steps):
                values.append(float(optimizer.param_groups[0]["lr"]))
                optimizer.step()
                running.step()
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        # A scheduler of a fixed length (OneCycleLR) ends with an error; its last value stays, as for all of them.
        if not values or "total steps" not in str(error):
            raise OptimError(
                explain(f"the scheduler {name} cannot be run", where=f"{arguments}", why=str(error))
            ) from error
    return TableSchedule(tuple(values), f"lift_scheduler({name}, {base_lr!r}, total_steps={total_steps}{shown})")


def _takes(scheduler: Callable[..., Any], parameter: str) -> bool:
    try:
        return parameter in inspect.signature(scheduler).parameters
    except (TypeError, ValueError):
        return False
