"""Schedules under the names of `torch.optim.lr_scheduler`: the same arguments, the base learning rate first.

They are functions of the step, like all schedules of purestep, without a state to step or to save.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from purestep.arguments import Count, Finite, Fraction, NonNegative, Positive, Whole, checked
from purestep.errors import OptimError
from purestep.optim.base import as_scalar
from purestep.optim.schedules.base import ScheduleBase, need, schedule


@checked(OptimError)
@schedule
class LambdaLR(ScheduleBase):
    """`base_lr` times a function of the step tensor.

    Examples:
        >>> LambdaLR(0.5, lambda step: 1 / (1 + step))(1)
        0.25
    """

    base_lr: NonNegative[float]
    lr_lambda: Finite[Callable[[Any], Any]]

    def at(self, t: Tensor) -> Tensor:
        return self.base_lr * torch.as_tensor(as_scalar(self.lr_lambda(t), "lr_lambda", self.lr_lambda))


@checked(OptimError)
@schedule
class StepLR(ScheduleBase):
    """Multiply by `gamma` every `step_size` steps.

    Examples:
        >>> [StepLR(1.0, step_size=30, gamma=0.5)(step) for step in (29, 30, 60)]
        [1.0, 0.5, 0.25]
    """

    base_lr: NonNegative[float]
    step_size: Count
    gamma: Finite[float] = 0.1

    def horizon(self) -> int:
        """Return the end of the fourth stair; none is the last."""
        return 4 * self.step_size

    def at(self, t: Tensor) -> Tensor:
        return self.base_lr * torch.pow(self.gamma, torch.floor(t / self.step_size))


@checked(OptimError)
@schedule
class MultiStepLR(ScheduleBase):
    """Multiply by `gamma` at each milestone.

    Examples:
        >>> [MultiStepLR(1.0, milestones=(30, 80), gamma=0.5)(step) for step in (29, 30, 80)]
        [1.0, 0.5, 0.25]
    """

    base_lr: NonNegative[float]
    milestones: tuple[int, ...]
    gamma: Finite[float] = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(sorted(self.milestones)))

    def at(self, t: Tensor) -> Tensor:
        passed = sum(((t >= m).to(t.dtype) for m in self.milestones), torch.zeros_like(t))
        return self.base_lr * torch.pow(self.gamma, passed)


@checked(OptimError)
@schedule
class ConstantLR(ScheduleBase):
    """`factor` times the base until `total_iters`, then the base.

    Examples:
        >>> [ConstantLR(1.0, factor=0.5, total_iters=4)(step) for step in (3, 4)]
        [0.5, 1.0]
    """

    base_lr: NonNegative[float]
    factor: Finite[float] = 1.0 / 3
    total_iters: Whole = 5

    def at(self, t: Tensor) -> Tensor:
        return self.base_lr * torch.where(t < self.total_iters, self.factor, 1.0).to(t.dtype)


@checked(OptimError)
@schedule
class LinearLR(ScheduleBase):
    """From `start_factor` to `end_factor` times the base, along a line of `total_iters` steps.

    Examples:
        >>> [LinearLR(1.0, start_factor=0.5, total_iters=4)(step) for step in (0, 2, 4)]
        [0.5, 0.75, 1.0]
    """

    base_lr: NonNegative[float]
    start_factor: Finite[float] = 1.0 / 3
    end_factor: Finite[float] = 1.0
    total_iters: Whole = 5

    def at(self, t: Tensor) -> Tensor:
        done = t.clamp(max=self.total_iters) / self.total_iters
        return self.base_lr * (self.start_factor + (self.end_factor - self.start_factor) * done)


@checked(OptimError)
@schedule
class ExponentialLR(ScheduleBase):
    """Multiply by `gamma` every step.

    Examples:
        >>> ExponentialLR(1.0, gamma=0.5)(2)
        0.25
    """

    base_lr: NonNegative[float]
    gamma: Finite[float]

    def horizon(self) -> int:
        """Return when a hundredth is left, where it falls."""
        return min(10**7, math.ceil(math.log(0.01) / math.log(self.gamma))) if 0 < self.gamma < 1 else 100

    def at(self, t: Tensor) -> Tensor:
        return self.base_lr * torch.pow(self.gamma, t)


@checked(OptimError)
@schedule
class PolynomialLR(ScheduleBase):
    """Down to 0 along a power of the remaining fraction of `total_iters`.

    Examples:
        >>> PolynomialLR(1.0, total_iters=4, power=2.0)(2)
        0.25
    """

    base_lr: NonNegative[float]
    total_iters: Whole = 5
    power: NonNegative[float] = 1.0

    def at(self, t: Tensor) -> Tensor:
        return self.base_lr * (1.0 - t.clamp(max=self.total_iters) / self.total_iters) ** self.power


@checked(OptimError)
@schedule
class CosineAnnealingLR(ScheduleBase):
    """Half a cosine of `T_max` steps down to `eta_min`, and up again after it.

    Examples:
        >>> [round(CosineAnnealingLR(1.0, T_max=10)(step), 6) for step in (0, 5, 10)]
        [1.0, 0.5, 0.0]
    """

    base_lr: NonNegative[float]
    T_max: Count
    eta_min: Finite[float] = 0.0

    def at(self, t: Tensor) -> Tensor:
        return self.eta_min + (self.base_lr - self.eta_min) * 0.5 * (1.0 + torch.cos(math.pi * t / self.T_max))


@checked(OptimError)
@schedule
class CosineAnnealingWarmRestarts(ScheduleBase):
    """Half a cosine down to `eta_min`, again and again; each cycle `T_mult` times as long as the one before.

    Examples:
        >>> lr = CosineAnnealingWarmRestarts(1.0, T_0=2, T_mult=2)
        >>> [round(lr(step), 6) for step in range(7)]
        [1.0, 0.5, 1.0, 0.853553, 0.5, 0.146447, 1.0]
    """

    base_lr: NonNegative[float]
    T_0: Count
    T_mult: Count = 1
    eta_min: Finite[float] = 0.0

    def __post_init__(self) -> None:
        where = f"T_0={self.T_0}, T_mult={self.T_mult}"
        need(self.T_0 >= 1 and self.T_mult >= 1, "cycles need a length of at least 1", where, "T_0=10, T_mult=2")

    def horizon(self) -> int:
        """Return the end of the third cycle; none is the last."""
        return self.T_0 * (1 + self.T_mult + self.T_mult**2)

    def at(self, t: Tensor) -> Tensor:
        if self.T_mult == 1:
            current, length = torch.remainder(t, self.T_0), torch.full_like(t, float(self.T_0))
        else:
            guess = torch.floor(torch.log(t / self.T_0 * (self.T_mult - 1) + 1) / math.log(self.T_mult))
            # The logarithm may be rounded to the wrong cycle, so the exact starts of the cycles decide.
            cycle = guess + (t >= self._start(guess + 1)).to(t.dtype) - (t < self._start(guess)).to(t.dtype)
            current, length = t - self._start(cycle), self.T_0 * torch.pow(float(self.T_mult), cycle)
        return self.eta_min + (self.base_lr - self.eta_min) * 0.5 * (1.0 + torch.cos(math.pi * current / length))

    def _start(self, cycle: Tensor) -> Tensor:
        return self.T_0 * (torch.round(torch.pow(float(self.T_mult), cycle)) - 1) / (self.T_mult - 1)


@checked(OptimError)
@schedule
class OneCycleLR(ScheduleBase):
    """One cycle: up to `max_lr`, and down to nearly nothing; after `total_steps` the last value stays.

    Examples:
        >>> OneCycleLR(1.0, total_steps=10)(2)
        1.0
    """

    max_lr: NonNegative[float]
    total_steps: Count
    pct_start: Fraction[float] = 0.3
    anneal_strategy: str = "cos"
    div_factor: Positive[float] = 25.0
    final_div_factor: Positive[float] = 1e4
    three_phase: bool = False

    def __post_init__(self) -> None:
        known = self.anneal_strategy in ("cos", "linear")
        need(known, "there is no such annealing", f"anneal_strategy={self.anneal_strategy!r}", '"cos" or "linear"')
        need(self.total_steps >= 1, "a cycle needs steps", f"total_steps={self.total_steps}", "total_steps=1000")

    def at(self, t: Tensor) -> Tensor:
        initial = self.max_lr / self.div_factor
        last = initial / self.final_div_factor
        top, end = self.pct_start * self.total_steps - 1, self.total_steps - 1
        if self.three_phase:
            phases = [(top, initial, self.max_lr), (2 * top, self.max_lr, initial), (end, initial, last)]
        else:
            phases = [(top, initial, self.max_lr), (end, self.max_lr, last)]
        t, value, begins = t.clamp(max=end), torch.zeros_like(t), (0.0, *(stop for stop, _, _ in phases))
        # Backwards, so that a boundary belongs to the phase that ends there.
        for (stop, low, high), begin in reversed(list(zip(phases, begins, strict=False))):
            phase = self._anneal(low, high, (t - begin) / (stop - begin) if stop > begin else torch.ones_like(t))
            value = phase if stop == end else torch.where(t <= stop, phase, value)
        return value

    def _anneal(self, start: float, end: float, done: Tensor) -> Tensor:
        if self.anneal_strategy == "linear":
            return (end - start) * done + start
        return end + (start - end) / 2.0 * (1.0 + torch.cos(math.pi * done))


@checked(OptimError)
@schedule
class CyclicLR(ScheduleBase):
    """Up and down between two values, again and again.

    Examples:
        >>> lr = CyclicLR(0.0, max_lr=1.0, step_size_up=2)
        >>> [lr(step) for step in range(5)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    base_lr: NonNegative[float]
    max_lr: NonNegative[float]
    step_size_up: Count = 2000
    step_size_down: Count | None = None
    mode: str = "triangular"
    gamma: Finite[float] = 1.0

    def __post_init__(self) -> None:
        known = self.mode in ("triangular", "triangular2", "exp_range")
        need(known, "there is no such mode", f"mode={self.mode!r}", '"triangular", "triangular2" or "exp_range"')

    def horizon(self) -> int:
        """Return the end of the second cycle; none is the last."""
        return 2 * (self.step_size_up + (self.step_size_down or self.step_size_up))

    def at(self, t: Tensor) -> Tensor:
        up = float(self.step_size_up)
        total = up + (up if self.step_size_down is None else self.step_size_down)
        cycle = torch.floor(1 + t / total)
        x, ratio = 1.0 + t / total - cycle, up / total
        height = torch.where(x <= ratio, x / ratio, (x - 1) / (ratio - 1))
        return self.base_lr + (self.max_lr - self.base_lr) * height * self._envelope(t, cycle)

    def _envelope(self, t: Tensor, cycle: Tensor) -> Tensor:
        if self.mode == "triangular":
            return torch.ones_like(t)
        return torch.pow(0.5, cycle - 1) if self.mode == "triangular2" else torch.pow(self.gamma, t)
