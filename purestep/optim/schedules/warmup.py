"""Schedules made of others: joined end to end, with a warm-up, with restarts, one cycle up and down.

Names and meanings are optax's. Most runs use `warmup_cosine_decay_schedule`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from purestep.arguments import Count, Finite, Fraction, Positive, Whole, checked
from purestep.errors import OptimError
from purestep.optim.schedules.base import ScheduleBase, evaluate, need, schedule
from purestep.optim.schedules.decay import (
    PiecewiseInterpolateSchedule,
    PolynomialSchedule,
    cosine_decay_schedule,
    exponential_decay,
    linear_schedule,
    piecewise_interpolate_schedule,
)


@schedule
class JoinSchedules(ScheduleBase):
    schedules: tuple[Callable[[Any], Any], ...]
    boundaries: tuple[int, ...]

    def horizon(self) -> int:
        """Return the end of the last part that has a horizon."""
        starts = zip((0, *self.boundaries), self.schedules, strict=True)
        return max(s + (part.horizon() if isinstance(part, ScheduleBase) else 1) for s, part in starts)

    def at(self, t: Tensor) -> Tensor:
        value = evaluate(self.schedules[0], t)
        for boundary, part in zip(self.boundaries, self.schedules[1:], strict=True):
            # Steps before the start of a part are clamped, because its formula may not be finite there.
            value = torch.where(t < boundary, value, evaluate(part, (t - boundary).clamp(min=0)))
        return value


@checked(OptimError)
def join_schedules(schedules: Sequence[Callable[[Any], Any]], boundaries: Sequence[int]) -> JoinSchedules:
    """Follow one schedule after another; each counts from its own beginning.

    Args:
        schedules: schedules, or functions of an int64 step tensor.
        boundaries: the step at which each schedule but the first begins, ascending.

    Raises:
        OptimError: there is not exactly one boundary between two schedules, or they do not ascend.

    Examples:
        >>> from purestep.optim import constant_schedule, linear_schedule
        >>> joined = join_schedules([linear_schedule(0.0, 1.0, transition_steps=4), constant_schedule(0.5)], [4])
        >>> [joined(step) for step in (2, 4)]
        [0.5, 0.5]

    Reference: `optax.join_schedules`.
    """
    fits = len(schedules) == len(boundaries) + 1 and list(boundaries) == sorted(boundaries)
    where = f"{len(schedules)} schedules, boundaries {list(boundaries)}"
    need(fits, "schedules and boundaries do not fit", where, "join_schedules([warmup, decay], [1000])")
    return JoinSchedules(tuple(schedules), tuple(boundaries))


@checked(OptimError)
def warmup_constant_schedule(
    init_value: Finite[float], peak_value: Finite[float], warmup_steps: Whole
) -> PolynomialSchedule:
    """A straight line up to `peak_value`, which then stays.

    Examples:
        >>> warmup_constant_schedule(0.0, 1.0, warmup_steps=4)(2)
        0.5

    Reference: `optax.warmup_constant_schedule`.
    """
    return linear_schedule(init_value, peak_value, transition_steps=warmup_steps)


@checked(OptimError)
def warmup_cosine_decay_schedule(
    init_value: Finite[float],
    peak_value: Finite[float],
    warmup_steps: Whole,
    decay_steps: Count,
    end_value: Finite[float] = 0.0,
    exponent: Finite[float] = 1.0,
) -> JoinSchedules:
    """A straight line up to `peak_value`, then half a cosine down to `end_value`.

    Args:
        init_value: the value at step 0.
        peak_value: the value at step `warmup_steps`.
        warmup_steps: length of the warm-up; 0 starts at the peak.
        decay_steps: length of the whole schedule, the warm-up included.
        end_value: the value from step `decay_steps` on.
        exponent: power of the cosine, see `cosine_decay_schedule`.

    Raises:
        OptimError: the decay ends before the warm-up does.

    Examples:
        >>> lr = warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=2, decay_steps=6)
        >>> [round(lr(step), 3) for step in range(7)]
        [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0]

    Reference: `optax.warmup_cosine_decay_schedule`.
    """
    where = f"{warmup_steps=}, {decay_steps=}"
    need(decay_steps > warmup_steps, "the decay ends before the warm-up", where, "decay_steps counts the warm-up too")
    alpha = 0.0 if peak_value == 0.0 else end_value / peak_value
    decay = cosine_decay_schedule(peak_value, decay_steps - warmup_steps, alpha=alpha, exponent=exponent)
    return join_schedules(
        [linear_schedule(init_value, peak_value, transition_steps=warmup_steps), decay], [warmup_steps]
    )


@checked(OptimError)
def warmup_exponential_decay_schedule(
    init_value: Finite[float],
    peak_value: Finite[float],
    warmup_steps: Whole,
    transition_steps: int,
    decay_rate: Finite[float],
    transition_begin: Whole = 0,
    staircase: bool = False,
    end_value: Finite[float] | None = None,
) -> JoinSchedules:
    """A straight line up to `peak_value`, then an exponential decay; see `exponential_decay`.

    Examples:
        >>> lr = warmup_exponential_decay_schedule(0.0, 1.0, warmup_steps=4, transition_steps=2, decay_rate=0.5)
        >>> [lr(step) for step in (2, 4, 6, 8)]
        [0.5, 1.0, 0.5, 0.25]

    Reference: `optax.warmup_exponential_decay_schedule`.
    """
    decay = exponential_decay(
        peak_value,
        transition_steps,
        decay_rate=decay_rate,
        transition_begin=transition_begin,
        staircase=staircase,
        end_value=end_value,
    )
    return join_schedules(
        [linear_schedule(init_value, peak_value, transition_steps=warmup_steps), decay], [warmup_steps]
    )


@checked(OptimError)
def sgdr_schedule(cosine_kwargs: Iterable[Mapping[str, Any]]) -> JoinSchedules:
    """Cosine decays with warm restarts, each cycle with its own arguments.

    Args:
        cosine_kwargs: the keyword arguments of `warmup_cosine_decay_schedule` for each cycle; `decay_steps` is its
            length.

    Examples:
        >>> cycle = dict(init_value=0.0, peak_value=1.0, warmup_steps=2, decay_steps=4)
        >>> [round(sgdr_schedule([cycle, cycle])(step), 3) for step in range(7)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.5, 1.0]

    Reference: Loshchilov and Hutter, 2017 <https://arxiv.org/abs/1608.03983>; `optax.sgdr_schedule`.
    """
    cycles = [dict(kwargs) for kwargs in cosine_kwargs]
    need(bool(cycles), "there is no cycle to follow", "cosine_kwargs=[]", "sgdr_schedule([dict(...), dict(...)])")
    ends = [sum(int(c["decay_steps"]) for c in cycles[: i + 1]) for i in range(len(cycles))]
    return join_schedules([warmup_cosine_decay_schedule(**c) for c in cycles], ends[:-1])


@checked(OptimError)
def linear_onecycle_schedule(
    transition_steps: int,
    peak_value: Finite[float],
    pct_start: Fraction[float] = 0.3,
    pct_final: Fraction[float] = 0.85,
    div_factor: Positive[float] = 25.0,
    final_div_factor: Positive[float] = 1e4,
) -> PiecewiseInterpolateSchedule:
    """Three straight lines: up to the peak, down to where it began, and down to nearly nothing.

    Args:
        transition_steps: length of the whole cycle.
        peak_value: the largest value, at `pct_start` of the cycle.
        pct_start, pct_final: where the first and the second line end, as fractions of the cycle.
        div_factor: the cycle begins at `peak_value / div_factor`.
        final_div_factor: the cycle ends at that value divided by this.

    Examples:
        >>> linear_onecycle_schedule(100, 1.0)(30)
        1.0

    Reference: Smith and Topin, 2017 <https://arxiv.org/abs/1708.07120>; `optax.linear_onecycle_schedule`.
    """
    need(transition_steps > 0, "a cycle needs at least one step", f"{transition_steps=}", "transition_steps=1000")
    scales = {
        int(pct_start * transition_steps): div_factor,
        int(pct_final * transition_steps): 1.0 / div_factor,
        transition_steps: 1.0 / final_div_factor,
    }
    return piecewise_interpolate_schedule("linear", peak_value / div_factor, boundaries_and_scales=scales)


@checked(OptimError)
def cosine_onecycle_schedule(
    transition_steps: int,
    peak_value: Finite[float],
    pct_start: Fraction[float] = 0.3,
    div_factor: Positive[float] = 25.0,
    final_div_factor: Positive[float] = 1e4,
) -> PiecewiseInterpolateSchedule:
    """Half a cosine up to the peak and half a cosine down to nearly nothing; arguments as in
    `linear_onecycle_schedule`.

    Examples:
        >>> cosine_onecycle_schedule(100, 1.0)(30)
        1.0

    Reference: Smith and Topin, 2017 <https://arxiv.org/abs/1708.07120>; `optax.cosine_onecycle_schedule`.
    """
    need(transition_steps > 0, "a cycle needs at least one step", f"{transition_steps=}", "transition_steps=1000")
    scales = {int(pct_start * transition_steps): div_factor, transition_steps: 1.0 / (div_factor * final_div_factor)}
    return piecewise_interpolate_schedule("cosine", peak_value / div_factor, boundaries_and_scales=scales)
