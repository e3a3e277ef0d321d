"""`reduce_on_plateau`: a learning rate that falls when a metric stops improving, as a pure transformation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Count, Finite, NonNegative, Whole, checked
from purestep.errors import OptimError, explain
from purestep.optim.base import GradientTransformation, Scalar, StepNumber, new_count, scalar_like, transformation, wide
from purestep.optim.kernels import foreach as fx


@tree.pytree
class ReduceOnPlateauState:
    """`scale`: factor of the updates; for the other fields see the arguments of `reduce_on_plateau`."""

    scale: Tensor
    best_value: Tensor
    plateau_count: Tensor
    cooldown_count: Tensor
    count: Tensor
    average: Tensor


@transformation
class ReduceOnPlateau(GradientTransformation):
    scope = "element"
    factor: float = 0.1
    patience: int = 10
    rtol: float = 1e-4
    atol: float = 0.0
    cooldown: int = 0
    accumulation_size: int = 1
    min_scale: float = 0.0
    mode: str = "min"

    def init(self, params: Any) -> ReduceOnPlateauState:
        count = new_count(params)
        zero = torch.zeros_like(wide(count))
        return ReduceOnPlateauState(zero + 1.0, zero + math.inf, count, count.clone(), count.clone(), zero)

    def update(
        self, updates: Any, state: Any, params: Any = None, *, value: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        if value is None:
            raise OptimError(
                explain(
                    "reduce_on_plateau needs the metric it watches",
                    instead="tx.update(grads, opt_state, params, step=state.step, value=loss)",
                )
            )
        following = self.watch(state, value)
        xs, treedef = tree.flatten(updates)
        return tree.unflatten(treedef, fx.mul(xs, following.scale)), following

    def watch(self, state: ReduceOnPlateauState, value: Any) -> ReduceOnPlateauState:
        """Return the state after one more value of the metric; `update` calls it, and an evaluation may instead."""
        new = scalar_like(value, state.average).detach()
        count = state.count + 1
        average = state.average + ((new if self.mode == "min" else -new) - state.average) / count
        due = count == self.accumulation_size
        looked = self._look(state, average)
        zero = torch.zeros_like(count)
        scale, best, plateau, cooldown = (torch.where(due, a, b) for a, b in zip(looked, _seen(state), strict=True))
        left = torch.where(due, torch.zeros_like(average), average)
        return ReduceOnPlateauState(scale, best, plateau, cooldown, torch.where(due, zero, count), left)

    def _look(self, state: ReduceOnPlateauState, average: Tensor) -> tuple[Tensor, ...]:
        margin = self.rtol * state.best_value.abs() + self.atol
        better = (average < state.best_value - margin) | torch.isinf(state.best_value)
        zero = torch.zeros_like(state.plateau_count)
        cooling = state.cooldown_count > 0
        plateau = torch.where(better | cooling, zero, state.plateau_count + 1)
        reduce = ~cooling & (plateau >= self.patience) & ~better
        scale = torch.where(reduce, (state.scale * self.factor).clamp(min=self.min_scale), state.scale)
        cooldown = torch.where(cooling, state.cooldown_count - 1, torch.where(reduce, zero + self.cooldown, zero))
        best = torch.where(better, average, state.best_value)
        return scale, best, torch.where(reduce, zero, plateau), cooldown

    def hyperparams(self, state: Any, step: StepNumber | None = None) -> dict[str, Scalar]:
        return {"plateau_scale": state.scale}


@checked(OptimError)
def reduce_on_plateau(
    factor: Finite[float] = 0.1,
    patience: Whole = 10,
    rtol: NonNegative[float] = 1e-4,
    atol: NonNegative[float] = 0.0,
    cooldown: Whole = 0,
    accumulation_size: Count = 1,
    min_scale: NonNegative[float] = 0.0,
    *,
    mode: str = "min",
) -> GradientTransformation:
    """Multiply updates by a scale that falls when a metric stops improving.

    Put it last in a chain. The metric is the `value=` of `update`: the loss of a step, averaged over
    `accumulation_size` steps. To watch a validation metric instead, let an evaluation call `tx.watch(state, value)` on
    this part of the state.

    Args:
        factor: the scale is multiplied by this number, in (0, 1).
        patience: number of checks without improvement before the scale falls.
        rtol, atol: the smallest improvement, relative to the best value and absolute.
        cooldown: number of checks after a fall that are not counted.
        accumulation_size: number of values averaged for one check.
        min_scale: the smallest scale.
        mode: "min" for a loss, "max" for a score.

    Returns:
        A transformation with the state `ReduceOnPlateauState(scale, best_value, plateau_count, cooldown_count, count,
        average)`.

    Raises:
        OptimError: an argument is out of range, or `update` gets no `value=`.

    Examples:
        >>> tx = reduce_on_plateau(0.5, patience=1)
        >>> grads = {"w": torch.ones(1)}
        >>> updates, state = tx.update(grads, tx.init(grads), value=1.0)
        >>> tx.update(grads, state, value=1.0)[0]
        {'w': tensor([0.5000])}

    Reference: `optax.contrib.reduce_on_plateau`, `torch.optim.lr_scheduler.ReduceLROnPlateau`.
    """
    fine = 0.0 < factor < 1.0 and 0.0 <= rtol <= 1.0 and atol >= 0.0 and patience >= 1
    if not fine or accumulation_size < 1 or cooldown < 0 or mode not in ("min", "max"):
        where = f"{factor=}, {patience=}, {rtol=}, {atol=}, {cooldown=}, {accumulation_size=}, {mode=}"
        instead = 'reduce_on_plateau(0.1, patience=10, mode="min")'
        raise OptimError(explain("an argument of reduce_on_plateau is out of range", where=where, instead=instead))
    return ReduceOnPlateau(factor, patience, rtol, atol, cooldown, accumulation_size, min_scale, mode)


def _seen(state: ReduceOnPlateauState) -> tuple[Tensor, ...]:
    return state.scale, state.best_value, state.plateau_count, state.cooldown_count
