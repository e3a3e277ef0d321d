"""Sharpness-aware minimisation: the gradient is taken where the loss is worst nearby."""

from __future__ import annotations

from typing import Any

from purestep import tree
from purestep.arguments import NonNegative, checked
from purestep.errors import OptimError
from purestep.optim.base import GradientTransformation, Scalar, Wrapper, need_params, same_leaves, transformation
from purestep.optim.kernels import foreach as fx
from purestep.optim.second_order import ValueFn, need_value_fn, value_and_grad


@tree.pytree
class SamState:
    """`inner`: state of the inner optimizer, which gets the gradient at the worst point."""

    inner: Any


@transformation
class Sam(Wrapper):
    inner: GradientTransformation
    rho: Scalar = 0.05
    adaptive: bool = False
    eps: float = 1e-12

    def init(self, params: Any) -> SamState:
        return SamState(self.inner.init(params))

    def update(
        self, updates: Any, state: Any, params: Any = None, *, value_fn: ValueFn | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        function = need_value_fn(value_fn, self.name)
        gs, treedef = tree.flatten(updates)
        ps = same_leaves(need_params(params, self.name), treedef, updates, "params")
        weights = fx.abs(ps) if self.adaptive else None
        scaled = gs if weights is None else fx.mul(gs, weights)
        climb = fx.mul(scaled, self.rho / (fx.global_norm(scaled) + self.eps))
        climb = climb if weights is None else fx.mul(climb, weights, reuse=True)
        _, worst = value_and_grad(function, tree.unflatten(treedef, fx.add(ps, climb)))
        proposed, inner = self.inner.update(worst, state.inner, params, value_fn=value_fn, **extra)
        return proposed, SamState(inner)


@checked(OptimError)
def sam(
    inner: GradientTransformation, rho: NonNegative[Scalar] = 0.05, *, adaptive: bool = False
) -> GradientTransformation:
    r"""Minimise the worst loss in a ball of radius $\rho$ around the parameters.

    $u = \mathrm{inner}(\nabla L(w + \rho \, g / \lVert g \rVert))$; adaptive: $w + \rho \, w^2 g / \lVert |w| g
    \rVert$.

    Args:
        inner: the optimizer.
        rho: $\rho$.
        adaptive: measure the ball relative to each weight (ASAM).

    Returns:
        A transformation whose `update` needs `params` and `value_fn=`: the loss of this batch as a function of the
        parameters.

    Examples:
        >>> import torch
        >>> from purestep.optim import sgd
        >>> tx = sam(sgd(1.0), rho=0.5)
        >>> params = {"w": torch.tensor([2.0])}
        >>> loss = lambda p: (p["w"] ** 2).sum()
        >>> tx.update({"w": torch.tensor([4.0])}, tx.init(params), params, value_fn=loss)[0]
        {'w': tensor([-5.])}

    Reference: Foret et al., 2021 <https://arxiv.org/abs/2010.01412>; `optax.contrib.sam(opaque_mode=True)`.
    """
    return Sam(inner, rho, adaptive)
