"""`prune`: keep the smallest weights of each tensor, a growing fraction, at zero, while the other weights train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Count, Fraction, checked
from purestep.errors import OptimError, explain
from purestep.optim.base import (
    GradientTransformation,
    ScalarOrSchedule,
    StepNumber,
    Wrapper,
    need_params,
    new_count,
    scalar_like,
    transformation,
    value_at,
)
from purestep.optim.kernels import foreach as fx
from purestep.optim.masks import by_name
from purestep.optim.weight_decay import fixed_filter


@tree.pytree
class PruneState:
    """`count`: number of updates; `kept`: masks of the elements that are not pruned, by dotted name; `inner`: inner
    state."""

    count: Tensor
    kept: dict[str, Tensor]
    inner: Any


@transformation
class Prune(Wrapper):
    inner: GradientTransformation
    amount: ScalarOrSchedule
    where: tree.Filter | None = None
    every: int = 1

    def init(self, params: Any) -> PruneState:
        chosen = {name: p for name, p in by_name(params).items() if self._is_chosen(name, p)}
        if not chosen:
            raise OptimError(
                explain(
                    "there is nothing to prune",
                    where=f"where={self.where!r}; parameters: {', '.join(list(by_name(params))[:8])}",
                )
            )
        kept = {name: torch.ones_like(p, dtype=torch.bool) for name, p in chosen.items()}
        return PruneState(new_count(params), kept, self.inner.init(params))

    def _is_chosen(self, name: str, p: Tensor) -> bool:
        return p.ndim >= 2 if self.where is None else tree.matches(self.where, name)

    def update(
        self, updates: Any, state: Any, params: Any = None, *, step: StepNumber | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        before = need_params(params, self.name, "the smallest of them are pruned")
        proposed, inner = self.inner.update(updates, state.inner, before, step=step, **extra)
        after, applied = by_name(self.inner.apply(before, proposed, inner)), self.inner.applied(inner)
        amount = value_at(self.amount, step, "amount")
        due = state.count % self.every == 0
        due = due if applied is None else due & applied
        old, changed, names = by_name(before), by_name(proposed), list(state.kept)
        largest = [_largest(after[name], amount) for name in names]
        masks = fx.select(due, largest, [state.kept[name] for name in names])
        olds, news = [old[name] for name in names], [changed[name] for name in names]
        # Pruned elements become exactly zero; the others get the updates of the inner transformation, to the bit.
        pruned = fx.elements(lambda mask, new, old: torch.where(mask, new, -old.to(new.dtype)), masks, news, olds)
        chosen = pruned if applied is None else fx.select(applied, pruned, news)
        changed.update(zip(names, chosen, strict=True))
        kept = dict(zip(names, masks, strict=True))
        count = state.count + (1 if applied is None else applied.to(state.count.dtype))
        return tree.unflatten(tree.structure(updates), list(changed.values())), PruneState(count, kept, inner)


def _largest(p: Tensor, amount: Any) -> Tensor:
    """Return a mask of the elements that stay when a fraction, the smallest by magnitude, is pruned; of equal elements
    the first are pruned."""
    ranks = p.detach().abs().reshape(-1).argsort(stable=True).argsort()
    gone = scalar_like(amount, p.new_empty((), dtype=torch.float32)) * p.numel()
    return (ranks >= gone.round()).reshape(p.shape)


@checked(OptimError)
def prune(
    inner: GradientTransformation,
    amount: Fraction[ScalarOrSchedule],
    *,
    where: tree.Filter | None = None,
    every: Count = 1,
) -> GradientTransformation:
    """Keep the smallest weights of each tensor at zero, by magnitude, while the others train.

    Args:
        inner: the transformation that trains. Wrap the whole chain.
        amount: the fraction of each tensor that is zero: a number in [0, 1), or a schedule of the step that raises it
            gradually.
        where: filter of the parameters to prune, by dotted name; by default all with two dims or more.
        every: number of updates between two selections of the pruned weights.

    Returns:
        A transformation with the state `PruneState(count, kept, inner)`. The step after an update the parameters have
        exactly `round(amount * size)` zeros. A skipped update prunes nothing.

    Raises:
        OptimError: no parameter matches.

    Examples:
        >>> from purestep.optim import sgd
        >>> tx = prune(sgd(0.1), 0.5)
        >>> params = {"w": torch.tensor([[1.0, -4.0, 0.5, 2.0]])}
        >>> updates, state = tx.update({"w": torch.zeros(1, 4)}, tx.init(params), params, step=0)
        >>> tx.apply(params, updates, state)
        {'w': tensor([[ 0., -4.,  0.,  2.]])}

    Reference: Zhu and Gupta, To Prune, or Not to Prune, 2017; `torch.nn.utils.prune.l1_unstructured`.
    """
    return Prune(inner, amount, None if where is None else fixed_filter(where), every)
