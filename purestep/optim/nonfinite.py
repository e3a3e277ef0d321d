"""Refusing bad gradients: `apply_if_finite`, `skip_large_updates`, `zero_nans`.

A skipped update is zeros and leaves the inner state bitwise unchanged; the train state reads `applied` and does not
count it. The decision is a tensor, so the host does not wait for the device.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Limit, Whole, checked
from purestep.errors import OptimError
from purestep.optim.base import GradientTransformation, Scalar, Wrapper, new_count, transformation
from purestep.optim.chain import all_applied, any_refused
from purestep.optim.kernels import foreach as fx
from purestep.optim.scope import ShardAware


class Guard(ShardAware, Wrapper):
    """A wrapper that refuses some updates, decided from all gradients of all ranks."""

    @abc.abstractmethod
    def _accepted(self, state: Any) -> Tensor:
        """Tell whether this wrapper accepted the last update, as a 0-d bool tensor."""

    def applied(self, state: Any) -> Tensor | None:
        return all_applied([self._accepted(state), self.inner.applied(state.inner)])

    def refused(self, state: Any) -> Tensor | None:
        return any_refused([~self._accepted(state), self.inner.refused(state.inner)])


@tree.pytree
class ApplyIfFiniteState:
    """`notfinite_count`: refusals in a row; `total_notfinite`: all refusals; `last_finite`: whether the last was
    accepted.
    """

    notfinite_count: Tensor
    total_notfinite: Tensor
    last_finite: Tensor
    inner: Any


@transformation
class ApplyIfFinite(Guard):
    inner: GradientTransformation
    max_consecutive_errors: int | None = None

    def init(self, params: Any) -> ApplyIfFiniteState:
        yes = torch.ones_like(new_count(params), dtype=torch.bool)
        return ApplyIfFiniteState(new_count(params), new_count(params), yes, self.inner.init(params))

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        gs = tree.leaves(updates)
        proposed, inner = self.inner.update(updates, state.inner, params, **extra)
        us = tree.leaves(proposed)
        finite = (fx.all_finite(gs) & fx.all_finite(us)).to(state.last_finite.device)
        accepted = fx.select(finite, us, None)
        following = ApplyIfFiniteState(
            torch.where(finite, torch.zeros_like(state.notfinite_count), state.notfinite_count + 1),
            state.total_notfinite + (~finite).to(state.total_notfinite.dtype),
            finite,
            fx.select_tree(finite, inner, state.inner),
        )
        return tree.unflatten(tree.structure(proposed), accepted), following

    def _accepted(self, state: Any) -> Tensor:
        return state.last_finite

    def gave_up(self, state: Any) -> Tensor:
        """Tell, as a 0-d bool tensor, whether more than `max_consecutive_errors` updates in a row were refused."""
        if self.max_consecutive_errors is None:
            return torch.zeros_like(state.last_finite)
        return torch.as_tensor(state.notfinite_count > self.max_consecutive_errors)


@checked(OptimError)
def apply_if_finite(
    inner: GradientTransformation, max_consecutive_errors: Whole | None = None
) -> GradientTransformation:
    """Skip an update when a gradient, or the update made from it, holds an infinity or a NaN.

    A skipped update is zeros and leaves the inner state bitwise unchanged, so parameters, moments and schedules do not
    change. Unlike optax's, this wrapper never applies a non-finite update, however many occur in a row; see `gave_up`.

    Args:
        inner: the transformation to guard; usually the whole chain.
        max_consecutive_errors: after more refusals in a row than this, `gave_up(state)` is true. None never gives up.

    Returns:
        A transformation with the state `ApplyIfFiniteState(notfinite_count, total_notfinite, last_finite, inner)`.

    Examples:
        >>> from purestep.optim import sgd
        >>> tx = apply_if_finite(sgd(0.1))
        >>> grads = {"w": torch.tensor([1.0, float("nan")])}
        >>> updates, state = tx.update(grads, tx.init(grads))
        >>> updates, tx.applied(state)
        ({'w': tensor([0., 0.])}, tensor(False))

    Reference: `optax.apply_if_finite`.
    """
    return ApplyIfFinite(inner, max_consecutive_errors)


@tree.pytree
class SkipLargeUpdatesState:
    """`skipped`: all refusals; `last_applied`: whether the last update was accepted; `norm`: its global norm."""

    skipped: Tensor
    last_applied: Tensor
    norm: Tensor
    inner: Any


@transformation
class SkipLargeUpdates(Guard):
    inner: GradientTransformation
    max_norm: Scalar

    def init(self, params: Any) -> SkipLargeUpdatesState:
        zero = new_count(params)
        norm = torch.zeros_like(fx.global_norm(tree.leaves(params)))
        return SkipLargeUpdatesState(zero, torch.ones_like(zero, dtype=torch.bool), norm, self.inner.init(params))

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        norm = fx.global_norm(*tree.flatten(updates)).to(state.norm.dtype)
        small = norm <= self.max_norm
        proposed, inner = self.inner.update(updates, state.inner, params, **extra)
        us, treedef = tree.flatten(proposed)
        accepted = fx.select(small, us, None)
        following = SkipLargeUpdatesState(
            state.skipped + (~small).to(state.skipped.dtype), small, norm, fx.select_tree(small, inner, state.inner)
        )
        return tree.unflatten(treedef, accepted), following

    def _accepted(self, state: Any) -> Tensor:
        return state.last_applied


@checked(OptimError)
def skip_large_updates(inner: GradientTransformation, max_norm: Limit[Scalar]) -> GradientTransformation:
    """Skip an update whose gradients have a global norm above a limit, or no norm at all (NaN).

    Args:
        inner: the transformation to guard.
        max_norm: the largest global norm of the incoming gradients that is accepted.

    Returns:
        A transformation with the state `SkipLargeUpdatesState(skipped, last_applied, norm, inner)`.

    Examples:
        >>> from purestep.optim import sgd
        >>> tx = skip_large_updates(sgd(0.1), max_norm=10.0)
        >>> grads = {"w": torch.tensor([30.0, 40.0])}
        >>> updates, state = tx.update(grads, tx.init(grads))
        >>> updates, state.norm
        ({'w': tensor([0., 0.])}, tensor(50.))

    Reference: `optax.skip_large_updates` (a `should_skip_update_fn` of `optax.MultiSteps`).
    """
    return SkipLargeUpdates(inner, max_norm)


@tree.pytree
class ZeroNansState:
    """`found_nan`: for each parameter, a 0-d bool: whether the last gradient held a NaN."""

    found_nan: Any


@transformation
class ZeroNans(GradientTransformation):
    scope = "tensor"

    def init(self, params: Any) -> ZeroNansState:
        return ZeroNansState(tree.map(lambda p: torch.zeros((), dtype=torch.bool, device=p.device), params))

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        found = tree.map(lambda u: torch.isnan(u).any(), updates)
        cleaned = tree.map(lambda u: torch.where(torch.isnan(u), torch.zeros_like(u), u), updates)
        return cleaned, ZeroNansState(found)


@checked(OptimError)
def zero_nans() -> GradientTransformation:
    """Replace each NaN by 0, and remember which tensors held one. Infinities stay.

    Examples:
        >>> tx = zero_nans()
        >>> tx.update({"w": torch.tensor([1.0, float("nan")])}, tx.init({"w": torch.zeros(2)}))
        ({'w': tensor([1., 0.])}, ZeroNansState(found_nan={'w': tensor(True)}))

    Reference: `optax.zero_nans`.
    """
    return ZeroNans()
