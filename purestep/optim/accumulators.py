"""Running sums and averages of updates: `trace` (momentum), `ema`, and `accumulate` over several calls."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Count, Decay, NonNegative, checked
from purestep.errors import OptimError, explain
from purestep.optim.base import (
    ElementWrapper,
    GradientTransformation,
    Scalar,
    Schedule,
    StepNumber,
    new_count,
    same_leaves,
    transformation,
    value_at,
)
from purestep.optim.chain import all_applied
from purestep.optim.kernels import foreach as fx
from purestep.optim.rule import Memory, Rule


@transformation
class Trace(Rule):
    scope = "element"
    memory: ClassVar[tuple[str, ...]] = ("momentum",)
    decay: Scalar
    nesterov: bool = False

    def direction(self, gs: list[Tensor], memory: Memory, t: Tensor, ps: list[Tensor]) -> tuple[list[Tensor], Memory]:
        momentum = fx.add(fx.mul(memory["momentum"], self.decay), gs, reuse=True)
        return fx.add(gs, momentum, alpha=self.decay) if self.nesterov else momentum, {"momentum": momentum}


@checked(OptimError)
def trace(decay: NonNegative[Scalar], nesterov: bool = False) -> GradientTransformation:
    r"""Momentum: $m \leftarrow \mu m + u$; passes $m$ on, or $u + \mu m$ with Nesterov.

    Args:
        decay: $\mu$.
        nesterov: look ahead along the momentum.

    Examples:
        >>> tx = trace(0.5)
        >>> state = tx.init({"w": torch.zeros(1)})
        >>> _, state = tx.update({"w": torch.ones(1)}, state)
        >>> tx.update({"w": torch.ones(1)}, state)[0]
        {'w': tensor([1.5000])}

    Reference: `optax.trace`.
    """
    return Trace(decay, nesterov)


@transformation
class Ema(Rule):
    scope = "element"
    memory: ClassVar[tuple[str, ...]] = ("ema",)
    decay: Scalar
    debias: bool = True

    def direction(self, gs: list[Tensor], memory: Memory, t: Tensor, ps: list[Tensor]) -> tuple[list[Tensor], Memory]:
        average = fx.lerp(memory["ema"], gs, 1 - self.decay)
        return fx.mul(average, 1 / (1 - self.decay**t)) if self.debias else average, {"ema": average}


@checked(OptimError)
def ema(decay: Decay[Scalar], debias: bool = True) -> GradientTransformation:
    r"""Replace updates by their exponential moving average: $a \leftarrow d a + (1 - d) u$.

    Args:
        decay: $d$.
        debias: divide by $1 - d^t$, which undoes the start from zero.

    Examples:
        >>> tx = ema(0.5, debias=False)
        >>> tx.update({"w": torch.ones(1)}, tx.init({"w": torch.zeros(1)}))[0]
        {'w': tensor([0.5000])}

    Reference: `optax.ema`.
    """
    return Ema(decay, debias)


@tree.pytree
class AccumulateState:
    """`mini_step`: calls since the last update; `total`: sum of their gradients; `last_applied`: whether the last call
    was an update.
    """

    mini_step: Tensor
    total: Any
    last_applied: Tensor
    inner: Any


@transformation
class Accumulate(ElementWrapper):
    inner: GradientTransformation
    every: int | Schedule
    use_mean: bool = True

    def init(self, params: Any) -> AccumulateState:
        total = tree.map(lambda p: torch.zeros_like(p, dtype=fx.accumulator(p.dtype)), params)
        count = new_count(params)
        return AccumulateState(count, total, torch.zeros_like(count, dtype=torch.bool), self.inner.init(params))

    def update(
        self, updates: Any, state: Any, params: Any = None, *, step: StepNumber | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        gs, treedef = tree.flatten(updates)
        every = value_at(self.every, step, "every")
        before = same_leaves(state.total, treedef, updates, "accumulated gradients")
        total = fx.add(before, fx.cast(gs, before))
        # A schedule is constant within a sum, because the number of updates does not change until the sum is complete.
        due = state.mini_step + 1 >= every
        count = float(every) if isinstance(every, int) else (state.mini_step + 1).to(torch.float32)
        used = fx.cast(fx.div(total, count) if self.use_mean else total, gs)
        proposed, inner = self.inner.update(tree.unflatten(treedef, used), state.inner, params, step=step, **extra)
        us, out = tree.flatten(proposed)
        following = AccumulateState(
            torch.where(due, torch.zeros_like(state.mini_step), state.mini_step + 1),
            tree.unflatten(treedef, fx.select(~due, total, None)),
            due,
            fx.select_tree(due, inner, state.inner),
        )
        return tree.unflatten(out, fx.select(due, us, None)), following

    def applied(self, state: Any) -> Tensor | None:
        return all_applied([state.last_applied, self.inner.applied(state.inner)])

    def refused(self, state: Any) -> Tensor | None:
        inner = self.inner.refused(state.inner)
        return None if inner is None else inner & state.last_applied  # a call that only accumulates refuses nothing


@checked(OptimError)
def accumulate(
    inner: GradientTransformation, every: Count | Schedule, *, use_mean: bool = True
) -> GradientTransformation:
    """Sum gradients over several calls and update on the last of them; the calls between return zeros.

    `state.step` of a train state counts the updates, not the calls. For microbatches of one batch use `make_step(...,
    microbatches=V)` instead: it costs no state and sums in a fixed tree.

    Args:
        inner: the transformation of the accumulated gradients.
        every: calls per update, at least 1; or a schedule of the number of applied updates, such as
            `piecewise_constant_schedule(8.0, {1000: 0.5})`: 8 calls until update 1000, then 4. One below 1 counts as 1.
        use_mean: pass on the mean; otherwise the sum.

    Returns:
        A transformation with the state `AccumulateState(mini_step, total, last_applied, inner)`; sums are kept in at
        least float32.

    Raises:
        OptimError: `every` is neither a positive integer nor a function.

    Examples:
        >>> from purestep.optim import sgd
        >>> tx = accumulate(sgd(1.0), every=2)
        >>> state = tx.init({"w": torch.zeros(1)})
        >>> first, state = tx.update({"w": torch.tensor([1.0])}, state)
        >>> second, state = tx.update({"w": torch.tensor([3.0])}, state)
        >>> first, second
        ({'w': tensor([0.])}, {'w': tensor([-2.])})

    Reference: `optax.MultiSteps`.
    """
    is_schedule = callable(every) and not isinstance(every, type)
    if not is_schedule and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise OptimError(
            explain("every must be a positive integer", where=f"{every=}", instead="accumulate(tx, every=4)")
        )
    return Accumulate(inner, every, use_mean)
