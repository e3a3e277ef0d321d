"""Transformations that act on some steps only, or that look back: conditionally_transform, conditionally_mask,
lookahead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Count, Finite, Fraction, checked
from purestep.errors import OptimError, explain
from purestep.optim.base import (
    ElementWrapper,
    GradientTransformation,
    Scalar,
    StepNumber,
    as_scalar,
    need_params,
    need_step,
    new_count,
    same_leaves,
    transformation,
)
from purestep.optim.kernels import foreach as fx

Condition = Callable[[Any], Any]


@tree.pytree
class ConditionalState:
    """`inner`: state of the inner transformation, changed only on the steps on which it acts; `acted`: whether it acted
    on the last step.
    """

    acted: Tensor
    inner: Any


@transformation
class ConditionallyTransform(ElementWrapper):
    inner: GradientTransformation
    condition: Condition
    otherwise_zero: bool = False

    @property
    def name(self) -> str:
        return "conditionally_mask" if self.otherwise_zero else "conditionally_transform"

    def init(self, params: Any) -> ConditionalState:
        return ConditionalState(torch.zeros_like(new_count(params), dtype=torch.bool), self.inner.init(params))

    def update(
        self, updates: Any, state: Any, params: Any = None, *, step: StepNumber | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        now = as_scalar(self.condition(need_step(step, self.name)), "condition", self.condition)
        now = torch.as_tensor(now, device=state.acted.device)
        proposed, inner = self.inner.update(updates, state.inner, params, step=step, **extra)
        us, treedef = tree.flatten(updates)
        others = None if self.otherwise_zero else us
        chosen = fx.select(now, same_leaves(proposed, treedef, updates, "inner updates"), others)
        return tree.unflatten(treedef, chosen), ConditionalState(now, fx.select_tree(now, inner, state.inner))

    def applied(self, state: Any) -> Tensor | None:
        inner = self.inner.applied(state.inner)
        return None if inner is None else inner | ~state.acted

    def refused(self, state: Any) -> Tensor | None:
        inner = self.inner.refused(state.inner)
        return None if inner is None else inner & state.acted


@checked(OptimError)
def conditionally_transform(inner: GradientTransformation, condition: Finite[Condition]) -> GradientTransformation:
    """Apply a transformation on some steps; on the others neither the updates nor its state change.

    Args:
        inner: the transformation.
        condition: function of the number of applied updates (0-d int64 tensor) that returns a 0-d bool tensor.

    Returns:
        A transformation with the state `ConditionalState(acted, inner)`; `update` needs `step=`.

    Examples:
        >>> from purestep.optim import scale
        >>> tx = conditionally_transform(scale(10.0), lambda step: step >= 5)
        >>> state = tx.init({"w": torch.ones(1)})
        >>> tx.update({"w": torch.ones(1)}, state, step=torch.tensor(4))[0]
        {'w': tensor([1.])}

    Reference: `optax.conditionally_transform`.
    """
    return ConditionallyTransform(inner, condition)


@checked(OptimError)
def conditionally_mask(inner: GradientTransformation, condition: Finite[Condition]) -> GradientTransformation:
    """Apply a transformation on some steps; on the others updates are zeros and its state does not change.

    Examples:
        >>> from purestep.optim import scale
        >>> tx = conditionally_mask(scale(10.0), lambda step: step % 2 == 0)
        >>> state = tx.init({"w": torch.ones(1)})
        >>> tx.update({"w": torch.ones(1)}, state, step=torch.tensor(1))[0]
        {'w': tensor([0.])}

    Reference: `optax.conditionally_mask`.
    """
    return ConditionallyTransform(inner, condition, otherwise_zero=True)


@tree.pytree
class LookaheadState:
    """`slow`: the slow parameters; `steps_since_sync`: fast updates since they moved."""

    slow: Any
    steps_since_sync: Tensor
    inner: Any


@transformation
class Lookahead(ElementWrapper):
    inner: GradientTransformation
    sync_period: int = 6
    slow_step_size: Scalar = 0.5
    reset_state: bool = False

    def init(self, params: Any) -> LookaheadState:
        return LookaheadState(tree.map(torch.clone, params), new_count(params), self.inner.init(params))

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        ps, treedef = tree.flatten(need_params(params, self.name))
        proposed, inner = self.inner.update(updates, state.inner, params, **extra)
        us = same_leaves(proposed, treedef, params, "updates")
        slow = same_leaves(state.slow, treedef, params, "slow parameters")
        due = state.steps_since_sync + 1 == self.sync_period
        reached = fx.add(ps, us)
        moved = fx.add(slow, fx.sub(reached, slow), alpha=self.slow_step_size)
        if self.reset_state:
            inner = fx.select_tree(due, self.inner.init(params), inner)
        following = LookaheadState(
            tree.unflatten(treedef, fx.select(due, moved, slow)),
            torch.where(due, torch.zeros_like(state.steps_since_sync), state.steps_since_sync + 1),
            inner,
        )
        return tree.unflatten(treedef, fx.select(due, fx.sub(moved, ps), us)), following


@checked(OptimError)
def lookahead(
    inner: GradientTransformation,
    sync_period: Count = 6,
    slow_step_size: Fraction[Scalar] = 0.5,
    reset_state: bool = False,
) -> GradientTransformation:
    r"""Every few updates, move slow parameters part of the way to the fast ones, and start again from there.

    $s \leftarrow s + \alpha (w - s)$, $w \leftarrow s$ every `sync_period` updates. Parameters are an ordinary tree:
    the slow ones live in the state.

    Args:
        inner: the fast optimizer, which trains the parameters.
        sync_period: updates between two moves of the slow parameters.
        slow_step_size: $\alpha$.
        reset_state: start the fast optimizer's state anew at each move.

    Returns:
        A transformation with the state `LookaheadState(slow, steps_since_sync, inner)`.

    Raises:
        OptimError: `sync_period` is less than 1.

    Examples:
        >>> from purestep.optim import sgd
        >>> tx = lookahead(sgd(1.0), sync_period=1)
        >>> params = {"w": torch.zeros(1)}
        >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
        {'w': tensor([-0.5000])}

    Reference: Zhang et al., 2019 <https://arxiv.org/abs/1907.08610>; `optax.lookahead`.
    """
    if sync_period < 1:
        raise OptimError(
            explain("sync_period must be at least 1", where=f"{sync_period=}", instead="lookahead(adam(1e-3), 6)")
        )
    return Lookahead(inner, sync_period, slow_step_size, reset_state)
