"""Schedules of one formula: constant, polynomial, linear, exponential, cosine, and jumps at given steps.

Names and meanings are optax's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from purestep.arguments import Count, Finite, NonNegative, Whole, checked
from purestep.errors import OptimError
from purestep.optim.schedules.base import ScheduleBase, need, schedule


@schedule
class ConstantSchedule(ScheduleBase):
    value: float

    def at(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t) + self.value


@checked(OptimError)
def constant_schedule(value: Finite[float]) -> ConstantSchedule:
    """Always the same value.

    Examples:
        >>> constant_schedule(0.5)(7)
        0.5
    """
    return ConstantSchedule(value)


@schedule
class PolynomialSchedule(ScheduleBase):
    init_value: float
    end_value: float
    power: float
    transition_steps: int
    transition_begin: int = 0

    def horizon(self) -> int:
        """Return the end of the transition."""
        return max(1, self.transition_begin + self.transition_steps)

    def at(self, t: Tensor) -> Tensor:
        if self.transition_steps <= 0:
            return torch.zeros_like(t) + self.init_value
        left = 1.0 - (t - self.transition_begin).clamp(0, self.transition_steps) / self.transition_steps
        return (self.init_value - self.end_value) * left**self.power + self.end_value


@checked(OptimError)
def polynomial_schedule(
    init_value: Finite[float],
    end_value: Finite[float],
    power: NonNegative[float],
    transition_steps: int,
    transition_begin: Whole = 0,
) -> PolynomialSchedule:
    r"""From one value to another along a power of the remaining fraction.

    $(a - b) \left(1 - \frac{t - B}{T}\right)^p + b$ for $B \le t < B + T$; $a$ before, $b$ after.

    Args:
        init_value: $a$.
        end_value: $b$.
        power: $p$.
        transition_steps: $T$, in applied updates; 0 or less holds `init_value` for ever.
        transition_begin: $B$.

    Examples:
        >>> polynomial_schedule(1.0, 0.0, power=2, transition_steps=4)(2)
        0.25

    Reference: `optax.polynomial_schedule`.
    """
    need(transition_begin >= 0, "a transition cannot begin before step 0", f"{transition_begin=}", "transition_begin=0")
    return PolynomialSchedule(init_value, end_value, power, transition_steps, transition_begin)


@checked(OptimError)
def linear_schedule(
    init_value: Finite[float], end_value: Finite[float], transition_steps: int, transition_begin: Whole = 0
) -> PolynomialSchedule:
    """From one value to another along a straight line; `polynomial_schedule` with power 1.

    Examples:
        >>> warmup = linear_schedule(0.0, 1.0, transition_steps=4)
        >>> [warmup(step) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]

    Reference: `optax.linear_schedule`.
    """
    return polynomial_schedule(
        init_value, end_value, power=1, transition_steps=transition_steps, transition_begin=transition_begin
    )


@schedule
class ExponentialDecay(ScheduleBase):
    init_value: float
    transition_steps: int
    decay_rate: float
    transition_begin: int = 0
    staircase: bool = False
    end_value: float | None = None

    def horizon(self) -> int:
        """Return the end of the fourth transition; none is the last."""
        return max(1, self.transition_begin + 4 * self.transition_steps)

    def at(self, t: Tensor) -> Tensor:
        if self.transition_steps <= 0 or self.decay_rate == 0:
            return torch.zeros_like(t) + self.init_value
        since = (t - self.transition_begin).clamp(min=0)
        periods = since / self.transition_steps
        value = self.init_value * torch.pow(self.decay_rate, torch.floor(periods) if self.staircase else periods)
        if self.end_value is None:
            return value
        return value.clamp(min=self.end_value) if self.decay_rate < 1.0 else value.clamp(max=self.end_value)


@checked(OptimError)
def exponential_decay(
    init_value: Finite[float],
    transition_steps: int,
    decay_rate: Finite[float],
    transition_begin: Whole = 0,
    staircase: bool = False,
    end_value: Finite[float] | None = None,
) -> ExponentialDecay:
    r"""Multiply by `decay_rate` every `transition_steps`: $a \, r^{(t - B) / T}$.

    Args:
        init_value: $a$.
        transition_steps: $T$.
        decay_rate: $r$; 0 means no decay.
        transition_begin: $B$; before it the value is $a$.
        staircase: round the exponent down, so that the value jumps.
        end_value: where the decay stops: a lower limit for $r < 1$, an upper one otherwise.

    Examples:
        >>> exponential_decay(1.0, 10, decay_rate=0.5)(20)
        0.25

    Reference: `optax.exponential_decay`.
    """
    need(transition_begin >= 0, "a transition cannot begin before step 0", f"{transition_begin=}", "transition_begin=0")
    return ExponentialDecay(init_value, transition_steps, decay_rate, transition_begin, staircase, end_value)


@schedule
class CosineDecaySchedule(ScheduleBase):
    init_value: float
    decay_steps: int
    alpha: float = 0.0
    exponent: float = 1.0

    def at(self, t: Tensor) -> Tensor:
        cosine = 0.5 * (1.0 + torch.cos(math.pi * t.clamp(0, self.decay_steps) / self.decay_steps))
        return self.init_value * ((1.0 - self.alpha) * cosine**self.exponent + self.alpha)


@checked(OptimError)
def cosine_decay_schedule(
    init_value: Finite[float], decay_steps: Count, alpha: Finite[float] = 0.0, exponent: NonNegative[float] = 1.0
) -> CosineDecaySchedule:
    r"""Half a cosine from `init_value` down to `alpha * init_value`.

    $a \left[(1 - \alpha) \left(\tfrac12 (1 + \cos \pi t / T)\right)^p + \alpha\right]$ for $t \le T$.

    Args:
        init_value: $a$.
        decay_steps: $T$, at least 1.
        alpha: the final value, as a fraction of `init_value`.
        exponent: $p$.

    Examples:
        >>> cosine_decay_schedule(1.0, 10)(5)
        0.5

    Reference: Loshchilov and Hutter, 2017 <https://arxiv.org/abs/1608.03983>; `optax.cosine_decay_schedule`.
    """
    need(
        decay_steps > 0,
        "a cosine decay needs at least one step",
        f"{decay_steps=}",
        "cosine_decay_schedule(1e-3, 1000)",
    )
    return CosineDecaySchedule(init_value, decay_steps, alpha, exponent)


@schedule
class PiecewiseConstantSchedule(ScheduleBase):
    init_value: float
    boundaries_and_scales: tuple[tuple[int, float], ...] = ()

    def at(self, t: Tensor) -> Tensor:
        value = torch.zeros_like(t) + self.init_value
        for boundary, scale in self.boundaries_and_scales:
            value = torch.where(t >= boundary, value * scale, value)
        return value


@checked(OptimError)
def piecewise_constant_schedule(
    init_value: Finite[float], boundaries_and_scales: Finite[Mapping[int, float]] | None = None
) -> PiecewiseConstantSchedule:
    """Multiply by a factor at each of some steps.

    Args:
        init_value: the value at step 0.
        boundaries_and_scales: `{step: factor}`; a factor applies from its step on.

    Examples:
        >>> drops = piecewise_constant_schedule(1.0, {100: 0.5, 200: 0.5})
        >>> [drops(step) for step in (99, 100, 200)]
        [1.0, 0.5, 0.25]

    Reference: `optax.piecewise_constant_schedule`.
    """
    return PiecewiseConstantSchedule(init_value, sorted_pairs(boundaries_and_scales or {}))


@schedule
class PiecewiseInterpolateSchedule(ScheduleBase):
    interpolate_type: str
    init_value: float
    boundaries_and_scales: tuple[tuple[int, float], ...] = ()

    def at(self, t: Tensor) -> Tensor:
        start, low = 0, self.init_value
        result = torch.zeros_like(t) + low
        for boundary, scale in self.boundaries_and_scales:
            high = low * scale
            done = ((t - start) / max(boundary - start, 1)).clamp(0, 1)
            if self.interpolate_type == "cosine":
                done = 0.5 * (1.0 - torch.cos(math.pi * done))
            result = torch.where(t >= start, low + (high - low) * done, result)
            start, low = boundary, high
        return torch.where(t >= start, torch.zeros_like(t) + low, result)


@checked(OptimError)
def piecewise_interpolate_schedule(
    interpolate_type: str, init_value: Finite[float], boundaries_and_scales: Finite[Mapping[int, float]] | None = None
) -> PiecewiseInterpolateSchedule:
    """Like `piecewise_constant_schedule`, moving from one value to the next instead of jumping.

    Args:
        interpolate_type: "linear" or "cosine".
        init_value: the value at step 0.
        boundaries_and_scales: `{step: factor}`; the product of the factors so far is reached at the step.

    Examples:
        >>> path = piecewise_interpolate_schedule("linear", 1.0, boundaries_and_scales={4: 0.5, 8: 0.0})
        >>> [path(step) for step in (0, 2, 4, 6, 8)]
        [1.0, 0.75, 0.5, 0.25, 0.0]

    Reference: `optax.piecewise_interpolate_schedule`.
    """
    known = interpolate_type in ("linear", "cosine")
    need(known, "there is no such interpolation", f"{interpolate_type=}", '"linear" or "cosine"')
    return PiecewiseInterpolateSchedule(interpolate_type, init_value, sorted_pairs(boundaries_and_scales or {}))


def sorted_pairs(boundaries_and_scales: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    """Return `{step: factor}` as a hashable tuple in order of step."""
    pairs = tuple(sorted(boundaries_and_scales.items()))
    for step, factor in pairs:
        need(factor >= 0, "factors of a piecewise schedule are not negative", f"{{{step}: {factor}}}", "{1000: 0.1}")
    return pairs
